"""The entries of a sparse matrix, taken from its parts after every number was checked.

scipy's compiled routines trust the indices of a matrix, so this module calls none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE_LIMIT = 2**26
"""The most rows or columns of a matrix; some forms can claim any number of them in a few bytes."""

_LARGEST = 2**31 - 1


class Entries(NamedTuple):
    """A real matrix as its entries, in any order; entries at the same place add up."""

    shape: tuple[int, int]
    """(M, N)."""
    rows: NDArray[np.int64]
    """(E,), each in [0, M)."""
    columns: NDArray[np.int64]
    """(E,), each in [0, N)."""
    values: NDArray[Any]
    """(E,) floats, integers or booleans in native byte order; floats are float32 or float64."""


def scipy_entries(matrix: Any, name: str = "transform") -> Entries:
    """The entries of a scipy sparse matrix or array of any format.

    Raises:
        TypeError: the matrix is complex or holds objects.
        ValueError: it does not have two dimensions, or its parts do not fit together.
        IndexError: an entry lies outside the matrix.
    """
    if matrix.format == "dok":
        parts = {"items": list(matrix.items())}
    else:
        coordinates = ("coords",) if hasattr(matrix, "coords") else ("row", "col")
        names = {"coo": coordinates, "dia": ("offsets",), "lil": ("rows",)}.get(
            matrix.format, ("indices", "indptr")
        )
        parts = {part: getattr(matrix, part) for part in ("data", *names) if hasattr(matrix, part)}
    return entries(matrix.format, parts, matrix.shape, name)


def entries(form: str, parts: Mapping[str, Any], shape: Any, name: str = "transform") -> Entries:
    """The entries of a matrix (M, N) that is stored in one of scipy's forms.

    Args:
        form: csr, csc, bsr, coo, dia, lil or dok.
        parts: what scipy stores for that form, by scipy's names: arrays of numbers; for lil ``rows`` and
            ``data`` as sequences of lists; for dok ``items`` as pairs of (row, column) and value.
        shape: (M, N), each at most `SIDE_LIMIT`.
        name: the name of the matrix in messages.

    Raises as `scipy_entries` does.
    """
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(f"{name} must be a matrix (M, N), got shape {str(shape)[:80]}")
    if not all(isinstance(n, (int, np.integer)) and 0 <= n <= SIDE_LIMIT for n in shape):
        raise ValueError(f"{name} must have sides from 0 to 2^26, got shape {str(shape)[:80]}")
    size = int(shape[0]), int(shape[1])
    if form not in _FORMS:
        raise ValueError(f"{name} must be of a form among {', '.join(_FORMS)}, got {str(form)[:20]!r}")
    try:
        rows, columns, values = _FORMS[form](parts, size)
    except KeyError as error:
        raise ValueError(f"{name} lacks its {error}") from None
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name} is not a valid {form} matrix: {error}") from None
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be real, got values of {values.dtype}")
    for axis, index, limit in (("row", rows, size[0]), ("column", columns, size[1])):
        if index.size and (index.min() < 0 or index.max() >= limit):
            raise IndexError(f"{name} of shape {size} has an entry outside its {limit} {axis}s")
    if values.dtype.kind == "f" and values.dtype.itemsize not in (4, 8):
        values = values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    return Entries(size, rows, columns, values.astype(values.dtype.newbyteorder("="), copy=False))


def real_numbers(numbers: Sequence[Any]) -> NDArray[Any]:
    """An array (len(numbers),) from Python's or numpy's real numbers; TypeError or ValueError for others."""

    def checked(number: Any) -> Any:
        if not isinstance(number, (int, float, np.bool_, np.integer, np.floating)):
            raise TypeError(f"its values must be real numbers, got {type(number).__name__}")
        if isinstance(number, int) and number.bit_length() > 63:
            if number.bit_length() > 64:
                raise ValueError("its values must be below 2^64")
            return float(number)
        return number

    return np.array([checked(number) for number in numbers]) if numbers else np.zeros(0)


def _check_compressed(
    pointers: NDArray[np.int64], indices: NDArray[np.int64], values: NDArray[Any], rows: int
) -> None:
    """Raises ValueError unless the parts of a CSR matrix fit together; does not check the range of indices.

    pointers (rows + 1,), ascending from 0 to at most E, with repeats; indices (E,); values (E, ...).
    """
    if len(indices) != len(values):
        raise ValueError(f"it has {len(indices)} indices for {len(values)} values")
    if len(pointers) != rows + 1:
        raise ValueError(f"it has {len(pointers)} pointers, expected {rows + 1}")
    if pointers[0] != 0 or (pointers[1:] < pointers[:-1]).any() or pointers[-1] > len(indices):
        raise ValueError(f"its pointers must rise from 0 to at most {len(indices)}")


_Triple = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]


def _array(parts: Mapping[str, Any], part: str, ndim: int = 1) -> NDArray[Any]:
    value = parts[part]
    if not isinstance(value, np.ndarray) or value.ndim != ndim:
        shape = f"shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"its {part} must be an array of {ndim} dimensions, got {shape}")
    return np.asarray(value)


def _indices(parts: Mapping[str, Any], part: str) -> NDArray[np.int64]:
    value = _array(parts, part)
    if value.dtype.kind not in "iu":
        raise ValueError(f"its {part} must be integers, got dtype {value.dtype}")
    if value.dtype.kind == "u" and value.size and value.max() > _LARGEST:
        raise ValueError(f"its {part} must be below 2^31, got {value.max()}")
    return value.astype(np.int64, copy=False)


def _csr(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    pointers, indices, values = _indices(parts, "indptr"), _indices(parts, "indices"), _array(parts, "data")
    _check_compressed(pointers, indices, values, shape[0])
    # scipy allows spare room after the last entry.
    return _expanded(pointers), indices[: pointers[-1]], values[: pointers[-1]]


def _expanded(pointers: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))


def _csc(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    columns, rows, values = _csr(parts, (shape[1], shape[0]))
    return rows, columns, values


def _bsr(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    pointers, indices = _indices(parts, "indptr"), _indices(parts, "indices")
    values = _array(parts, "data", 3)
    height, width = values.shape[1:]
    if min(height, width) < 1 or shape[0] % height or shape[1] % width:
        raise ValueError(f"its blocks of shape {(height, width)} do not divide shape {shape}")
    _check_compressed(pointers, indices, values, shape[0] // height)
    values = values[: pointers[-1]]
    # Indices outside stay outside, but do not overflow below.
    indices = indices.clip(-1, shape[1] // width)
    rows = (_expanded(pointers) * height)[:, None, None] + np.arange(height)[:, None]
    columns = (indices[: len(values)] * width)[:, None, None] + np.arange(width)
    rows, columns = np.broadcast_to(rows, values.shape), np.broadcast_to(columns, values.shape)
    return rows.reshape(-1), columns.reshape(-1), values.reshape(-1)


def _coo(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    if "coords" in parts:
        coordinates = parts["coords"]
        if not isinstance(coordinates, (tuple, list)) or len(coordinates) != 2:
            raise ValueError("its coords must be two arrays")
        parts = {**parts, "row": coordinates[0], "col": coordinates[1]}
    rows, columns, values = _indices(parts, "row"), _indices(parts, "col"), _array(parts, "data")
    if not len(rows) == len(columns) == len(values):
        raise ValueError(f"it has {len(rows)} rows and {len(columns)} columns for {len(values)} values")
    return rows, columns, values


def _dia(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    offsets, values = _indices(parts, "offsets"), _array(parts, "data", 2)
    if len(offsets) != len(values):
        raise ValueError(f"it has {len(offsets)} offsets for {len(values)} diagonals")
    inside = (offsets > -shape[0]) & (offsets < shape[1])
    values = values[inside, : shape[1]]
    rows = np.arange(values.shape[1]) - offsets[inside, None]
    # In this form places without an entry are 0.
    used = (rows >= 0) & (rows < shape[0]) & (values != 0)
    columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return rows[used], columns[used], values[used]


def _lil(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    lists = {part: list(parts[part]) for part in ("rows", "data")}
    for part, found in lists.items():
        if len(found) != shape[0] or not all(isinstance(row, list) for row in found):
            raise ValueError(f"its {part} must be {shape[0]} lists")
    counts = [len(row) for row in lists["rows"]]
    if counts != [len(row) for row in lists["data"]]:
        raise ValueError("its rows and its data differ in length")
    columns, values = (list(chain.from_iterable(lists[part])) for part in ("rows", "data"))
    return np.repeat(np.arange(shape[0]), counts), _whole(columns), real_numbers(values)


def _dok(parts: Mapping[str, Any], shape: tuple[int, int]) -> _Triple:
    items: Sequence[Any] = parts["items"]
    if not all(isinstance(key, tuple) and len(key) == 2 for key, _ in items):
        raise ValueError("its keys must be pairs")
    rows, columns = (_whole([key[axis] for key, _ in items]) for axis in (0, 1))
    return rows, columns, real_numbers([value for _, value in items])


def _whole(numbers: Sequence[Any]) -> NDArray[np.int64]:
    for number in numbers:
        if not isinstance(number, (int, np.integer)):
            raise TypeError(f"its indices must be integers, got {type(number).__name__}")
        if not 0 <= number <= _LARGEST:
            raise ValueError("its indices must lie in [0, 2^31)")
    return np.array(numbers, dtype=np.int64)


_FORMS: dict[str, Callable[[Mapping[str, Any], tuple[int, int]], _Triple]] = {
    "csr": _csr,
    "csc": _csc,
    "bsr": _bsr,
    "coo": _coo,
    "dia": _dia,
    "lil": _lil,
    "dok": _dok,
}
