"""Layers of the image encoder as a CPU trains them fastest.

PyTorch's own are made for inference: oneDNN lays out the weights of a convolution anew in each backward, has
no fast gradient of a depthwise one on a small map, and normalisation, activation and padding are passes of
their own. Results differ from those of the replaced layers by rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

from pahm_ops.batch_norm import batch_norm
from pahm_ops.depthwise_conv import depthwise_conv, is_served

_LIMITS: dict[type, tuple[float, float]] = {
    nn.Identity: (-math.inf, math.inf),
    nn.ReLU: (0.0, math.inf),
    nn.ReLU6: (0.0, 6.0),
}
"""Activations that are clamps, and to what they clamp."""


def use_training_layers(network: nn.Module) -> None:
    """Give the convolutions and normalisations in `network` a faster forward for training on a CPU.

    Parameters, buffers and their names stay as they are. A layer falls back to PyTorch's where it does not
    train, or does not get float32 maps in channels_last on a CPU.
    """
    for module in list(network.modules()):
        if type(module) is nn.Sequential:
            _join_activations(module)
        kind = type(module)
        if kind is nn.Conv2d and _is_pointwise(module):
            module.__class__ = PointwiseConv
        elif kind is nn.Conv2d and _is_depthwise(module):
            module.__class__ = DepthwiseConv
        elif kind is Conv2dSame and _is_depthwise(module):
            module.__class__ = DepthwiseConvSame
        elif kind is nn.BatchNorm2d and _is_plain(module):
            module.act = nn.Identity()
            module.__class__ = ClampedNorm
        elif kind is BatchNormAct2d and _is_plain(module) and _only_clamps(module):
            module.__class__ = ClampedNormAct


def _join_activations(block: nn.Sequential) -> None:
    """Move each activation that follows a normalisation into it."""
    for i in range(len(block) - 1):
        if type(block[i]) is nn.BatchNorm2d and _is_plain(block[i]) and type(block[i + 1]) in _LIMITS:
            block[i].act, block[i + 1] = block[i + 1], nn.Identity()
            block[i].__class__ = ClampedNorm


def _is_pointwise(conv: Any) -> bool:
    return bool(
        conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    )


def _is_depthwise(conv: Any) -> bool:
    same = conv.stride[0] == conv.stride[1] and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    channels = conv.groups == conv.in_channels == conv.out_channels > 1
    if not (same and channels and conv.bias is None) or isinstance(conv.padding, str):
        return False
    return all(pad < kernel for pad, kernel in zip(conv.padding, conv.kernel_size, strict=True))


def _is_plain(norm: Any) -> bool:
    return bool(norm.affine and norm.track_running_stats and norm.momentum is not None)


def _only_clamps(norm: Any) -> bool:
    return type(norm.drop) is nn.Identity and type(norm.act) in _LIMITS


def _served(module: nn.Module, x: Tensor) -> bool:
    return module.training and torch.is_grad_enabled() and is_served(x)


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution as a matrix product, whose gradients are matrix products too."""

    def forward(self, x: Tensor) -> Tensor:
        if not _served(self, x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution with equal padding on opposite sides."""

    padding: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        if not _served(self, x):
            return super().forward(x)
        (top, left), stride = self.padding, self.stride[0]
        height, width = (
            (side + 2 * pad - kernel) // stride + 1
            for side, pad, kernel in zip(x.shape[2:], (top, left), self.kernel_size, strict=True)
        )
        return depthwise_conv(x, self.weight, stride, (top, left), (height, width))


class DepthwiseConvSame(Conv2dSame):
    """A depthwise convolution with TensorFlow's padding: what is odd is added below and on the right."""

    def forward(self, x: Tensor) -> Tensor:
        if not _served(self, x):
            return super().forward(x)
        stride = self.stride[0]
        top, left = (
            get_same_padding(side, kernel, stride, 1) // 2
            for side, kernel in zip(x.shape[2:], self.kernel_size, strict=True)
        )
        height, width = (math.ceil(side / stride) for side in x.shape[2:])
        return depthwise_conv(x, self.weight, stride, (top, left), (height, width))


class ClampedNorm(nn.BatchNorm2d):
    """Batch normalisation and the activation `act`, which is a clamp or nothing."""

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if _served(self, x) else self.act(super().forward(x))


class ClampedNormAct(BatchNormAct2d):
    """The same of timm's layer."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x) if _served(self, x) else super().forward(x)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    norm.num_batches_tracked.add_(1)
    running = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
    return batch_norm(x, norm.weight, norm.bias, *running, _LIMITS[type(norm.act)])
