"""Depthwise convolution on the CPU, for training: oneDNN's gradients are slow, most of all on small maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pahm_ops import _library
from pahm_ops.autograd._shared import run


def is_served(x: Tensor) -> bool:
    """Whether `depthwise_conv` and `pahm_ops.batch_norm.batch_norm` take `x`.

    They take `(B, C, H, W)` in channels_last, float32, on the CPU, where the kernels are compiled, outside
    autocast and `torch.compile`.
    """
    return (
        _library.LOADED
        and x.is_cpu
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def depthwise_conv(
    x: Tensor, weight: Tensor, stride: int, corner: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """`F.conv2d` with as many groups as channels, on zeros around `x`, of maps that are served.

    x `(B, C, H, W)`, see `is_served`; weight `(C, 1, KH, KW)`, float32; corner: rows and columns of zeros
    above and left of x, less than the kernel's; size `(OH, OW)` of the result. Zeros follow below and on the
    right as far as the size asks. Returns `(B, C, OH, OW)` in channels_last. Differentiable once, in x and
    weight, with the same bits for any number of threads.
    """
    out: Tensor = _DepthwiseConv.apply(x, weight, stride, corner, size)
    return out


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _DepthwiseConv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, corner: Any, size: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = (stride, *corner)
        op = torch.ops.pahm_ops._depthwise_conv.default
        out: Tensor = run(op, x, weight.squeeze(1), *ctx.place, *size)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        given, x_grad, weight_grad = channels_last(grad), None, None
        ops = torch.ops.pahm_ops
        if ctx.needs_input_grad[0]:
            op = ops._depthwise_conv_input_grad.default
            x_grad = run(op, given, weight.squeeze(1), *ctx.place, *x.shape[2:])
        if ctx.needs_input_grad[1]:
            op = ops._depthwise_conv_weight_grad.default
            weight_grad = run(op, given, x, *weight.shape[2:], *ctx.place).unsqueeze(1)
        return x_grad, weight_grad, None, None, None
