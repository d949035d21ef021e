"""Mesh hierarchies that other projects have saved."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pahm_ops.mesh._checks import as_faces, as_vertices
from pahm_ops.mesh.pickles import load_arrays, to_array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_KEYS = ("vertices", "face", "down_transform", "up_transform")


class Transforms(NamedTuple):
    """A mesh's levels and the matrices between them, finest first, under `MeshHierarchy`'s names.

    The matrices are as the file has them: rows of `up` need not sum to 1, and may hold zeros and negative
    weights.
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

    The pickle is read by an unpickler that admits numpy's and scipy.sparse's classes alone, so that no code
    in it runs. `adj` is not used: it follows from the faces.

    Returns:
        `Transforms`; its matrices go to `MeshPool`, its faces to `spiral_indices`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a pickle of arrays, one that asks for another class (it is named), a missing key, or
            levels and matrices whose sizes do not fit each other.
        IndexError: a face names a vertex that its level does not have.
    """
    content = load_arrays(path)
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: a file of transforms has {', '.join(_KEYS)}")
    lists = {key: _as_list(f"{key} in {path}", content[key]) for key in _KEYS}
    count = len(lists["vertices"])
    expected = dict(zip(_KEYS, (count, count, count - 1, count - 1), strict=True))
    for key, values in lists.items():
        if len(values) != expected[key]:
            raise ValueError(
                f"{key} in {path} must have {expected[key]} entries for {count} levels, got {len(values)}"
            )
    vertices = [as_vertices(to_array("vertices", v)) for v in lists["vertices"]]
    faces = [
        as_faces(to_array("face", f).astype(np.int64), len(v))
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


def _as_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return list(value)
    raise ValueError(f"{name} must be a list with an entry a level, got {type(value).__name__}")


def _matrix(name: str, value: Any, shape: tuple[int, int]) -> csr_matrix:
    from scipy.sparse import csr_matrix, issparse

    if not issparse(value):
        raise ValueError(f"{name} must be a scipy.sparse matrix, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape} as the levels have it, got {value.shape}")
    matrix = csr_matrix(value)
    try:
        matrix.check_format(full_check=True)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} is not a valid matrix: {error}") from error
    return matrix
