"""Batch normalisation and the clamp that follows it, in one pass each way, on the CPU in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pahm_ops.autograd._shared import run
from pahm_ops.depthwise_conv import channels_last


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    epsilon: float,
    limits: tuple[float, float],
) -> Tensor:
    """`F.batch_norm(..., training=True)` and then a clamp: to (0, inf) for ReLU, (0, 6) for ReLU6.

    x `(B, C, H, W)`, see `pahm_ops.depthwise_conv.is_served`; weight, bias and the running statistics `(C,)`,
    float32. The running statistics are updated in place. Returns maps like x, in channels_last.
    Differentiable once, in x, weight and bias. Saves x alone, not what the clamp gets. The same bits for any
    number of threads.

    Raises ValueError for fewer than two numbers in a channel.
    """
    statistics = (running_mean, running_variance, momentum, epsilon)
    out: Tensor = _BatchNorm.apply(x, weight, bias, statistics, limits)
    return out


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running: Any, limits: Any) -> Tensor:
        op = torch.ops.pahm_ops._batch_norm.default
        out: Tensor
        out, statistics = run(op, x, weight, bias, *running, *limits)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.limits = limits
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        op = torch.ops.pahm_ops._batch_norm_backward.default
        found = run(op, channels_last(grad), x, weight, bias, statistics, *ctx.limits)
        return *found, None, None
