"""Reading other projects' pickled arrays without running what is in them."""

from __future__ import annotations

import codecs
import importlib
import pickle
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMPY = {
    "ndarray": "numpy",
    "dtype": "numpy",
    "_reconstruct": "numpy._core.multiarray",
    "scalar": "numpy._core.multiarray",
    "_frombuffer": "numpy._core.numeric",
}
_NUMPY_MODULES = {
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
}
_SPARSE = {
    f"{kind}_{form}"
    for kind in ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")
    for form in ("matrix", "array")
}


class ChumpyArray:
    """What a chumpy array of a pickle becomes: its attributes, none of its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def to_numpy(self) -> NDArray[np.float64]:
        """The array that a `chumpy.ch.Ch` (a value) or `chumpy.reordering.Select` (a part of one) is."""
        state = getattr(self, "state", {})
        if "x" in state:
            return to_array("x", state["x"])
        if {"a", "idxs"} <= state.keys():
            picked = to_array("a", state["a"]).ravel()[np.asarray(state["idxs"])]
            return picked.reshape(state.get("preferred_shape", picked.shape))
        raise ValueError(
            f"a chumpy object with attributes {sorted(state)} is neither a value nor a selection: load the "
            "file once where chumpy is installed and save its arrays as numpy ones (numpy.array(value))"
        )


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"a pickle of arrays encodes as latin1, got {encoding!r}")
    return codecs.encode(text, encoding)


def _new(cls: type, base: type, state: object) -> object:
    admitted = cls is ChumpyArray or cls.__module__.startswith("scipy.sparse.")
    if not admitted or base is not object or state is not None:
        raise pickle.UnpicklingError(f"a pickle of arrays builds no {cls!r}")
    return object.__new__(cls)


_REPLACED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("copy_reg", "_reconstructor"): _new,
    ("copyreg", "_reconstructor"): _new,
    ("__builtin__", "object"): object,
    ("builtins", "object"): object,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("chumpy.ch", "Ch"): ChumpyArray,
    ("chumpy.reordering", "Select"): ChumpyArray,
}


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy's arrays and scipy's sparse matrices; chumpy's arrays are kept as inert `ChumpyArray`s."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that a pickle names; raises UnpicklingError for any other."""
        if (module, name) in _REPLACED:
            return _REPLACED[module, name]
        if module in _NUMPY_MODULES and name in _NUMPY:
            return _numpy(_NUMPY[name], name)
        if (module == "scipy.sparse" or module.startswith("scipy.sparse.")) and name in _SPARSE:
            return getattr(importlib.import_module("scipy.sparse"), name)
        raise pickle.UnpicklingError(
            f"the pickle asks for {module}.{name}, and only numpy's and scipy.sparse's arrays are admitted; "
            "open it where you trust it, convert that object with numpy.array(...), and save it again"
        )


def _numpy(module: str, name: str) -> Callable[..., Any]:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:  # numpy 1 calls it numpy.core
        found = importlib.import_module(module.replace("._core", ".core"))
    return getattr(found, name)


def load_arrays(path: str | PathLike[str]) -> dict[str, Any]:
    """The dictionary in a pickle of arrays, one of Python 2 included.

    Raises FileNotFoundError for a missing file and ValueError, with the reason in one sentence, for one that
    is no pickle, holds no dictionary, or names a class other than numpy's and scipy.sparse's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    with path.open("rb") as file:
        try:
            content = ArrayUnpickler(file, encoding="latin1").load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} was not read: {error}") from error
        except (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeError) as error:
            raise ValueError(f"{path} is not a whole pickle of arrays: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


def to_array(name: str, value: object) -> NDArray[np.float64]:
    """A dense array of numbers from a numpy, scipy.sparse or chumpy one; ValueError for anything else."""
    if isinstance(value, ChumpyArray):
        return value.to_numpy()
    dense = value.toarray() if hasattr(value, "toarray") else np.asarray(value)
    if dense.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got dtype {dense.dtype}")
    return np.asarray(dense)
