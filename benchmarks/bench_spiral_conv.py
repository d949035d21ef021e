"""Spiral convolution: ours against gather + linear, as in SpiralNet++."""

import pytest
import torch
from measure import Work

from pahm_ops import spiral_conv
from pahm_ops.reference import spiral_conv as reference

LENGTH = 9
#: vertices, input channels, output channels
LEVELS = [(98, 256, 256), (195, 256, 128), (389, 128, 64), (778, 64, 64)]
HEAD = (778, 64, 3)


#: a mesh's dtype and the number of meshes
BATCHES = [(torch.float32, 32), (torch.float32, 1), (torch.bfloat16, 32)]


def work(dtype: torch.dtype, batch: int, case: tuple[int, int, int], direction: str) -> Work:
    count, channels, out_channels = case
    weight = out_channels * LENGTH * channels
    products, passes = (1, 1) if direction == "forward" else (3, 2)
    rows = batch * count * (channels + out_channels)
    operations = 2 * batch * count * weight * products
    return Work(operations, dtype.itemsize * (rows + weight) * passes, dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype, batch", BATCHES, ids=["32", "1", "32, bfloat16"])
@pytest.mark.parametrize("case", [*LEVELS, HEAD], ids=lambda case: "{} vertices, {} to {}".format(*case))
def bench_spiral_conv(compare, compiled, timed, direction, case, dtype, batch):
    count, channels, out_channels = case
    x = torch.randn(batch, count, channels, dtype=dtype, requires_grad=True)
    # Neighbours in a mesh have nearby indices, so do the same here.
    offsets = torch.randint(-20, 21, (count, LENGTH))
    indices = (torch.arange(count)[:, None] + offsets).remainder(count)
    weight = (torch.randn(out_channels, LENGTH * channels) / (LENGTH * channels) ** 0.5).to(dtype)
    weight.requires_grad_()
    bias = torch.randn(out_channels, dtype=dtype, requires_grad=True)
    inputs = [x, weight, bias]
    theirs = {"gather + linear": reference.spiral_conv, **compiled(reference.spiral_conv)}
    contenders = {"ours": spiral_conv, **theirs}
    kind = ("spiral_conv to 3" if case == HEAD else "spiral_conv") + (
        ", bfloat16" if weight.itemsize == 2 else ""
    )
    compare(
        f"{kind}, batch {batch}, {direction}",
        {name: timed(lambda f=f: f(x, indices, weight, bias), inputs) for name, f in contenders.items()},
        work(dtype, batch, case, direction),
        tolerance=1e-4 if dtype == torch.float32 else 2e-2,
    )
