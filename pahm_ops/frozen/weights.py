"""Weights and index tables of convolutions, in the form that the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from pahm_ops.frozen.tape import Node


def fold(weight: Tensor, bias: Tensor | None, norm: Node | None) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias, with the normalisation after it."""
    offset = weight.new_zeros(len(weight)) if bias is None else bias
    if norm is None:
        return weight, offset
    gamma, beta, mean, variance = norm.args[1:5]
    factor = 1 / torch.sqrt(variance.double() + norm.args[7])
    if gamma is not None:
        factor = factor * gamma
    offset = (offset - mean.double()) * factor + (0 if beta is None else beta)
    return (weight.double() * factor[:, None, None, None]).float(), offset.float()


def tap_tables(
    size: tuple[int, int],
    out: tuple[int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    pads: tuple[int, ...],
    dilation: tuple[int, int],
) -> list[Tensor]:
    """For each tap of a kernel the pixel that each output pixel reads, or -1 beyond the map: int32."""
    found = []
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            y = torch.arange(out[0]) * stride[0] - pads[0] + ky * dilation[0]
            x = torch.arange(out[1]) * stride[1] - pads[1] + kx * dilation[1]
            inside = ((y >= 0) & (y < size[0]))[:, None] & ((x >= 0) & (x < size[1]))[None]
            index = torch.where(inside, y[:, None] * size[1] + x[None], -1)
            found.append(index.flatten().to(torch.int32))
    return found


def winograd(weight: Tensor) -> Tensor:
    """The weight of a 3 x 3 convolution `(N, C, 3, 3)` for Winograd's F(2 x 2, 3 x 3): `(N, 16 * C)`."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    columns = torch.einsum("ij,nckj->ncki", g, weight.double())
    return torch.einsum("ik,nckj->nijc", g, columns).flatten(1).float()
