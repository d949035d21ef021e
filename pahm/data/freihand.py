"""Data sets in FreiHAND's layout (Zimmermann et al., ICCV 2019): FreiHAND itself, or made by `pahm synth`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch.utils.data import Dataset

from pahm.data.annotations import Table
from pahm.data.open_image import read_image

Split = Literal["training", "evaluation"]
Sample = dict[str, Any]

_SHAPES: dict[str, tuple[int, ...]] = {"K": (3, 3), "scale": (), "xyz": (21, 3), "verts": (778, 3)}
_KEYS = {"K": "K", "scale": "scale", "xyz": "joints", "verts": "vertices"}


class FreiHand(Dataset[Sample]):
    """Samples of one split of a folder in FreiHAND's layout.

    The folder has `training/rgb/%08d.jpg`, `training/mask/%08d.jpg` and `training_{K,scale,xyz,verts}.json`,
    and the same with `evaluation`. Masks are optional (FreiHAND has none for evaluation), and so are
    evaluation's xyz and verts (published in 2022). Each split works without the other. Other files in the
    folder are ignored.
    An annotation can have several images. FreiHAND shows each of 32,560 poses on 4 backgrounds: image i has
    annotation and mask i % 32560.

    Item i is a dict: `image` PIL RGB; `mask` PIL L, if the split has masks; `K` (3, 3), intrinsics in pixels;
    `joints` (21, 3) and `vertices` (778, 3), metres in camera space, if annotated; `scale`, the length of
    the middle finger's proximal bone in metres; all float32 numpy; `index` int; `name`, the image's path
    inside the folder. With `transform`, the item is the transformed dict.

    Annotations are parsed once and cached as `.npy` next to the JSON files (see `Table`).

    Raises FileNotFoundError naming the missing file or folder, ValueError for an unknown split or for
    annotation files that do not match each other or the images, IndexError for an index out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Split = "training",
        transform: Callable[[Sample], Sample] | None = None,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
        self.root = Path(root)
        self.split = split
        self.transform = transform
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: {self.root} is not a folder")
        optional = split == "evaluation"
        self._require(folder := self.root / split / "rgb", folder.is_dir())
        paths = {name: self.root / f"{split}_{name}.json" for name in _SHAPES}
        for name, path in paths.items():
            if path.exists() or not (optional and name in ("xyz", "verts")):
                self._require(path, path.is_file())
        self.tables = {
            _KEYS[name]: Table(path, _SHAPES[name]) for name, path in paths.items() if path.exists()
        }
        counts = {table.path.name: len(table) for table in self.tables.values()}
        if len(set(counts.values())) != 1:
            listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(f"{self.root}: the annotation files differ in their number of records: {listed}")
        self.annotations = next(iter(counts.values()))
        self.images = self._count("rgb")
        if self.annotations == 0 or self.images == 0 or self.images % self.annotations:
            raise ValueError(
                f"{self.root}: {split}/rgb has {self.images} images for the {self.annotations} records of "
                f"{split}_K.json, expected a positive multiple"
            )
        # A camera without a focal length has no rays and would fail far from here.
        bad = np.flatnonzero((self.tables["K"].rows[:, (0, 1), (0, 1)] <= 0).any(1))
        if len(bad):
            fx, fy = np.diag(self.tables["K"][bad[0]])[:2]
            raise ValueError(
                f"{paths['K']}: record {bad[0]} has focal lengths {fx:g} and {fy:g}, expected positive ones"
            )
        self.has_masks = (self.root / split / "mask").is_dir()
        if self.has_masks and (masks := self._count("mask")) < self.annotations:
            raise ValueError(
                f"{self.root}: {split}/mask has {masks} masks for the {self.annotations} records of "
                f"{split}_K.json"
            )

    @property
    def annotated(self) -> bool:
        """Whether the split has joints and vertices."""
        return "joints" in self.tables and "vertices" in self.tables

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        sample = self.record(index)
        sample["image"] = read_image(self.root / sample["name"])
        if self.has_masks:
            row = sample["index"] % self.annotations
            sample["mask"] = read_image(self.root / self.split / "mask" / f"{row:08d}.jpg", "L")
        return sample if self.transform is None else self.transform(sample)

    def record(self, index: int) -> Sample:
        """Item `index`, untransformed and without image and mask, which are not read.

        Raises IndexError for an index out of range.
        """
        if not -self.images <= index < self.images:
            raise IndexError(f"index: {index} is out of range for {self.images} images")
        index %= self.images
        sample: Sample = {"index": index, "name": f"{self.split}/rgb/{index:08d}.jpg"}
        return sample | {key: table[index % self.annotations] for key, table in self.tables.items()}

    def _require(self, path: Path, there: bool) -> None:
        if not there:
            relative = path.relative_to(self.root)
            raise FileNotFoundError(f"root: {self.root} is not in FreiHAND's layout, {relative} is missing")

    def _count(self, kind: str) -> int:
        """Count the files 00000000.jpg, 00000001.jpg, ... in a folder of the split. Gaps are not allowed."""
        folder = self.root / self.split / kind
        names = {name for name in os.listdir(folder) if len(name) == 12 and name.endswith(".jpg")}
        for index in range(len(names)):
            if (name := f"{index:08d}.jpg") not in names:
                raise FileNotFoundError(f"{folder / name} is missing, though later images exist")
        return len(names)
