"""The derivative, the fake kernel and the batching rule of `mesh_pool`.

The gradient of a product with a matrix is a product with its transpose, so the op takes both: x (B, N, C),
then the matrix and its transpose, each as row_pointers, columns and values (`MeshTransform`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from pahm_ops.autograd._shared import (
    GRADIENT,
    NONE,
    OpFunction,
    derivative,
    merged,
    one_by_one,
    run,
    run_at_level,
)
from pahm_ops.backends import kernel


def mesh_pool(x: Tensor, *matrices: Tensor) -> Tensor:
    """The op, differentiable with respect to x."""
    how = derivative(x)
    if how == NONE:
        return run(kernel("mesh_pool", x), x, *matrices)
    return _MeshPool.apply(x, *matrices) if how == GRADIENT else kernel("mesh_pool", x)(x, *matrices)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    matrices = ctx.saved_tensors
    return mesh_pool(grad, *matrices[3:], *matrices[:3]), None, None, None, None, None, None


class _MeshPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(*matrices)
        return run(kernel("mesh_pool", x), x, *matrices)

    backward = staticmethod(_backward)


class _MeshPoolOp(OpFunction):
    @staticmethod
    def forward(x: Tensor, *matrices: Tensor) -> Tensor:
        return run_at_level(kernel("mesh_pool", x), x, *matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *constants: None) -> Tensor:
        return mesh_pool(dx, *ctx.saved_tensors)


def _fake(x: Tensor, row_pointers: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], row_pointers.shape[0] - 1, x.shape[2])


def _vmap(info: Any, dims: Any, x: Tensor, *matrices: Tensor) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[1:]):
        return one_by_one(mesh_pool, info.batch_size, dims, (x, *matrices))
    out = mesh_pool(merged(x, dims[0]), *matrices)
    return out.unflatten(0, (info.batch_size, x.shape[0 if dims[0] else 1])), 0


_MeshPoolOp.register("mesh_pool", _fake, _vmap)
