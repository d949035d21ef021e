"""Arrays and sparse matrices from other projects' pickles, made only after every number was checked."""

from __future__ import annotations

import math
import os
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pahm_ops.array_files import LIMIT
from pahm_ops.mesh._pickle_machine import CHUMPY, SPARSE, Dictionary, Record, read_pickle
from pahm_ops.mesh.sparse import Entries, entries, real_numbers

_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_OBJECTS = {"O", "O4", "O8"}
_ARRAYS = {"ndarray", "_frombuffer"}
_PARTS = {"data", "indices", "indptr", "offsets", "row", "col"}
_LIST_LIMIT = 2**18
_ENTRY_LIMIT = 2**22
_CHUMPY_DEPTH = 8

_SIGNATURES = {
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "a PyTorch checkpoint",
    b"\x93NUMPY": "a .npy file",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
}


def load_arrays(path: str | PathLike[str]) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, also one of Python 2; nothing in the pickle is run.

    Its arrays, matrices and chumpy objects are inert until `to_array` or `to_entries` converts them.

    Raises FileNotFoundError for a missing file. Raises ValueError, with the reason in one sentence, for a
    file that is not a pickle, holds no dictionary, or names a class other than numpy's and scipy.sparse's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    size = os.stat(path).st_size
    if size > LIMIT:
        raise ValueError(f"{path} has {size} bytes, expected a pickle of arrays of at most {LIMIT}")
    data = path.read_bytes()
    kind = _other_kind(data)
    if kind is not None:
        raise ValueError(f"{path} is {kind}, expected a pickle")
    try:
        content = read_pickle(data)
    except ValueError as error:
        raise ValueError(f"{path} was not read as a pickle of arrays: {error}") from error
    if not isinstance(content, Dictionary):
        raise ValueError(f"{path} must hold a dictionary, got {_described(content)}")
    return content.by_name()


def to_array(name: str, value: object, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """The numbers of a value from `load_arrays`: an array, a chumpy object, nested lists, or a sparse matrix.

    Args:
        name: the name of the value in messages.
        value: the value.
        shape: the required shape; None allows any, but not for a sparse matrix.

    Returns:
        Integers or floats in native byte order, C-contiguous, in its own memory.

    Raises:
        ValueError: the value does not hold numbers, has another shape, or has parts that do not fit together.
    """
    if isinstance(value, Record) and value.name in SPARSE:
        if shape is None or len(shape) != 2:
            raise ValueError(f"{name} must be an array, got a sparse matrix")
        found = to_entries(name, value, (shape[0], shape[1]))
        dense = np.zeros(shape)
        np.add.at(dense, (found.rows, found.columns), found.values)
        return dense
    array = _dense(name, value, _CHUMPY_DEPTH)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers, got dtype {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def to_integers(name: str, value: object, shape: tuple[int, ...] | None = None) -> NDArray[np.int64]:
    """`to_array` as int64; also raises ValueError for numbers that are not whole or not below 2^53."""
    return _whole(name, to_array(name, value, shape))


def _whole(name: str, array: NDArray[Any]) -> NDArray[np.int64]:
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold whole numbers, got dtype {array.dtype}")
    # Comparisons with NaN are false.
    inside = array.size == 0 or (array.min() > -(2**53) and array.max() < 2**53)
    if not inside or (array.dtype.kind == "f" and (array != np.trunc(array)).any()):
        raise ValueError(f"{name} must hold whole numbers below 2^53")
    return array.astype(np.int64)


def to_list(name: str, value: object) -> list[Any]:
    """The entries of a list, a tuple or a one-dimensional numpy array of objects."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Record) and value.name == "ndarray":
        shape, dtype, _, items = _array_state(name, value)
        if dtype is None and isinstance(items, list) and shape == (len(items),):
            return items
    raise ValueError(f"{name} must be a list, got {_described(value)}")


def to_entries(name: str, value: object, shape: tuple[int, int]) -> Entries:
    """The entries of a sparse matrix (M, N) from `load_arrays`; ValueError for any other value or shape."""
    if not isinstance(value, Record) or value.name not in SPARSE:
        raise ValueError(f"{name} must be a scipy.sparse matrix, got {_described(value)}")
    state = value.state.by_name() if isinstance(value.state, Dictionary) else {}
    size = _shape(name, state.get("_shape", state.get("shape")))
    if size != shape:
        raise ValueError(f"{name} must have shape {shape}, got {size}")
    form = value.name[:3]
    parts: dict[str, Any]
    if form == "lil":
        parts = {part: _rows(f"{part} of {name}", state[part]) for part in {"rows", "data"} & state.keys()}
    elif form == "dok":
        own = state.get("_dict")
        pairs = (own if isinstance(own, Dictionary) else value.items).pairs
        if len(pairs) > _LIST_LIMIT:
            raise ValueError(f"{name} must have at most {_LIST_LIMIT} entries in a dictionary")
        parts = {"items": [(_plain_each(key), _plain(number)) for key, number in pairs]}
    else:
        parts = {part: _dense(f"{part} of {name}", state[part]) for part in _PARTS & state.keys()}
        if "coords" in state:
            coordinates = to_list(f"coords of {name}", state["coords"])
            parts["coords"] = [_dense(f"coords of {name}", each) for each in coordinates[:3]]
        # Matrices may share arrays, so the file's size does not bound their total memory.
        most = max((part.size for part in parts.values() if isinstance(part, np.ndarray)), default=0)
        if most > _ENTRY_LIMIT:
            raise ValueError(f"{name} must have at most {_ENTRY_LIMIT} entries, got {most}")
    try:
        return entries(form, parts, size, name)
    except (TypeError, IndexError) as error:
        raise ValueError(str(error)) from error


def _rows(name: str, value: object) -> list[Any]:
    """The lists of a lil matrix. A file can repeat one list many times: few bytes may hold many entries."""
    rows = to_list(name, value)
    if sum(len(row) for row in rows if isinstance(row, list)) > _LIST_LIMIT:
        raise ValueError(f"{name} must have at most {_LIST_LIMIT} entries in lists")
    return [[_plain(number) for number in row] if isinstance(row, list) else row for row in rows]


def _plain(value: object) -> Any:
    """Converts a numpy scalar to a number; returns any other value unchanged."""
    if not isinstance(value, Record) or value.name != "scalar" or len(value.arguments) != 2:
        return value
    dtype, data = value.arguments
    array = Record("_frombuffer", (data, dtype, (), "C"))
    return _dense("a scalar", array).item()


def _plain_each(value: object) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, tuple) and len(value) <= 8 else value


def _described(value: object) -> str:
    if isinstance(value, Record):
        return "an array" if value.name in _ARRAYS else f"a {value.name}"
    return "dict" if isinstance(value, Dictionary) else type(value).__name__


def _other_kind(data: bytes) -> str | None:
    """The kind of a file that is known not to be a pickle, or None."""
    if data.startswith(b"PK\x03\x04"):
        names = data[-(2**16) :]
        kinds = {b"/data.pkl": "a PyTorch checkpoint", b".npy": "a .npz archive", b"": "a .zip archive"}
        return next(kind for name, kind in kinds.items() if name in names)
    return next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), None)


def _dense(name: str, value: object, depth: int = 0) -> NDArray[Any]:
    """The array in a value, with its shape checked against its bytes; it may share the file's memory."""
    if isinstance(value, (list, tuple)):
        return _from_lists(name, value)
    if isinstance(value, Record) and value.name in CHUMPY:
        if depth == 0:
            raise ValueError(f"{name} must be at most {_CHUMPY_DEPTH} chumpy objects deep")
        return _from_chumpy(name, value, depth - 1)
    if not isinstance(value, Record) or value.name not in _ARRAYS:
        raise ValueError(f"{name} must hold numbers, got {_described(value)}")
    shape, dtype, order, data = _array_state(name, value)
    if dtype is None:
        raise ValueError(f"{name} must hold numbers, got objects")
    if isinstance(data, str):
        try:
            data = data.encode("latin1")
        except UnicodeEncodeError:
            raise ValueError(f"{name} must have bytes, got text") from None
    if not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise ValueError(f"{name} must have the bytes of shape {shape} in {dtype}, got {size}")
    flat = np.frombuffer(data, dtype) if data else np.zeros(0, dtype)
    if dtype.kind == "b":  # The bytes in a file may have values other than 0 and 1.
        flat = flat.view(np.uint8) != 0
    if isinstance(order, tuple):
        return flat.reshape(shape).transpose(order)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _from_lists(name: str, value: list[Any] | tuple[Any, ...]) -> NDArray[Any]:
    """An array from nested lists, level by level: lists that share lists can have any number of entries."""
    shape: tuple[int, ...] = (len(value),)
    numbers = list(value)
    while numbers and isinstance(numbers[0], (list, tuple)):
        length = len(numbers[0])
        if not all(isinstance(row, (list, tuple)) and len(row) == length for row in numbers):
            raise ValueError(f"{name} must hold numbers, got lists of different lengths")
        if len(shape) == 8 or len(numbers) * length > _LIST_LIMIT:
            raise ValueError(f"{name} must have at most {_LIST_LIMIT} numbers in lists, nested 8 deep")
        shape = (*shape, length)
        numbers = [number for row in numbers for number in row]
    try:
        return real_numbers([_plain(number) for number in numbers]).reshape(shape)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers: {error}") from error


def _from_chumpy(name: str, value: Record, depth: int) -> NDArray[Any]:
    """The array of a `chumpy.ch.Ch` (a value) or a `chumpy.reordering.Select` (a part of a value)."""
    state = value.state.by_name() if isinstance(value.state, Dictionary) else {}
    if "x" in state:
        return _dense(name, state["x"], depth)
    if not {"a", "idxs"} <= state.keys():
        raise ValueError(
            f"{name} is a chumpy object of attributes {sorted(state)[:8]}, neither a value nor a selection; "
            "load the file where chumpy is installed and save its arrays as numpy ones (numpy.array(value))"
        )
    whole = _dense(name, state["a"], depth).reshape(-1)
    chosen = _whole(f"idxs of {name}", _dense(f"idxs of {name}", state["idxs"]))
    if chosen.size and (chosen.min() < 0 or chosen.max() >= whole.size):
        raise ValueError(f"{name} is a chumpy selection outside its {whole.size} values")
    shape = _shape(name, state["preferred_shape"]) if "preferred_shape" in state else chosen.shape
    if math.prod(shape) != chosen.size:
        raise ValueError(f"{name} is a chumpy selection of {chosen.size} values for shape {shape}")
    return whole[chosen].reshape(shape)


def _array_state(name: str, record: Record) -> tuple[tuple[int, ...], np.dtype | None, Any, Any]:
    """Shape, dtype (None for objects), order (C, F, or C of transposed axes) and data of an array."""
    if record.name == "ndarray":
        state = record.state
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError(f"{name} must be a numpy array with a state")
        shape, dtype, fortran, data = state[-4:]
        return _shape(name, shape), _dtype(name, dtype), "F" if fortran is True or fortran == 1 else "C", data
    if not 4 <= len(record.arguments) <= 5:
        raise ValueError(f"{name} must be a numpy array made of 4 parts, got {len(record.arguments)}")
    data, dtype, shape, order, *axes = record.arguments
    size = _shape(name, shape)
    if order == "K" and axes:
        return size, _dtype(name, dtype), _axes(name, axes[0], size), data
    if order not in ("C", "F"):
        raise ValueError(f"{name} must be in the order C, F or K")
    return size, _dtype(name, dtype), order, data


def _shape(name: str, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or len(shape) > 8:
        raise ValueError(f"{name} must have a shape of at most 8 sizes, got {_described(shape)}")
    sizes: tuple[Any, ...] = _plain_each(shape)
    if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"{name} must have sizes from 0 to 2^31 - 1")
    if math.prod(max(size, 1) for size in sizes) >= 2**48:
        raise ValueError(f"{name} must have a shape that fits into memory, got {sizes}")
    return sizes


def _dtype(name: str, record: object) -> np.dtype | None:
    """A dtype of numbers; None for the dtype of objects."""
    code = record.arguments[0] if isinstance(record, Record) and record.arguments else None
    if not isinstance(record, Record) or record.name != "dtype" or type(code) is not str:
        raise ValueError(f"{name} must have a numpy dtype")
    order, bare = (code[0], code[1:]) if code[:1] in ("<", ">", "|", "=") else ("|", code)
    if record.state is not None:
        if not isinstance(record.state, tuple) or len(record.state) < 5 or record.state[2:5] != (None,) * 3:
            raise ValueError(f"{name} must have a plain dtype, got {code[:20]!r} with fields")
        order = record.state[1]
    if order not in ("<", ">", "|", "="):
        raise ValueError(f"{name} must have a dtype of a known byte order")
    if bare in _OBJECTS:
        return None
    if bare not in _DTYPES:
        raise ValueError(f"{name} must hold numbers, got dtype {code[:20]!r}")
    return np.dtype(order + bare)


def _axes(name: str, axes: object, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = _plain_each(axes)
    if not isinstance(axes, tuple) or not all(type(axis) is int for axis in axes):
        raise ValueError(f"{name} must have the order of its axes as integers")
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"{name} must have an order of its {len(shape)} axes")
    return axes
