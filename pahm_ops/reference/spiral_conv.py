"""Spiral convolution of SpiralNet++ (Gong et al., arXiv:1911.05856): gather, then a linear map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "elu": F.elu, "gelu": F.gelu}


def spiral_conv(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x (B, N, C), indices (M, L) int64, weight (Cout, L*C), bias (Cout,) -> (B, M, Cout)."""
    return ACTIVATIONS[activation](F.linear(gather(x, indices), weight, bias))


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """x (B, N, C), indices (M, L) int64 -> (B, M, L * C): the features of each spiral in a row."""
    rows, length = indices.shape
    return x.index_select(1, indices.reshape(-1)).reshape(x.shape[0], rows, length * x.shape[2])
