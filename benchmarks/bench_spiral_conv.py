"""Spiral convolution: ours against gather + linear, as SpiralNet++ has it."""

import pytest
import torch
from measure import FLOAT, Work

from pahm_ops import spiral_conv
from pahm_ops.reference import spiral_conv as reference

LENGTH = 9
#: vertices, input channels, output channels
LEVELS = [(98, 256, 256), (195, 256, 128), (389, 128, 64), (778, 64, 64)]
HEAD = (778, 64, 3)


def work(batch: int, case: tuple[int, int, int], direction: str) -> Work:
    count, channels, out_channels = case
    weight = out_channels * LENGTH * channels
    products, passes = (1, 1) if direction == "forward" else (3, 2)
    rows = batch * count * (channels + out_channels)
    return Work(2 * batch * count * weight * products, FLOAT * (rows + weight) * passes)


@pytest.mark.parametrize("batch", [32, 1])
@pytest.mark.parametrize("case", [*LEVELS, HEAD], ids=lambda case: "{} vertices, {} to {}".format(*case))
def bench_spiral_conv(compare, compiled, timed, direction, case, batch):
    count, channels, out_channels = case
    x = torch.randn(batch, count, channels, requires_grad=True)
    # Neighbours in a mesh have indices near each other; so have these.
    offsets = torch.randint(-20, 21, (count, LENGTH))
    indices = (torch.arange(count)[:, None] + offsets).remainder(count)
    weight = (torch.randn(out_channels, LENGTH * channels) / (LENGTH * channels) ** 0.5).requires_grad_()
    bias = torch.randn(out_channels, requires_grad=True)
    inputs = [x, weight, bias]
    theirs = {"gather + linear": reference.spiral_conv, **compiled(reference.spiral_conv)}
    contenders = {"ours": spiral_conv, **theirs}
    compare(
        f"spiral_conv{' to 3' if case == HEAD else ''}, batch {batch}, {direction}",
        {name: timed(lambda f=f: f(x, indices, weight, bias), inputs) for name, f in contenders.items()},
        work(batch, case, direction),
    )
