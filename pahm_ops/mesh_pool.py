"""Down- and up-sampling of vertex features between the levels of a mesh hierarchy, by a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pahm_ops import _library, _paths
from pahm_ops import _torch_internals as internals
from pahm_ops.constant_buffers import ConstantBuffers
from pahm_ops.reference import mesh_pool as reference

_ops = torch.ops.pahm_ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def mesh_pool(x: Tensor, transform: Any, dim: int = 1) -> Tensor:
    """Multiply vertex features by a sparse matrix: ``out[b, r] = sum_e value_e * x[b, column_e]`` over row r.

    Args:
        x: vertex features (B, N, C) or (N, C); float32, float64, bfloat16 or float16, any strides.
        transform: the matrix (M, N): a `MeshTransform`, or what its `prepare` takes. A torch tensor is
            prepared once for all calls, and anew when its values change; prepare a scipy matrix yourself
            where it serves more than once, and either under ``torch.compile``.
        dim: the dimension of the vertices, 1 (as SpiralNet++'s ``Pool(x, trans, dim=1)`` calls it) or -2.

    Returns:
        (B, M, C) or (M, C), contiguous, of x's dtype; half precision is summed in float32.

    Differentiable any number of times with respect to x, and in forward mode; the transform is a constant and
    gets no gradient.
    The result and the gradient have the same bits in every run, on the CPU for any number of threads. A
    transform's entries are checked when it is prepared, and once more when a GPU first sees it.
    `pahm_ops.backends()` tells what serves a device.

    Raises:
        TypeError: x is not a tensor of one of these dtypes, or transform is not a sparse matrix.
        ValueError: a rank, a width or a device does not fit, or the transform requires a gradient; or an ONNX
            file is being written with ``dynamo=False``.
        IndexError: the transform names a column outside its width or a row outside its height.

    Source: mesh sampling of CoMA (Ranjan et al., arXiv:1807.10267), as SpiralNet++ has it.
    """
    if dim not in (1, -2):
        raise ValueError(f"dim must be 1 or -2, the dimension of the vertices, got {dim}")
    if not isinstance(transform, MeshTransform):
        transform = _prepared(transform)
    _check(x, transform)
    if _library.exporting_to_onnx() and torch.jit.is_tracing():
        raise ValueError(
            "mesh_pool exports to ONNX with torch.onnx.export(..., dynamo=True) only: the one that traces "
            "writes sums over a row wrongly"
        )
    forward, backward = transform.forward, transform.backward
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    if _paths.served(x.device):
        out = _ops.mesh_pool(*_library.widened(batched), *forward, *backward).to(x.dtype)
    else:
        out = reference.mesh_pool(batched, *forward)
    return out if x.dim() == 3 else out.squeeze(0)


class MeshPool(ConstantBuffers):
    """`mesh_pool` by one transform, prepared once; its tensors are buffers outside the state_dict.

    A cast of the module (``.to(torch.bfloat16)``) leaves the transform's values as they are.
    Forward: (B, N, C) or (N, C) to (B, M, C) or (M, C).
    """

    def __init__(self, transform: Any) -> None:
        super().__init__()
        if not isinstance(transform, MeshTransform):
            transform = MeshTransform.prepare(transform)
        self.shape = transform.shape
        for name, tensor in zip(_PARTS, (*transform.forward, *transform.backward), strict=True):
            self.register_constant(name, tensor)

    @property
    def transform(self) -> MeshTransform:
        """The transform, of the module's buffers."""
        buffers: Any = self._buffers  # six attributes would cost as much as the product of a small mesh
        a, b, c, d, e, f = _PARTS
        return MeshTransform(
            self.shape, (buffers[a], buffers[b], buffers[c]), (buffers[d], buffers[e], buffers[f])
        )

    def forward(self, x: Tensor) -> Tensor:
        return mesh_pool(x, self.transform)

    def extra_repr(self) -> str:
        rows, columns = self.shape
        return f"{columns} -> {rows}"


_PARTS = tuple(
    f"{way}_{part}" for way in ("forward", "backward") for part in ("row_pointers", "columns", "values")
)
Rows = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class MeshTransform:
    """A sparse matrix in the form that `mesh_pool` uses: itself and its transpose, by rows. Use `prepare`."""

    shape: tuple[int, int]
    """(M, N): vertices out, vertices in."""
    forward: Rows
    """The matrix in CSR: row_pointers (M + 1,) int64, columns (E,) int64, values (E,) float32 or float64."""
    backward: Rows
    """Its transpose in CSR."""

    @staticmethod
    def prepare(matrix: Any) -> MeshTransform:
        """Take a scipy sparse matrix or array (any format), a torch COO (coalesced or not) or CSR tensor.

        Entries may be in any order, any number a row, zero, or repeated (they add up). Values of float64 and
        float32 stay so, others become float32. Raises as `mesh_pool` does.
        """
        shape, rows, columns, values = _entries(matrix)
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


_PREPARED: Any = internals.WeakIdKeyDictionary()


def _prepared(matrix: Any) -> MeshTransform:
    """`MeshTransform.prepare`, remembered for as long as a tensor lives and keeps its values."""
    if not isinstance(matrix, Tensor) or matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
        return MeshTransform.prepare(matrix)
    if matrix.layout == torch.sparse_coo:
        parts: tuple[Tensor, ...] = internals.coo_entries(matrix)
    else:
        parts = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    versions = [internals.version(part) for part in parts]
    if None in versions:
        return MeshTransform.prepare(matrix)
    # The parts are kept, so that no other tensor can take their memory while it is compared with.
    state = [(part.data_ptr(), part.shape, version) for part, version in zip(parts, versions, strict=True)]
    found = _PREPARED.get(matrix)
    if found is None or found[0] != state:
        found = state, MeshTransform.prepare(matrix), parts
        if matrix.is_cuda:  # The next call may come from another stream.
            torch.cuda.current_stream(matrix.device).synchronize()
        _PREPARED[matrix] = found
    return found[1]


def _entries(matrix: Any) -> tuple[tuple[int, int], Tensor, Tensor, Tensor]:
    """Shape, rows, columns and values of a sparse matrix."""
    # Here, as `import pahm_ops` waits for neither.
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
    """CSR of entries in any order; entries of a row keep theirs."""
    order = torch.argsort(rows, stable=True)
    pointers = torch.zeros(height + 1, dtype=torch.int64, device=rows.device)
    pointers[1:] = torch.bincount(rows, minlength=height).cumsum(0)
    return pointers, columns[order], values[order]


def _check(x: Tensor, transform: MeshTransform) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (B, N, C) or (N, C), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.shape[-2] != transform.shape[1]:
        raise ValueError(f"transform of shape {transform.shape} does not fit x of {x.shape[-2]} vertices")
    if x.device != transform.device:
        raise ValueError(f"transform must be on x's device {x.device}, got {transform.device}")


class _MeshPool(_library.OpFunction):
    """The gradient of a product with a matrix is the product with its transpose: the op takes both."""

    @staticmethod
    def forward(x: Tensor, *matrices: Tensor) -> Tensor:
        return _library.below_autograd(_ops.mesh_pool, x, *matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrices = ctx.saved_tensors
        return _ops.mesh_pool(grad, *matrices[3:], *matrices[:3]), None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *constants: None) -> Tensor:
        return _ops.mesh_pool(dx, *ctx.saved_tensors)


def _fake_mesh_pool(x: Tensor, row_pointers: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], row_pointers.shape[0] - 1, x.shape[2])


def _vmap_mesh_pool(info: Any, dims: Any, x: Tensor, *matrices: Tensor) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[1:]):
        return _library.one_by_one(_ops.mesh_pool, info.batch_size, dims, (x, *matrices))
    out = _ops.mesh_pool(_library.merged(x, dims[0]), *matrices)
    return out.unflatten(0, (info.batch_size, x.shape[0 if dims[0] else 1])), 0


_library.register("mesh_pool", _fake_mesh_pool, _MeshPool, _vmap_mesh_pool)
