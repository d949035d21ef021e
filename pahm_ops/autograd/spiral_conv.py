"""The derivatives, the fake kernels and the batching rules of `spiral_conv`.

The map is linear in x and in weight, so each of the three products (the map, its gradient to x, its gradient
to weight) is a gradient of the other two. The derivatives of ReLU and ELU follow from their results. GELU's
does not, so GELU becomes a separate op if a derivative is needed.

Throughout: x (B, N, C), weight (Cout, L * C), bias (Cout,) or None, grad (B, M, Cout); table, t_pointers and
t_rows are those of `SpiralTable`; `activation` is a position in `pahm_ops.spiral_conv.ACTIVATIONS`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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

_NONE, _RELU, _ELU, GELU = range(4)


def spiral_conv(
    x: Tensor,
    table: Tensor,
    t_pointers: Tensor,
    t_rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """The op, differentiable with respect to x, weight and bias."""
    how = derivative(x, weight, bias)
    if how == GRADIENT:
        if activation == GELU:
            return F.gelu(_SpiralConv.apply(x, table, t_pointers, t_rows, weight, bias, _NONE))
        return _SpiralConv.apply(x, table, t_pointers, t_rows, weight, bias, activation)
    op = kernel("spiral_conv", x, weight.shape[0])
    arguments = (x, table, t_pointers, t_rows, weight, bias, activation)
    return run(op, *arguments) if how == NONE else op(*arguments)


def input_grad(
    grad: Tensor, table: Tensor, t_pointers: Tensor, t_rows: Tensor, weight: Tensor, vertices: int
) -> Tensor:
    """The gradient of `spiral_conv` to x with `vertices` vertices; differentiable in grad and weight."""
    how = derivative(grad, weight)
    if how == GRADIENT:
        return _InputGrad.apply(grad, table, t_pointers, t_rows, weight, vertices)
    op = kernel("_spiral_conv_input_grad", grad, weight.shape[1] // max(table.shape[0], 1))
    arguments = (grad, table, t_pointers, t_rows, weight, vertices)
    return run(op, *arguments) if how == NONE else op(*arguments)


def weight_grad(grad: Tensor, x: Tensor, table: Tensor, t_pointers: Tensor, t_rows: Tensor) -> Tensor:
    """The gradient of `spiral_conv` to weight; differentiable in grad and x."""
    how = derivative(grad, x)
    if how == GRADIENT:
        return _WeightGrad.apply(grad, x, table, t_pointers, t_rows)
    op = kernel("_spiral_conv_weight_grad", grad, grad.shape[2])
    arguments = (grad, x, table, t_pointers, t_rows)
    return run(op, *arguments) if how == NONE else op(*arguments)


def _through_activation(grad: Tensor, output: Tensor | None, activation: int) -> Tensor:
    if output is None:
        return grad
    if activation == GELU:
        raise NotImplementedError("the op has no gradient through gelu here: call pahm_ops.spiral_conv")
    if activation == _RELU:
        return torch.ops.aten.threshold_backward(grad, output, 0)
    return torch.ops.aten.elu_backward(grad, 1, 1, 1, True, output)


# ---- spiral_conv ----


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    table, t_pointers, t_rows, x, weight, output = ctx.saved_tensors
    need_x, _, _, _, need_weight, need_bias, _ = ctx.needs_input_grad
    grad = _through_activation(grad, output, ctx.activation)
    return (
        input_grad(grad, table, t_pointers, t_rows, weight, ctx.vertices) if need_x else None,
        None,
        None,
        None,
        weight_grad(grad, x, table, t_pointers, t_rows) if need_weight else None,
        grad.sum((0, 1)) if need_bias else None,
        None,
    )


class _SpiralConv(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, table, t_pointers, t_rows, weight, _, ctx.activation = inputs
        ctx.vertices = x.shape[1]
        output: Tensor = run(kernel("spiral_conv", x, weight.shape[0]), *inputs)
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        ctx.save_for_backward(
            table,
            t_pointers,
            t_rows,
            x if need_weight else None,
            weight if need_x else None,
            output if ctx.activation else None,
        )
        return output

    backward = staticmethod(_backward)


class _SpiralConvOp(OpFunction):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = run_at_level(kernel("spiral_conv", inputs[0], inputs[4].shape[0]), *inputs)
        return out

    @classmethod
    def autograd_kernel(cls, *inputs: Any) -> Any:
        *others, activation = inputs
        if activation == GELU and cls.is_wanted(inputs):
            return F.gelu(kernel("spiral_conv", inputs[0], inputs[4].shape[0])(*others, _NONE))
        return super().autograd_kernel(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, table, t_pointers, t_rows, weight, _, ctx.activation = inputs
        ctx.vertices = x.shape[1]
        saved = (table, t_pointers, t_rows, x, weight, output if ctx.activation else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        table, t_pointers, t_rows, x, weight, output = ctx.saved_tensors
        dx, _, _, _, dweight, dbias, _ = tangents
        tables = (table, t_pointers, t_rows)
        terms = [] if dx is None else [spiral_conv(dx, *tables, weight, None, _NONE)]
        if dweight is not None:
            terms.append(spiral_conv(x, *tables, dweight, None, _NONE))
        if dbias is not None:
            terms.append(dbias.expand(x.shape[0], table.shape[1], -1))
        return _through_activation(sum(terms[1:], terms[0]), output, ctx.activation)


def _fake(
    x: Tensor,
    table: Tensor,
    t_pointers: Tensor,
    t_rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    return x.new_empty(x.shape[0], table.shape[1], weight.shape[0])


# A batch of meshes becomes more meshes. A batch of weights or output gradients becomes more output channels.


def _vmap(info: Any, dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    x, table, t_pointers, t_rows, weight, bias, activation = inputs
    in_x, *in_tables, in_weight, in_bias, _ = dims
    fixed_tables = all(dim is None for dim in in_tables)
    if fixed_tables and in_weight is None and in_bias is None:
        out = spiral_conv(merged(x, in_x), table, t_pointers, t_rows, weight, bias, activation)
        return out.unflatten(0, (info.batch_size, x.shape[0 if in_x else 1])), 0
    if fixed_tables and in_x is None and in_weight is not None:
        if bias is not None:
            bias = bias.repeat(info.batch_size) if in_bias is None else merged(bias, in_bias)
        out = spiral_conv(x, table, t_pointers, t_rows, merged(weight, in_weight), bias, activation)
        return out.unflatten(2, (info.batch_size, weight.shape[0 if in_weight else 1])), 2
    return one_by_one(spiral_conv, info.batch_size, dims, inputs)


_SpiralConvOp.register("spiral_conv", _fake, _vmap)


# ---- its gradient to x ----


def _input_grad_backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    table, t_pointers, t_rows, grad, weight = ctx.saved_tensors
    need_grad, _, _, _, need_weight, _ = ctx.needs_input_grad
    tables = (table, t_pointers, t_rows)
    return (
        spiral_conv(grad_x, *tables, weight, None, _NONE) if need_grad else None,
        None,
        None,
        None,
        weight_grad(grad, grad_x, *tables) if need_weight else None,
        None,
    )


class _InputGrad(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        grad, table, t_pointers, t_rows, weight, _ = inputs
        need_grad, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        kept = grad if need_weight else None, weight if need_grad else None
        ctx.save_for_backward(table, t_pointers, t_rows, *kept)
        out: Tensor = run(
            kernel("_spiral_conv_input_grad", grad, weight.shape[1] // max(table.shape[0], 1)), *inputs
        )
        return out

    backward = staticmethod(_input_grad_backward)


class _InputGradOp(OpFunction):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        grad, table, _, _, weight, _ = inputs
        op = kernel("_spiral_conv_input_grad", grad, weight.shape[1] // max(table.shape[0], 1))
        out: Tensor = run_at_level(op, *inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, table, t_pointers, t_rows, weight, ctx.vertices = inputs
        ctx.save_for_backward(table, t_pointers, t_rows, grad, weight)
        ctx.save_for_forward(table, t_pointers, t_rows, grad, weight)

    backward = staticmethod(_input_grad_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        table, t_pointers, t_rows, grad, weight = ctx.saved_tensors
        dgrad, _, _, _, dweight, _ = tangents
        terms = []
        if dgrad is not None:
            terms.append(input_grad(dgrad, table, t_pointers, t_rows, weight, ctx.vertices))
        if dweight is not None:
            terms.append(input_grad(grad, table, t_pointers, t_rows, dweight, ctx.vertices))
        return sum(terms[1:], terms[0])


def _fake_input_grad(
    grad: Tensor, table: Tensor, t_pointers: Tensor, t_rows: Tensor, weight: Tensor, vertices: int
) -> Tensor:
    return grad.new_empty(grad.shape[0], vertices, weight.shape[1] // table.shape[0])


def _vmap_input_grad(info: Any, dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[1:]):
        return one_by_one(input_grad, info.batch_size, dims, inputs)
    grad = inputs[0]
    out = input_grad(merged(grad, dims[0]), *inputs[1:])
    return out.unflatten(0, (info.batch_size, grad.shape[0 if dims[0] else 1])), 0


_InputGradOp.register("_spiral_conv_input_grad", _fake_input_grad, _vmap_input_grad)


# ---- its gradient to weight ----


def _weight_grad_backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
    table, t_pointers, t_rows, grad, x = ctx.saved_tensors
    need_grad, need_x, *_ = ctx.needs_input_grad
    tables = (table, t_pointers, t_rows)
    return (
        spiral_conv(x, *tables, grad_weight, None, _NONE) if need_grad else None,
        input_grad(grad, *tables, grad_weight, ctx.vertices) if need_x else None,
        None,
        None,
        None,
    )


class _WeightGrad(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        grad, x, table, t_pointers, t_rows = inputs
        need_grad, need_x = ctx.needs_input_grad[:2]
        ctx.vertices = x.shape[1]
        kept = grad if need_x else None, x if need_grad else None
        ctx.save_for_backward(table, t_pointers, t_rows, *kept)
        out: Tensor = run(kernel("_spiral_conv_weight_grad", grad, grad.shape[2]), *inputs)
        return out

    backward = staticmethod(_weight_grad_backward)


class _WeightGradOp(OpFunction):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        op = kernel("_spiral_conv_weight_grad", inputs[0], inputs[0].shape[2])
        out: Tensor = run_at_level(op, *inputs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, table, t_pointers, t_rows = inputs
        ctx.vertices = x.shape[1]
        ctx.save_for_backward(table, t_pointers, t_rows, grad, x)
        ctx.save_for_forward(table, t_pointers, t_rows, grad, x)

    backward = staticmethod(_weight_grad_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        table, t_pointers, t_rows, grad, x = ctx.saved_tensors
        dgrad, dx, *_ = tangents
        terms = [] if dgrad is None else [weight_grad(dgrad, x, table, t_pointers, t_rows)]
        if dx is not None:
            terms.append(weight_grad(grad, dx, table, t_pointers, t_rows))
        return sum(terms[1:], terms[0])


def _fake_weight_grad(grad: Tensor, x: Tensor, table: Tensor, t_pointers: Tensor, t_rows: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[2], table.shape[0] * x.shape[2])


def _vmap_weight_grad(info: Any, dims: Any, *inputs: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in dims[1:]):
        return one_by_one(weight_grad, info.batch_size, dims, inputs)
    grad = inputs[0]
    out = weight_grad(merged(grad, dims[0], into=2), *inputs[1:])
    return out.unflatten(0, (info.batch_size, grad.shape[2 if dims[0] == 3 else 3])), 0


_WeightGradOp.register("_spiral_conv_weight_grad", _fake_weight_grad, _vmap_weight_grad)
