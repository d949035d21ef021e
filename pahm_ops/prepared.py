"""Operands that are checked and laid out once, then passed to the ops as tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pahm_ops import _torch_internals as internals
from pahm_ops.backends import capturing

_MOST = 2**31 - 1  # int32's largest


class SpiralTable(NamedTuple):
    """The spirals of a mesh, laid out for `spiral_conv` and its gradients. Use `prepare` to make one."""

    vertices: int
    """N, the number of vertices that the spirals index."""
    indices: Tensor
    """(M, L) int64, as given to `prepare`; plain PyTorch uses them."""
    table: Tensor
    """(L, M) int32: the transpose of the indices, so that neighbouring rows read neighbouring entries."""
    t_pointers: Tensor
    """(L * N + 1,) int32: entry l * N + n says where the list of (l, n) begins in `t_rows`."""
    t_rows: Tensor
    """(L * M,) int32: one list after another, each the m with table[l, m] == n in ascending order."""

    @staticmethod
    def prepare(indices: Tensor, vertices: int) -> SpiralTable:
        """Prepare spirals (M, L), int64, L at least 1, of vertices in [0, `vertices`); on any device.

        The indices are copied, so later changes to them have no effect. On a GPU this waits for the device,
        so it cannot run while a CUDA graph is captured. Values are not checked on the meta device or where
        they are unknown, as under ``torch.compile``.

        Raises:
            TypeError: indices are not an int64 tensor.
            ValueError: indices are not (M, L) with L >= 1, or M * L or `vertices` * L is 2^31 or more.
            IndexError: an index is negative or not below `vertices`.
        """
        check_indices(indices)
        rows, length = indices.shape
        if rows * length > _MOST or vertices * length > _MOST:
            raise ValueError(
                f"indices must be fewer than 2^31, and so must vertices x L, got {rows} x {length} indices "
                f"and {vertices} vertices"
            )
        if _has_values(indices):
            low, high = (int(bound) for bound in indices.aminmax()) if indices.numel() else (0, -1)
            if low < 0 or high >= vertices:
                raise IndexError(f"indices must lie in [0, {vertices}), got {low if low < 0 else high}")
        table = indices.t()
        lists = (table + vertices * torch.arange(length, device=indices.device)[:, None]).flatten()
        lists, order = torch.sort(lists, stable=True)
        bounds = torch.arange(vertices * length + 1, device=indices.device)
        pointers = torch.searchsorted(lists, bounds)
        return SpiralTable(
            vertices,
            indices.clone(),
            table.int().contiguous(),
            pointers.int(),
            (order % max(rows, 1)).int(),
        )

    def to(self, device: torch.device | str) -> SpiralTable:
        """The same table on another device."""
        return SpiralTable(self.vertices, *(tensor.to(device) for tensor in self[1:]))


def check_indices(indices: Any) -> None:
    """Raises TypeError or ValueError if `indices` are not an int64 tensor (M, L), L >= 1."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor or a SpiralTable, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"indices must be (M, L), got shape {tuple(indices.shape)}")
    if indices.shape[1] == 0:
        raise ValueError(f"indices must name at least one vertex a row, got shape {tuple(indices.shape)}")


def spiral_table(indices: Tensor, vertices: int) -> SpiralTable:
    """`SpiralTable.prepare`, cached while `indices` lives and keeps its values."""
    made: SpiralTable = _remembered(
        indices, (indices,), vertices, lambda: SpiralTable.prepare(indices, vertices)
    )
    return made


Rows = tuple[Tensor, Tensor, Tensor]


class MeshTransform(NamedTuple):
    """A sparse matrix and its transpose, for `mesh_pool` and its gradient. Use `prepare` to make one."""

    shape: tuple[int, int]
    """(M, N): output vertices, input vertices."""
    forward: Rows
    """The matrix in CSR: row_pointers (M + 1,) int32, columns (E,) int32, values (E,) float32 or float64."""
    backward: Rows
    """The transpose in CSR."""

    @staticmethod
    def prepare(matrix: Any) -> MeshTransform:
        """Prepare a scipy sparse matrix or array (any format), a torch COO (coalesced or not) or CSR tensor.

        Entries may be in any order and may be zero or repeated (repeated ones add up); a row may have any
        number of them. float64 and float32 values keep their dtype, others become float32.

        Raises:
            TypeError: not a sparse matrix, or not real.
            ValueError: not of rank 2, 2^31 or more entries, or requires a gradient.
            IndexError: an entry lies outside the matrix.
        """
        shape, rows, columns, values = _entries(matrix)
        if len(values) > _MOST:
            raise ValueError(f"transform must have fewer than 2^31 entries, got {len(values)}")
        for name, index, limit in (("row", rows, shape[0]), ("column", columns, shape[1])):
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
                raise IndexError(f"transform of shape {shape} has an entry outside its {limit} {name}s")
        if values.dtype not in (torch.float32, torch.float64):
            values = values.to(torch.float32)
        return MeshTransform(
            shape, _compress(shape[0], rows, columns, values), _compress(shape[1], columns, rows, values)
        )

    @property
    def device(self) -> torch.device:
        return self.forward[0].device

    def to(self, device: torch.device | str) -> MeshTransform:
        """The same transform on another device."""
        if self.device == torch.device(device):
            return self
        moved = [(p.to(device), c.to(device), v.to(device)) for p, c, v in (self.forward, self.backward)]
        return MeshTransform(self.shape, *moved)


def mesh_transform(matrix: Any) -> MeshTransform:
    """`MeshTransform.prepare`, cached while a tensor lives and keeps its values."""
    if not isinstance(matrix, Tensor) or matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
        return MeshTransform.prepare(matrix)
    if matrix.layout == torch.sparse_coo:
        parts: tuple[Tensor, ...] = internals.coo_entries(matrix)
    else:
        parts = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    made: MeshTransform = _remembered(matrix, parts, None, lambda: MeshTransform.prepare(matrix))
    return made


def _entries(matrix: Any) -> tuple[tuple[int, int], Tensor, Tensor, Tensor]:
    """Shape, rows, columns and values of a sparse matrix."""
    # Imported here to keep `import pahm_ops` fast.
    from scipy.sparse import issparse

    from pahm_ops.mesh.sparse import SIDE_LIMIT, scipy_entries

    if isinstance(matrix, Tensor):
        if matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
            raise TypeError(f"transform must be a sparse COO or CSR tensor, got layout {matrix.layout}")
        if matrix.requires_grad:
            raise ValueError("transform must not require a gradient: mesh_pool takes it as a constant")
        if matrix.dim() != 2 or matrix.dense_dim():
            raise ValueError(f"transform must be a matrix (M, N), got shape {tuple(matrix.shape)}")
        if max(matrix.shape) > SIDE_LIMIT:
            raise ValueError(f"transform must have sides of 2^26 at most, got shape {tuple(matrix.shape)}")
        if matrix.layout == torch.sparse_coo:
            indices, values = internals.coo_entries(matrix)
            rows, columns = indices.unbind(0)
        else:
            pointers, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
            entries = columns.numel()
            if pointers.shape != (matrix.shape[0] + 1,) or pointers[0] != 0 or pointers[-1] != entries:
                raise ValueError(f"transform must have crow_indices from 0 to its {entries} entries")
            if (pointers[1:] < pointers[:-1]).any():
                raise ValueError("transform must have crow_indices that never fall")
            rows = torch.repeat_interleave(pointers.diff())
        if not rows.shape == columns.shape == values.shape:
            raise ValueError(f"transform must have as many values as indices, got {tuple(values.shape)}")
        shape = (matrix.shape[0], matrix.shape[1])
    elif issparse(matrix):
        shape, *parts = scipy_entries(matrix)
        rows, columns, values = (torch.from_numpy(part.copy()) for part in parts)
    else:
        raise TypeError(
            "transform must be a MeshTransform, a scipy sparse matrix or a torch sparse tensor, "
            f"got {type(matrix).__name__}"
        )
    if values.is_complex():
        raise TypeError(f"transform must be real, got values of {values.dtype}")
    return shape, rows.to(torch.int64), columns.to(torch.int64), values


def _compress(height: int, rows: Tensor, columns: Tensor, values: Tensor) -> Rows:
    """CSR from entries in any order; the entries of a row keep their order."""
    order = torch.argsort(rows, stable=True)
    pointers = torch.zeros(height + 1, dtype=torch.int32, device=rows.device)
    pointers[1:] = torch.bincount(rows, minlength=height).cumsum(0)
    return pointers, columns[order].int(), values[order]


# ---- cached operands made from plain tensors ----

_MADE: dict[int, tuple[Any, ...]] = {}


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read: not in a trace, in `torch.func` or on the meta device."""
    return not (
        torch.compiler.is_compiling()
        or tensor.is_meta
        or internals.functorch_active()
        or internals.is_fake(tensor)
    )


def _state(purpose: Any, parts: tuple[Tensor, ...]) -> list[Any] | None:
    """What changes with the memory or the values of `parts`. None if changes cannot be seen."""
    versions = [internals.version(part) for part in parts]
    return None if None in versions else [purpose, *versions, *(part.data_ptr() for part in parts)]


def _remembered(key: Tensor, parts: tuple[Tensor, ...], purpose: Any, make: Callable[[], Any]) -> Any:
    """`make()`, cached while `key` lives and its `parts` keep their memory and their values."""
    if torch.compiler.is_compiling():
        return make()
    found = _MADE.get(id(key))
    if found is not None and found[0]() is key and found[1] == _state(purpose, parts):
        return found[2]
    state = _state(purpose, parts) if _has_values(key) else None
    if state is None:
        return make()
    if capturing(key.device):
        raise RuntimeError(
            "indices and sparse matrices cannot be prepared while a CUDA graph is captured: call SpiralTable."
            "prepare or MeshTransform.prepare before"
        )
    made = make()
    if key.is_cuda:  # The next call may come from another stream.
        torch.cuda.current_stream(key.device).synchronize()
    place = id(key)

    def forget(reference: weakref.ref[Tensor]) -> None:
        if place in _MADE and _MADE[place][0] is reference:
            del _MADE[place]

    # Keep the parts of a sparse tensor alive, so that no other tensor can take the addresses compared above.
    _MADE[place] = weakref.ref(key, forget), state, made, None if key is parts[0] else parts
    return made
