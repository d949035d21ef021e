"""Spiral convolution: ours against gather + linear, as SpiralNet++ has it."""

import pytest
import torch

from pahm_ops import spiral_conv
from pahm_ops.reference import spiral_conv as reference

BATCH, LENGTH = 32, 9
#: vertices, input channels, output channels
CASES = [(98, 256, 256), (195, 256, 128), (389, 128, 64), (778, 64, 64), (778, 64, 3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{} vertices, {} to {}".format(*case))
def bench_spiral_conv(compare, direction, case):
    count, channels, out_channels = case
    x = torch.randn(BATCH, count, channels, requires_grad=True)
    # Neighbours in a mesh have indices near each other; so have these.
    offsets = torch.randint(-20, 21, (count, LENGTH))
    indices = (torch.arange(count)[:, None] + offsets).remainder(count)
    weight = (torch.randn(out_channels, LENGTH * channels) / (LENGTH * channels) ** 0.5).requires_grad_()
    bias = torch.randn(out_channels, requires_grad=True)
    inputs = [x, weight, bias]
    compare(
        direction(lambda: spiral_conv(x, indices, weight, bias), inputs),
        direction(lambda: reference.spiral_conv(x, indices, weight, bias), inputs),
    )
