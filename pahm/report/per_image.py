"""Scores of a network on each evaluation image, and what makes each image hard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

from pahm.data.camera import Array
from pahm.data.freihand import FreiHand, Sample
from pahm.model.network import HandNet
from pahm.score.evaluation import folder_hands, mean_hand_of
from pahm.score.failures import Reasons, find_reasons
from pahm.score.metrics import HandMetrics, procrustes_errors

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """Scores of a network, or of a constant hand, on N images."""

    summary: dict[str, float]
    """The scores of `HandMetrics`."""
    joints: npt.NDArray[np.float64]
    """`(N,)` PA-MPJPE of each image, mm."""
    vertices: npt.NDArray[np.float64]
    """`(N,)` PA-MPVPE of each image, mm."""


class _Tally:
    def __init__(self) -> None:
        self.metrics = HandMetrics(sync_on_compute=False)
        self.joints: list[float] = []
        self.vertices: list[float] = []

    def add(self, joints: Array, vertices: Array, truth: Sample) -> None:
        pairs = [(joints, truth["joints"]), (vertices, truth["vertices"])]
        tensors = [tuple(torch.from_numpy(points)[None] for points in pair) for pair in pairs]
        self.metrics.update(*tensors[0], *tensors[1])
        for errors, (found, true) in zip((self.joints, self.vertices), tensors, strict=True):
            errors.append(1000 * float(procrustes_errors(found, true).mean()))

    def result(self) -> Scored:
        summary = {name: float(value) for name, value in self.metrics.compute().items()}
        return Scored(summary, np.array(self.joints), np.array(self.vertices))


def annotated(data: str, transform: Callable[[Sample], Sample] | None = None) -> FreiHand:
    """The evaluation images of a folder in FreiHAND's layout, with their ground truth.

    Raises ValueError if they have no annotations, and as `FreiHand`.
    """
    dataset = FreiHand(data, "evaluation", transform)
    if not dataset.annotated:
        raise ValueError(
            f"--data: {data} has no evaluation_xyz.json and evaluation_verts.json, expected the truth of "
            "its evaluation images to compare with"
        )
    return dataset


def find_readable(data: str, images: int, *, progress: bool = True) -> tuple[list[int], dict[str, str]]:
    """Sort the first `images` evaluation images of a folder into readable and unreadable ones.

    Returns the indices of the readable images, and for each other image, by its path inside the folder, a
    sentence that names the file. If the folder has masks, a readable image needs a readable mask. Raises as
    `annotated`, and ValueError if none can be read.
    """
    dataset = annotated(data)
    readable: list[int] = []
    errors: dict[str, str] = {}
    for i in _track(range(images), "reading", progress):
        try:
            dataset[i]
            readable.append(i)
        except (FileNotFoundError, ValueError) as error:
            errors[dataset.record(i)["name"]] = str(error)
    if not readable:
        first = next(iter(errors.values()))
        raise ValueError(f"--data: none of the {images} evaluation images of {data} can be read: {first}")
    return readable, errors


def score(
    network: HandNet, data: str, images: Sequence[int], *, device: str = "auto", progress: bool = True
) -> tuple[Scored, Scored]:
    """Score a network and its mean hand on a folder's evaluation images with these indices.

    Raises as `FreiHand` and `annotated`; ValueError or FileNotFoundError for an unreadable image,
    FloatingPointError if the network's output is not finite.
    """
    dataset = annotated(data)
    ours, constant = _Tally(), _Tally()
    mean_joints, mean = (points.numpy() for points in mean_hand_of(network))
    hands = folder_hands(network, dataset, images, device=device, batch_size=32, progress=progress)
    for index, hand in zip(images, hands, strict=True):
        if isinstance(hand, Exception):
            raise hand
        truth = dataset.record(index)
        ours.add(hand.joints, hand.vertices, truth)
        constant.add(mean_joints, mean, truth)
    return ours.result(), constant.result()


def reasons_of(
    data: str, images: Sequence[int], faces: npt.ArrayLike, share: float = 1.0, *, progress: bool = True
) -> list[Reasons]:
    """Apply `find_reasons` to a folder's evaluation images with these indices.

    faces: (F, 3) of the meshes. share: the fraction that the network sees, `ModelConfig.crop`.
    """

    def measure(sample: Sample) -> Sample:
        return {"reasons": find_reasons(sample, faces, share)}

    dataset = annotated(data, measure)
    # No worker processes, because Embree's threads do not survive a fork.
    return [dataset[i]["reasons"] for i in _track(images, "looking for reasons", progress)]


def _track(items: Iterable[T], title: str, progress: bool) -> Iterable[T]:
    return track(items, title, disable=not progress, console=Console(stderr=True))
