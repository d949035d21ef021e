"""Scores of a network on a data set's evaluation images, beside those of a constant prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.losses import project
from pahm.metrics import HandMetrics, align_with_scale
from pahm.model.network import HandNet
from pahm.predict import pick_device, solve_translation

COLUMNS = {
    "pa_mpjpe": "PA-MPJPE",
    "pa_mpvpe": "PA-MPVPE",
    "f5": "F@5",
    "f15": "F@15",
    "auc_joints": "AUC J",
    "auc_vertices": "AUC V",
}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` gives for `N` images."""

    joints: NDArray[np.float64]
    """`(N, 21, 3)` metres, camera space."""
    vertices: NDArray[np.float64]
    """`(N, 778, 3)` metres, camera space."""
    scores: dict[str, float] | None
    """As `HandMetrics`; None where the folder has no evaluation annotations."""
    mean_hand_scores: dict[str, float] | None
    """The same for the mean of the training hands, predicted for every image."""

    def record(self) -> dict[str, float]:
        """The scores to keep with a checkpoint: `scores`, `images`, and the mean hand's as `mean_hand_*`."""
        if self.scores is None or self.mean_hand_scores is None:
            return {}
        constant = {f"mean_hand_{name}": value for name, value in self.mean_hand_scores.items()}
        return {"images": float(len(self.joints)), **self.scores, **constant}


def evaluate(
    network: HandNet,
    data: str | os.PathLike[str],
    *,
    device: str = "auto",
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = True,
) -> Evaluation:
    """Reconstruct every evaluation image of a folder in FreiHAND's layout, and score where it is annotated.

    Raises FileNotFoundError or ValueError for a folder that is not FreiHAND's layout (see `FreiHand`).
    """
    dataset = FreiHand(data, "evaluation", CropTransform(network.config.image_size))
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)
    place = pick_device(device)
    network = network.eval().to(place)
    # Each process that evaluates sees every image: there is nothing to gather from others.
    ours, constant = (HandMetrics(sync_on_compute=False) for _ in range(2))
    joints, vertices = [], []
    batches = track(loader, "reconstructing", disable=not progress, console=Console(stderr=True))
    for batch in batches:
        with torch.inference_mode():
            prediction = network(batch["image"].to(place))
        mesh, camera = prediction.meshes[-1].double().cpu(), prediction.camera.double().cpu()
        mesh = mesh + _translations(mesh, camera, batch["K"].double(), network.config.image_size)[:, None]
        regressor = network.joint_regressor.double().cpu()
        vertices.append(mesh)
        joints.append(regressor @ mesh)
        if dataset.annotated:
            truth = batch["joints"], batch["vertices"]
            mean = network.mean_hand.double().cpu().expand_as(mesh)
            ours.update(joints[-1], truth[0], mesh, truth[1])
            constant.update(regressor @ mean, truth[0], mean, truth[1])
    scores, mean_scores = (
        ({name: float(value) for name, value in metrics.compute().items()} for metrics in (ours, constant))
        if dataset.annotated
        else (None, None)
    )
    return Evaluation(torch.cat(joints).numpy(), torch.cat(vertices).numpy(), scores, mean_scores)


def _translations(meshes: Tensor, cameras: Tensor, K: Tensor, size: int) -> Tensor:
    """The root's place `(B, 3)` in camera space at which meshes project best onto their weak projections."""
    pixels = ((project(meshes, cameras) + 1) * size - 1) / 2
    rows = zip(meshes.numpy(), pixels.numpy(), K.numpy(), strict=True)
    return torch.from_numpy(np.stack([solve_translation(mesh, uv, k) for mesh, uv, k in rows]))


def mean_hand(dataset: FreiHand, count: int = 2000, rounds: int = 5) -> Tensor:
    """The Procrustes mean of the first `count` hands of a data set: `(778, 3)` float32 metres about its
    centroid.

    Hands are aligned with scale to the mean so far and averaged, a few times over (Gower, 1975); of all
    constant predictions this is close to the best one under scores that align.
    """
    hands = torch.from_numpy(np.array(dataset.tables["vertices"].rows[:count], dtype=np.float64))
    mean = hands[0] - hands[0].mean(0)
    size = (hands - hands.mean(1, keepdim=True)).flatten(1).norm(dim=1).mean()
    for _ in range(rounds):
        mean = align_with_scale(hands, mean.expand_as(hands), reflection=False).mean(0)
        mean = mean - mean.mean(0)
        mean = mean * (size / mean.norm())
    return mean.float()


def print_scores(evaluation: Evaluation, console: Console | None = None) -> None:
    """A table of the scores, ours beside the mean hand's."""
    table = Table(caption="lengths in mm, after alignment")
    table.add_column(f"{len(evaluation.joints)} images")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    rows = {"network": evaluation.scores, "mean hand": evaluation.mean_hand_scores}
    for label, scores in rows.items():
        if scores is not None:
            places = {name: 2 if name.startswith("pa_") else 3 for name in COLUMNS}
            table.add_row(label, *(f"{scores[name]:.{places[name]}f}" for name in COLUMNS))
    (console or Console()).print(table)
