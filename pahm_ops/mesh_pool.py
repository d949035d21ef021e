"""Down- and up-sampling of vertex features between levels of a mesh hierarchy with a sparse matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pahm_ops.autograd import mesh_pool as autograd
from pahm_ops.backends import exporting_to_onnx, served, widened
from pahm_ops.constant_buffers import ConstantBuffers
from pahm_ops.prepared import MeshTransform, mesh_transform
from pahm_ops.reference import mesh_pool as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def mesh_pool(x: Tensor, transform: Any, dim: int = 1) -> Tensor:
    """Multiply vertex features by a sparse matrix: ``out[b, r] = sum_e value_e * x[b, column_e]`` over row r.

    Args:
        x: vertex features (B, N, C) or (N, C); float32, float64, bfloat16 or float16, any strides.
        transform: the matrix (M, N): a `MeshTransform`, or anything that `MeshTransform.prepare` takes. A
            torch tensor is prepared at the first call and again when its values change. Prepare a scipy
            matrix yourself if you use it more than once. Prepare either yourself under ``torch.compile`` and
            before the capture of a CUDA graph.
        dim: the dimension of the vertices, 1 (as in SpiralNet++'s ``Pool(x, trans, dim=1)``) or -2.

    Returns:
        (B, M, C) or (M, C), contiguous, of x's dtype; half precision is summed in float32.

    Differentiable any number of times with respect to x, and in forward mode; the transform is a constant and
    gets no gradient.
    The result and the gradient have the same bits in every run, and on the CPU for any number of threads. A
    transform's entries are checked when it is prepared. `pahm_ops.backends()` shows what runs on a device.

    Raises:
        TypeError: x is not a tensor of one of these dtypes, or transform is not a sparse matrix.
        ValueError: a rank, a width or a device does not fit, the transform requires a gradient, or an ONNX
            file is being written with ``dynamo=False``.
        IndexError: an entry of the transform lies outside its width or height.

    Source: mesh sampling of CoMA (Ranjan et al., arXiv:1807.10267), as in SpiralNet++.
    """
    if dim not in (1, -2):
        raise ValueError(f"dim must be 1 or -2, the dimension of the vertices, got {dim}")
    if not isinstance(transform, MeshTransform):
        transform = mesh_transform(transform)
    _check(x, transform)
    if exporting_to_onnx() and torch.jit.is_tracing():
        raise ValueError(
            "mesh_pool exports to ONNX with torch.onnx.export(..., dynamo=True) only: the one that traces "
            "writes sums over a row wrongly"
        )
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    if not served(x.device):
        out = reference.mesh_pool(batched, *transform.forward)
    elif x.dtype == torch.float16:
        out = autograd.mesh_pool(*widened(batched), *transform.forward, *transform.backward).to(x.dtype)
    else:
        out = autograd.mesh_pool(batched, *transform.forward, *transform.backward)
    return out if x.dim() == 3 else out.squeeze(0)


class MeshPool(ConstantBuffers):
    """`mesh_pool` with one transform, prepared once; its tensors are buffers outside the state_dict.

    Casting the module (``.to(torch.bfloat16)``) does not change the transform's values.
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
        """The transform, made of the module's buffers."""
        buffers: Any = self._buffers  # reading six attributes would cost as much as pooling a small mesh
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


def _check(x: Tensor, transform: MeshTransform) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (B, N, C) or (N, C), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.shape[-2] != transform.shape[1]:
        raise ValueError(f"transform of shape {transform.shape} does not fit x of {x.shape[-2]} vertices")
    device = transform.forward[0].device  # torch 2.10's compiler cannot read a property of a named tuple
    if x.device != device:
        raise ValueError(f"transform must be on x's device {x.device}, got {device}")
