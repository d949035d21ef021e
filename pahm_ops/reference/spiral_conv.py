"""Spiral convolution as SpiralNet++ defines it (Gong et al., arXiv:1911.05856): gather, then a linear map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "elu": F.elu, "gelu": F.gelu}


def spiral_conv(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x (B, N, C), indices (M, L) int64, weight (Cout, L*C), bias (Cout,) -> (B, M, Cout)."""
    batch, (rows, length), channels = x.shape[0], indices.shape, x.shape[2]
    gathered = x.index_select(1, indices.reshape(-1)).reshape(batch, rows, length * channels)
    return _ACTIVATIONS[activation](F.linear(gathered, weight, bias))
