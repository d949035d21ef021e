"""The checks that all table builders apply to their arguments, and the search for the compiled module."""

import importlib
import importlib.util
import operator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_INDEX_LIMIT = 2**31 - 1


def compiled_tables() -> ModuleType | None:
    """The compiled module, or None if nothing was compiled. Raises if the module exists but does not load."""
    if importlib.util.find_spec("pahm_ops.mesh._tables") is None:
        return None
    return importlib.import_module("pahm_ops.mesh._tables")


def as_vertices(vertices: ArrayLike) -> NDArray[np.float64]:
    """Finite real vertices of shape (N, 3), as contiguous float64."""
    array = np.asarray(vertices)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"vertices must be real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"vertices must have shape (N, 3), got {array.shape}")
    with np.errstate(invalid="ignore"):  # Signalling NaNs are rejected below, without a warning.
        array = np.ascontiguousarray(array, dtype=np.float64)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"vertices must be finite, got {array[row].tolist()} at vertex {row}")
    return array


def as_faces(faces: ArrayLike, vertex_count: int | None) -> NDArray[np.int64]:
    """Faces of shape (F, 3), as contiguous int64, indexing vertex_count vertices (None: any number)."""
    array = np.asarray(faces)
    if array.dtype.kind not in "iu":
        raise TypeError(f"faces must be integers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"faces must have shape (F, 3), got {array.shape}")
    limit = _INDEX_LIMIT if vertex_count is None else min(vertex_count, _INDEX_LIMIT)
    wrong = ((array < 0) | (array >= limit)).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        vertices = f"the {limit} vertices" if vertex_count is not None else "fewer than 2^31 vertices"
        raise IndexError(f"faces must index {vertices} from 0, got face {row} = {tuple(array[row].tolist())}")
    return np.ascontiguousarray(array, dtype=np.int64)


def as_count(value: Any, name: str) -> int:
    """`value` as a whole number of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}") from None
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count
