"""The int32 tables that GPU kernels take, made and checked once for each table that a user holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pahm_ops import _torch_internals as internals
from pahm_ops._library import capturing

# By device, storage and shape, not by tensor: a view that is made anew for each call is found again.
_MADE: dict[tuple[Any, ...], tuple[Any, int, Any]] = {}
# What a CUDA graph was captured with, by device and number: it reads that at every replay.
_CAPTURED: dict[tuple[Any, ...], tuple[Any, Any]] = {}
_LOCK = threading.Lock()


def made_once(source: Tensor, purpose: Any, make: Callable[[], Any]) -> Any:
    """`make()`, remembered for `purpose` as long as the memory of `source` lives and is not changed.

    Made anew for a tensor of inference mode, which does not tell its changes, and within the capture of a
    CUDA graph, where there are no values yet. Changes by way of ``.data`` are not seen.
    """
    version = internals.version(source)
    if version is None:
        return make()
    reference = internals.StorageWeakRef(source.untyped_storage())
    key = source.device, reference.cdata, source.storage_offset(), source.shape, source.stride(), purpose
    with _LOCK:
        found = _MADE.get(key)
        if found is not None and found[1] == version:
            if capturing(source.device):
                _CAPTURED[source.device, id(found[2])] = reference, found[2]
            return found[2]
    if capturing(source.device):
        return make()
    # What no one holds is dropped once its device has finished what may still read it: a device that is not
    # synchronised here keeps its tables.
    with _LOCK:
        made = [k for k, (storage, *_) in _MADE.items() if k[0] == source.device and storage.expired()]
        captured = [k for k, (storage, _) in _CAPTURED.items() if k[0] == source.device and storage.expired()]
    value = _finished(source.device, make)
    with _LOCK:
        for old in made:
            _MADE.pop(old, None)
        for old in captured:
            _CAPTURED.pop(old, None)
        _MADE[key] = reference, version, value
    return value


def _finished(device: torch.device, make: Callable[[], Any]) -> Any:
    """`make()`, done when it returns: the next call may come from another stream.

    In a thread of its own, as the memory that the caller allocates may belong to a CUDA graph.
    """
    if device.type != "cuda":
        value = make()
        if device.type == "xpu":
            torch.xpu.synchronize(device)
        return value

    def run() -> Any:
        with torch.cuda.device(device):
            # Also for whoever still reads a table that was dropped, whose memory this may take.
            torch.cuda.synchronize()
            value = make()
            torch.cuda.synchronize()
            return value

    with ThreadPoolExecutor(1) as apart:
        return apart.submit(run).result()


def _check(condition: Tensor, message: str) -> None:
    """Raises IndexError where `condition` does not hold; within a capture the device stops at replay."""
    if capturing(condition.device):
        internals.assert_async(condition, message)
    elif not condition:
        raise IndexError(message)


def _check_range(name: str, index: Tensor, limit: int) -> None:
    if index.numel() == 0:
        return
    low, high = index.aminmax()
    inside = (low >= 0) & (high < limit)
    if capturing(index.device) or inside:
        _check(inside, f"{name} must lie in [0, {limit})")
        return
    raise IndexError(f"{name} must lie in [0, {limit}), got {int(low) if low < 0 else int(high)}")


def _small(name: str, size: int) -> None:
    if size > torch.iinfo(torch.int32).max:
        raise ValueError(f"{name} must be below 2147483648 on a GPU, got {size}")


class Spirals(NamedTuple):
    table: Tensor
    """(L, M) int32: the transpose of the indices, which neighbouring rows read side by side."""
    t_pointers: Tensor
    """(L * N + 1,) int32: where the list of (l, n), number l * N + n, begins in `t_rows`."""
    t_rows: Tensor
    """(L * M,) int32: the m with table[l, m] == n, rising, list after list."""


def spirals(indices: Tensor, vertices: int) -> Spirals:
    """The tables of spiral_conv, for indices (M, L) int64 on a GPU into `vertices`. Raises IndexError."""
    return made_once(indices, ("spirals", vertices), lambda: _make_spirals(indices, vertices))


def _make_spirals(indices: Tensor, vertices: int) -> Spirals:
    _check_range("indices", indices, vertices)
    length = indices.shape[1]
    _small("the number of indices", indices.numel())
    _small("vertices x spiral length", vertices * length)
    table = indices.t()
    lists = (table + vertices * torch.arange(length, device=indices.device)[:, None]).flatten()
    lists, order = torch.sort(lists, stable=True)
    bounds = torch.arange(vertices * length + 1, device=indices.device)
    pointers = torch.searchsorted(lists, bounds)
    return Spirals(table.int().contiguous(), pointers.int(), (order % indices.shape[0]).int())


def rows(row_pointers: Tensor, columns: Tensor, values: Tensor, vertices: int, dtype: torch.dtype) -> Any:
    """A CSR matrix as mesh_pool's kernels take it: int32, int32, and `dtype`. Raises IndexError."""
    pointers = made_once(
        row_pointers, ("pointers", columns.shape[0]), lambda: _pointers(row_pointers, columns)
    )
    indices = made_once(columns, ("columns", vertices), lambda: _columns(columns, vertices))
    if values.dtype != dtype:
        values = made_once(values, dtype, lambda: values.to(dtype))
    return pointers, indices, values.contiguous()


def _pointers(row_pointers: Tensor, columns: Tensor) -> Tensor:
    _small("the number of entries", columns.numel())
    rising = (row_pointers.diff() >= 0).all()
    whole = (row_pointers[0] == 0) & (row_pointers[-1] == columns.numel())
    _check(rising & whole, "row_pointers must rise from 0 to the number of entries")
    return row_pointers.int().contiguous()


def _columns(columns: Tensor, vertices: int) -> Tensor:
    _check_range("columns", columns, vertices)
    return columns.int().contiguous()
