"""Scores of a network on a data set's evaluation images, next to those of a constant prediction."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from pahm.data.crop import Request
from pahm.data.freihand import FreiHand
from pahm.hand.left import checked_left, mirror
from pahm.hand.topology import HandTopology
from pahm.infer.hand import Hand
from pahm.infer.predictor import Predictor
from pahm.infer.reconstruct import READERS, reconstruct_all
from pahm.model.network import HandNet
from pahm.score.metrics import HandMetrics, align_with_scale

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
    """The output of `reconstruct_folder` for `N` images."""

    joints: NDArray[np.float64]
    """`(N, 21, 3)` metres, camera space."""
    vertices: NDArray[np.float64]
    """`(N, 778, 3)` metres, camera space."""
    unreadable: tuple[str, ...]
    """One sentence for each unreadable image, naming the file."""


@dataclass(frozen=True)
class Evaluation:
    """The output of `evaluate` for `N` images."""

    joints: NDArray[np.float64]
    """`(N, 21, 3)` metres, camera space."""
    vertices: NDArray[np.float64]
    """`(N, 778, 3)` metres, camera space."""
    scores: dict[str, float] | None
    """The scores of `HandMetrics`; None if the folder has no evaluation annotations."""
    mean_hand_scores: dict[str, float] | None
    """The same scores if the mean training hand is predicted for every image."""

    def record(self) -> dict[str, float]:
        """The scores to keep with a checkpoint: `scores`, `images`, and the mean hand's as `mean_hand_*`."""
        if self.scores is None or self.mean_hand_scores is None:
            return {}
        constant = {f"mean_hand_{name}": value for name, value in self.mean_hand_scores.items()}
        return {"images": float(len(self.joints)), **self.scores, **constant}


def folder_hands(
    network: HandNet,
    dataset: FreiHand,
    images: Sequence[int],
    *,
    use_scale: bool = False,
    left: bool = False,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    readers: int = READERS,
    progress: bool = True,
) -> Generator[Hand | ValueError | FileNotFoundError, None, None]:
    """Reconstruct the hands in the images with these indices; yields an error for an unreadable image.

    use_scale, left: see `reconstruct_folder`. readers: threads that read and crop images.

    Raises FloatingPointError if the network's output is not finite.
    """
    engine = Predictor(network, device).engine
    records = (dataset.record(index) for index in images)
    requests = (
        Request(
            dataset.root / record["name"],
            intrinsics=record["K"],
            left=left,
            upright=False,
            bone=float(record["scale"]) if use_scale else None,
        )
        for record in records
    )
    pairs = reconstruct_all(engine, requests, batch_size, readers)
    console = Console(stderr=True)
    for _, hand in track(pairs, "reconstructing", len(images), disable=not progress, console=console):
        if isinstance(hand, FloatingPointError):
            raise hand
        yield hand  # type: ignore[misc]


def reconstruct_folder(
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

    Hands are placed as in `pahm.infer.reconstruct.reconstruct`.

    Args:
        use_scale: scale each hand so that the middle finger's proximal bone, between joints 9 and 10, has the
            length in `evaluation_scale.json`. FreiHAND provides it at test time because an image alone does
            not determine size and distance.
        left: the images show left hands; see `Predictor.predict`.
        strict: raise for the first unreadable image. Otherwise the image is named on standard error, and its
            hand is the network's mean hand at the median place of the others, since a submission needs a hand
            for every image.
        workers: threads that read and crop images, at least one.

    Raises FileNotFoundError or ValueError for a folder that is not in FreiHAND's layout (see `FreiHand`),
    ValueError for a scale that is not positive or if no image can be read; FloatingPointError if the
    network's output is not finite.
    """
    dataset = FreiHand(data, "evaluation")
    scales = dataset.tables["scale"]
    if use_scale and (scales.rows <= 0).any():
        row = int(np.argmax(scales.rows <= 0))
        raise ValueError(f"{scales.path}: record {row} is {scales[row]:g}, expected a positive length")
    left = checked_left(left)
    joints, vertices = np.zeros((len(dataset), 21, 3)), np.zeros((len(dataset), 778, 3))
    errors: dict[int, str] = {}
    found = folder_hands(
        network,
        dataset,
        range(len(dataset)),
        use_scale=use_scale,
        left=left,
        device=device,
        batch_size=batch_size,
        readers=workers,
        progress=progress,
    )
    with closing(found) as hands:  # ends the progress bar before an error is printed
        for index, hand in enumerate(hands):
            if isinstance(hand, Hand):
                joints[index], vertices[index] = hand.joints, hand.vertices
            elif strict:
                raise ValueError(str(hand))
            else:
                errors[index] = str(hand)
    if errors:
        readable = np.setdiff1d(np.arange(len(dataset)), list(errors))
        if len(readable) == 0:
            raise ValueError(f"{dataset.root}: none of the evaluation images can be read: {errors[0]}")
        place = np.median(joints[readable, network.config.root_joint], axis=0)
        mean_joints, mean = (points.numpy() for points in mean_hand_of(network, left))
        for index in errors:
            size = 1.0
            if use_scale:
                bone = np.linalg.norm(mean_joints[9] - mean_joints[10])
                size = float(dataset.record(index)["scale"] / bone)
            shift = place - size * mean_joints[network.config.root_joint]
            joints[index], vertices[index] = size * mean_joints + shift, size * mean + shift
        _report(errors, len(dataset))
    return Reconstruction(joints, vertices, tuple(errors.values()))


def mean_hand_of(network: HandNet, left: bool = False) -> tuple[Tensor, Tensor]:
    """Joints (21, 3) and vertices (778, 3) of the mean training hand, float64 on the CPU, metres."""
    vertices = network.mean_hand.cpu().double()
    vertices = mirror(vertices) if left else vertices
    return network.joint_regressor.cpu().double() @ vertices, vertices


def check_meshes(dataset: FreiHand, topology: HandTopology) -> None:
    """Raise ValueError if the split is annotated with meshes of a hand other than `topology`."""
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
    """Reconstruct every evaluation image of a folder in FreiHAND's layout, and score it if it is annotated.

    The scores are relative and come with the mean hand's. The hands keep the size that the network
    predicts. See `reconstruct_folder` for `left`, `strict`, `workers` and errors. Also raises ValueError for
    annotations with the mesh of another hand.
    """
    dataset = FreiHand(data, "evaluation")
    if dataset.annotated:
        check_meshes(dataset, network.topology)
    hands = reconstruct_folder(
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
    mean_joints, mean = mean_hand_of(network, checked_left(left))
    # Each evaluating process sees every image, so there is nothing to gather.
    ours, constant = (HandMetrics(sync_on_compute=False) for _ in range(2))
    for rows in np.split(np.arange(len(dataset)), range(batch_size, len(dataset), batch_size)):
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
    """Name and count the unreadable images on standard error."""
    for sentence in errors.values():
        print(sentence, file=sys.stderr)
    count = f"{len(errors)} of {images} images"
    print(f"{count} cannot be read: the mean hand stands for them", file=sys.stderr)


def mean_hand(vertices: NDArray[np.floating], rounds: int = 5) -> Tensor:
    """The Procrustes mean of hands `(N, 778, 3)`: `(778, 3)` float32, centred at its centroid, same unit.

    Hands are aligned with scale to the current mean and averaged, several times (Gower, 1975). This is close
    to the best constant prediction for scores with alignment.
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
    """Print a table of the scores, with the mean hand's next to ours."""
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
