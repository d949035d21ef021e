"""Reading mesh hierarchies that other projects have saved."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pahm_ops.mesh._checks import as_faces, as_vertices
from pahm_ops.mesh.pickles import load_arrays, to_array, to_entries, to_integers, to_list

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_KEYS = ("vertices", "face", "down_transform", "up_transform")
_MOST_LEVELS = 16
_LARGEST_WEIGHT = 1e12


class Transforms(NamedTuple):
    """A mesh's levels and the matrices between them, finest first, with `MeshHierarchy`'s names.

    The matrices are as in the file: rows of `up` need not sum to 1, and may hold zeros and negative weights.
    """

    vertices: list[NDArray[np.float64]]
    """For each level s, (N_s, 3) float64, in the file's unit."""
    faces: list[NDArray[np.int64]]
    """For each level, (F_s, 3) int64."""
    down: list[csr_matrix]
    """For each level but the last, (N_{s+1}, N_s)."""
    up: list[csr_matrix]
    """For each level but the last, (N_s, N_{s+1})."""


def load_transforms(path: str | PathLike[str]) -> Transforms:
    """Read the `transform.pkl` of SpiralNet++, CMR, MobRecon (HandMesh) and of CoMA's mesh sampling.

    Nothing in the pickle is run: it is read into inert records, which become arrays and matrices after their
    numbers were checked. `adj` is not used, because it follows from the faces.

    Returns:
        `Transforms`. Pass its matrices to `MeshPool` and its faces to `spiral_indices`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a pickle of arrays, a pickle that asks for another class (which is named), a missing
            key, numbers that are not finite, weights of 1e12 or more, or levels and matrices whose sizes do
            not fit together.
        IndexError: a face refers to a vertex that its level does not have.
    """
    content = load_arrays(path)
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: a file of transforms has {', '.join(_KEYS)}")
    lists = {key: to_list(f"{key} in {path}", content[key]) for key in _KEYS}
    count = len(lists["vertices"])
    if not 1 <= count <= _MOST_LEVELS:
        raise ValueError(f"vertices in {path} must have from 1 to {_MOST_LEVELS} levels, got {count}")
    expected = dict(zip(_KEYS, (count, count, count - 1, count - 1), strict=True))
    for key, values in lists.items():
        if len(values) != expected[key]:
            raise ValueError(
                f"{key} in {path} must have {expected[key]} entries for {count} levels, got {len(values)}"
            )
        # If one array stood for many, they would need more memory than the file suggests.
        if len({id(value) for value in values}) < len(values):
            raise ValueError(f"{key} in {path} must have an array of its own for each level")
    vertices = [as_vertices(to_array(f"vertices in {path}", v)) for v in lists["vertices"]]
    faces = [
        as_faces(to_integers(f"face in {path}", f), len(v))
        for f, v in zip(lists["face"], vertices, strict=True)
    ]
    sizes = [len(v) for v in vertices]
    down = [
        _matrix(f"down_transform[{s}] in {path}", m, (sizes[s + 1], sizes[s]))
        for s, m in enumerate(lists["down_transform"])
    ]
    up = [
        _matrix(f"up_transform[{s}] in {path}", m, (sizes[s], sizes[s + 1]))
        for s, m in enumerate(lists["up_transform"])
    ]
    return Transforms(vertices, faces, down, up)


def _matrix(name: str, value: Any, shape: tuple[int, int]) -> csr_matrix:
    from scipy.sparse import csr_matrix

    found = to_entries(name, value, shape)
    largest = np.abs(found.values).max(initial=0)
    if not largest < _LARGEST_WEIGHT:  # also true for NaN
        raise ValueError(f"{name} must have finite weights below {_LARGEST_WEIGHT:g}, got {largest:g}")
    return csr_matrix((found.values, (found.rows, found.columns)), shape=shape)
