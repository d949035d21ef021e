"""Batches for training and evaluation: which images a process reads, when, and with which augmentation.

All of this depends only on the seed, the epoch and the step. The number of processes, the number of loader
workers and interruptions do not change the batch of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand, Sample

Batch = dict[str, Any]
"""The output of `CropTransform`, stacked over the images; `name`, the files' names in the data folder;
`unreadable`, one sentence for each image that could not be read; and `replaced`, a bool for each place in the
batch. Training replaces an unreadable image by another one, evaluation by a black one. Empty for no images.
"""

_MAX_UNREADABLE = 100


@runtime_checkable
class Images(Protocol):
    """Training images from a folder (`FolderImages`), from tar shards (`ShardImages`), or your own.

    Your own subclass defines `has_masks`, `__len__`, `vertices` and `__getitem__`. `__getitem__` returns the
    dict that `FreiHand` describes. It raises FileNotFoundError or ValueError, naming the image, if the image
    cannot be read.
    """

    has_masks: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The indices of all images in the order of an epoch: a new permutation, equal in every process."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def vertices(self, count: int) -> npt.NDArray[np.floating]:
        """`(N, 778, 3)` metres: the vertices of up to the first `count` hands."""


class FolderImages(Images):
    """The training images of a folder in FreiHAND's layout."""

    def __init__(self, dataset: FreiHand) -> None:
        self.dataset = dataset
        self.has_masks = dataset.has_masks

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[index]

    def black(self, index: int) -> Sample:
        """Item `index` with a black image. Evaluation uses it if the image cannot be read."""
        sample = self.dataset.record(index)
        sample["image"] = Image.new("RGB", (224, 224))
        if self.dataset.has_masks:
            sample["mask"] = Image.new("L", (224, 224))
        return sample

    def vertices(self, count: int) -> npt.NDArray[np.floating]:
        return np.asarray(self.dataset.tables["vertices"].rows[:count])


class Batches(Dataset[Batch]):
    """Whole batches of transformed images.

    An item's key is an epoch and the indices of its images. `instead(index)` replaces an unreadable image.
    Without it, as in training, the next readable image does; 100 unreadable ones in a row raise ValueError.
    """

    def __init__(
        self, images: Images, transform: CropTransform, instead: Callable[[int], Sample] | None = None
    ) -> None:
        self.images = images
        self.transform = transform
        self.instead = instead

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch:
        epoch, indices = key
        if not indices:
            return {}
        unreadable: list[str] = []
        samples, replaced = [], []
        for index in indices:
            before = len(unreadable)
            samples.append(self._read(index, unreadable))
            replaced.append(len(unreadable) > before)
        batch: Batch = default_collate([self.transform(sample, epoch) for sample in samples])
        names = [sample["name"] for sample in samples]
        return {**batch, "name": names, "unreadable": unreadable, "replaced": replaced}

    def _read(self, index: int, unreadable: list[str]) -> Sample:
        for step in range(_MAX_UNREADABLE):
            try:
                return self.images[(index + step) % len(self.images)]
            except (FileNotFoundError, ValueError) as error:
                unreadable.append(str(error))
                if self.instead is not None:
                    return self.instead(index)
        raise ValueError(f"{_MAX_UNREADABLE} images in a row cannot be read, the last: {unreadable[-1]}")


class TrainingKeys(Sampler[tuple[int, list[int]]]):
    """The keys of one process's batches in an epoch: its part of every global batch. All parts have the same
    size. Images that do not fill a global batch at the end of an epoch are left out.

    Args:
        batch_size: images per step over all processes, a multiple of their number.
        processes: the number of processes.
        rank: returns the number of this process, once known.
        start: the epoch, and the step within it, at which a resumed run starts.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        batch_size: int,
        processes: int = 1,
        rank: Callable[[], int] = lambda: 0,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        self.images, self.seed, self.batch_size = images, seed, batch_size
        self.processes, self.rank = processes, rank
        self.epoch, self.first = start

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch. Lightning sets each one, but sets a resumed run's first only after its start."""
        if epoch != self.epoch:
            self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        order = self.images.order(self.seed, self.epoch)
        share = self.batch_size // self.processes
        for step in range(self.first, len(self)):
            first = step * self.batch_size + self.rank() * share
            yield self.epoch, order[first : first + share].tolist()


class EvaluationKeys(Sampler[tuple[int, list[int]]]):
    """The keys of one process's evaluation batches: every `processes`-th batch, whole. Each image is scored
    once, in the same batch as in a single process. All processes must take the same number of steps, so a
    process with one batch less ends with an empty one.
    """

    def __init__(
        self, count: int, batch_size: int, processes: int = 1, rank: Callable[[], int] = lambda: 0
    ) -> None:
        self.count, self.batch_size = count, batch_size
        self.processes, self.rank = processes, rank

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for step in range(len(self)):
            first = (step * self.processes + self.rank()) * self.batch_size
            yield 0, list(range(first, min(first + self.batch_size, self.count)))


def loader(
    batches: Batches, keys: Sampler[tuple[int, list[int]]], workers: int, pin: bool
) -> DataLoader[Batch]:
    """A loader for the batches of `keys`. `pin` puts them into page-locked memory, for a GPU."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=keys,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators so that a training step's draws depend only on seed, step and process."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint32)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
