"""Batch normalisation over the images of all processes, so that several processes train what one would."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.apply(gradients[0])


class SyncBatchNorm2d(nn.BatchNorm2d):
    """A `BatchNorm2d` whose training statistics are those of all processes, on any device: PyTorch's own
    `SyncBatchNorm` takes GPU tensors only.

    norm: the layer whose parameters and buffers it takes over; of timm's layers dropout and activation too.
    Forward: `(B, C, H, W)` of any floating dtype, to the same. Needs an initialised process group to train.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalise(x) if self.training else super().forward(x)))

    def _normalise(self, x: Tensor) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        count = values.new_tensor(x.numel() // x.shape[1])
        sums: Tensor = _Sum.apply(torch.cat([values.sum((0, 2, 3)), count[None]]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # About the mean, in a second exchange: a difference of large sums would lose what is small.
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (count / (count - 1)), rate)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        result = centred * scale[:, None, None]
        return (result + self.bias[:, None, None] if self.affine else result).to(x.dtype)


def synchronise(module: nn.Module, device: str) -> nn.Module:
    """Make every `BatchNorm2d` of a module, in place, normalise over the images of all processes.

    device: the type of the device that it will train on; PyTorch's `SyncBatchNorm` serves "cuda",
    `SyncBatchNorm2d` the others. Names and tensors of the state dict stay. Returns the module.
    """
    if device == "cuda":
        # timm's conversion and not PyTorch's, which would drop the activation that timm's layers include.
        return convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SyncBatchNorm2d(child))
        else:
            synchronise(child, device)
    return module
