"""Scores of a network on a data set's evaluation images, beside those of a constant prediction."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pahm.config import ModelConfig
from pahm.data.augment import CropTransform
from pahm.data.camera import solve_translation
from pahm.data.freihand import FreiHand
from pahm.data.open_image import read_image
from pahm.hand.left import checked_left, mirror, mirror_intrinsics
from pahm.hand.topology import HandTopology
from pahm.infer.predictor import pick_device
from pahm.model.network import HandNet
from pahm.score.metrics import HandMetrics, align_with_scale
from pahm.train.losses import project

COLUMNS = {
    "pa_mpjpe": "PA-MPJPE",
    "pa_mpvpe": "PA-MPVPE",
    "f5": "F@5",
    "f15": "F@15",
    "auc_joints": "AUC J",
    "auc_vertices": "AUC V",
}


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` gives for `N` images."""

    joints: NDArray[np.float64]
    """`(N, 21, 3)` metres, camera space."""
    vertices: NDArray[np.float64]
    """`(N, 778, 3)` metres, camera space."""
    unreadable: tuple[str, ...]
    """For each image that could not be read one sentence that names the file."""


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


class _Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Evaluation images as crops with K, scale and `error`, a sentence where the image cannot be read.

    The image is blank then; an exception in a worker would come out as pages of its traceback.
    """

    def __init__(self, dataset: FreiHand, config: ModelConfig, left: bool) -> None:
        self.dataset, self.left = dataset, left
        self.crop = CropTransform(config.image_size, share=config.crop)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.dataset.record(index)
        sample = {key: record[key] for key in ("K", "scale", "index")}
        error = ""
        try:
            image = read_image(self.dataset.root / record["name"])
        except (FileNotFoundError, ValueError) as caught:
            image, error = Image.new("RGB", (self.crop.size, self.crop.size)), str(caught)
        if self.left:
            # As in `Predictor`: the mirrored image, seen through the mirrored camera.
            sample["K"] = mirror_intrinsics(sample["K"], image.width)
            image = ImageOps.mirror(image)
        return self.crop(sample | {"image": image}) | {"error": error}


def reconstruct(
    network: HandNet,
    data: str | os.PathLike[str],
    *,
    use_scale: bool = True,
    left: bool = False,
    strict: bool = False,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = True,
) -> Reconstruction:
    """Reconstruct every evaluation image of a folder in FreiHAND's layout, in camera space.

    The network's mesh is relative to its root joint, and its translation is solved as in `Predictor`.

    Args:
        use_scale: first multiply the mesh so that the middle finger's proximal bone, between joints 9 and
            10, has the length that `evaluation_scale.json` gives. FreiHAND gives it at test time, since an
            image alone leaves size and distance open.
        left: the images show left hands; see `Predictor.predict`.
        strict: an image that cannot be read ends the reconstruction. Otherwise its hand is the network's
            mean hand in the median place of the others, and it is named on standard error, since a
            submission needs a hand for every image.

    Raises FileNotFoundError or ValueError for a folder that is not FreiHAND's layout (see `FreiHand`),
    ValueError for a scale that is not positive, with `strict` for the first image that cannot be read, and
    where none can; FloatingPointError where the network's output is not finite.
    """
    dataset = FreiHand(data, "evaluation")
    scales = dataset.tables["scale"]
    if use_scale and (scales.rows <= 0).any():
        row = int(np.argmax(scales.rows <= 0))
        raise ValueError(f"{scales.path}: record {row} is {scales[row]:g}, expected a positive length")
    left = checked_left(left)
    place = pick_device(device)
    network = network.eval().to(place)
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    regressor = network.joint_regressor.double().cpu()
    images = _Images(dataset, network.config, left)
    loader = torch.utils.data.DataLoader(images, batch_size, num_workers=workers)
    relatives, places = [], []
    errors: dict[int, str] = {}
    for batch in track(loader, "reconstructing", disable=not progress, console=Console(stderr=True)):
        with torch.inference_mode():
            prediction = network(batch["image"].to(place, dtype))
        mesh, camera = prediction.meshes[-1].double().cpu(), prediction.camera.double().cpu()
        wrong = ~(mesh.isfinite().flatten(1).all(1) & camera.isfinite().all(1))
        if wrong.any():
            name = dataset.record(int(batch["index"][wrong][0]))["name"]
            raise FloatingPointError(f"{dataset.root / name}: the network's output is not finite")
        errors |= {int(i): text for i, text in zip(batch["index"], batch["error"], strict=True) if text}
        if strict and errors:
            raise ValueError(next(iter(errors.values())))
        pixels = ((project(mesh, camera) + 1) * network.config.image_size - 1) / 2
        failed = torch.tensor([bool(text) for text in batch["error"]])
        mesh = torch.where(failed[:, None, None], network.mean_hand.double().cpu(), mesh)
        if use_scale:
            joints = regressor @ mesh
            bones = torch.linalg.vector_norm(joints[:, 9] - joints[:, 10], dim=1)
            mesh = mesh * (batch["scale"].double() / bones)[:, None, None]
        relatives.append(mesh)
        places.append(_translations(mesh, pixels, batch["K"].double()))
    vertices, translations = torch.cat(relatives), torch.cat(places)
    if errors:
        readable = np.setdiff1d(np.arange(len(vertices)), list(errors))
        if len(readable) == 0:
            raise ValueError(f"{dataset.root}: none of the evaluation images can be read: {errors[0]}")
        roots = regressor[network.config.root_joint] @ vertices
        found = (roots + translations)[readable].quantile(0.5, dim=0)
        translations[list(errors)] = found - roots[list(errors)]
        _report(errors, len(vertices))
    vertices = vertices + translations[:, None]
    if left:
        vertices = mirror(vertices)
    return Reconstruction((regressor @ vertices).numpy(), vertices.numpy(), tuple(errors.values()))


def check_meshes(dataset: FreiHand, topology: HandTopology) -> None:
    """Refuse an annotated split whose meshes are another hand's than `topology`: ValueError."""
    joints, mesh = (dataset.tables[key].rows[0] for key in ("joints", "vertices"))
    topology.check_joints(mesh, joints, f"data: {dataset.root}")


def evaluate(
    network: HandNet,
    data: str | os.PathLike[str],
    *,
    left: bool = False,
    strict: bool = False,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = True,
) -> Evaluation:
    """Reconstruct every evaluation image of a folder in FreiHAND's layout, and score where it is annotated.

    The scores are relative ones beside the mean hand's, and the sizes of the hands are the network's own.
    For `left`, `strict` and what is raised see `reconstruct`; ValueError also for annotations with the mesh
    of another hand.
    """
    dataset = FreiHand(data, "evaluation")
    if dataset.annotated:
        check_meshes(dataset, network.topology)
    hands = reconstruct(
        network,
        data,
        use_scale=False,
        left=left,
        strict=strict,
        device=device,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    )
    if not dataset.annotated:
        return Evaluation(hands.joints, hands.vertices, None, None)
    mean = network.mean_hand.double().cpu()[None]
    mean = mirror(mean) if left else mean
    mean_joints = network.joint_regressor.double().cpu() @ mean
    # Each process that evaluates sees every image: there is nothing to gather from others.
    ours, constant = (HandMetrics(sync_on_compute=False) for _ in range(2))
    for rows in torch.arange(len(dataset)).split(batch_size):
        truth = [
            torch.from_numpy(dataset.tables[key].rows[rows % dataset.annotations])
            for key in ("joints", "vertices")
        ]
        joints, mesh = (torch.from_numpy(points[rows]) for points in (hands.joints, hands.vertices))
        ours.update(joints, truth[0], mesh, truth[1])
        constant.update(mean_joints.expand_as(joints), truth[0], mean.expand_as(mesh), truth[1])
    scores, mean_scores = (
        {name: float(value) for name, value in metrics.compute().items()} for metrics in (ours, constant)
    )
    return Evaluation(hands.joints, hands.vertices, scores, mean_scores)


def _report(errors: dict[int, str], images: int) -> None:
    """Name the images that could not be read, and say how many there are, on standard error."""
    for sentence in errors.values():
        print(sentence, file=sys.stderr)
    count = f"{len(errors)} of {images} images"
    print(f"{count} cannot be read: the mean hand stands for them", file=sys.stderr)


def _translations(meshes: Tensor, pixels: Tensor, K: Tensor) -> Tensor:
    """The root's place `(B, 3)` in camera space at which meshes project best onto pixels `(B, N, 2)`."""
    rows = zip(meshes.numpy(), pixels.numpy(), K.numpy(), strict=True)
    return torch.from_numpy(np.stack([solve_translation(mesh, uv, k) for mesh, uv, k in rows]))


def mean_hand(vertices: NDArray[np.floating], rounds: int = 5) -> Tensor:
    """The Procrustes mean of hands `(N, 778, 3)`: `(778, 3)` float32 about its centroid, in the same unit.

    Hands are aligned with scale to the mean so far and averaged, a few times over (Gower, 1975); of all
    constant predictions this is close to the best one under scores that align.
    """
    hands = torch.from_numpy(np.array(vertices, dtype=np.float64))
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
