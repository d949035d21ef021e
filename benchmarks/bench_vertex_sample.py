"""Pixel-aligned features: ours against one grid_sample per scale, concatenated and transposed."""

import pytest
import torch
import torch.nn.functional as F
from measure import FLOAT, Work
from torch import Tensor

from pahm_ops import vertex_sample

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: vertices, and (channels, size) of the maps sampled at them
LEVELS = {
    "98 on 7x7": (98, ((256, 7),)),
    "195 on 14x14": (195, ((256, 14),)),
    "389 on 28x28": (389, ((256, 28),)),
    "778 on 56x56": (778, ((256, 56),)),
}
CASES = {**LEVELS, "778 on all four": (778, ((256, 7), (256, 14), (128, 28), (64, 56)))}


def baseline(maps: list[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
    points = camera[:, None, :1] * (vertices[..., :2] + camera[:, None, 1:])
    sampled = [F.grid_sample(m, points.unsqueeze(2), align_corners=False).squeeze(3) for m in maps]
    return torch.cat(sampled, 1).transpose(1, 2).contiguous()


def work(batch: int, count: int, scales: tuple[tuple[int, int], ...], direction: str) -> Work:
    """Forward reads the touched pixels and writes features; backward reads both and writes maps."""
    read = sum(channels * min(size**2, 4 * count) for channels, size in scales)
    features = count * sum(channels for channels, _ in scales)
    maps = sum(channels * size**2 for channels, size in scales)
    if direction == "forward":
        return Work(8 * batch * features, FLOAT * batch * (read + features))
    return Work(24 * batch * features, FLOAT * batch * (2 * read + 2 * features + maps))


@pytest.mark.parametrize("batch", [32, 1])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def bench_vertex_sample(compare, compiled, timed, direction, case, memory_format, batch):
    count, scales = CASES[case]
    maps = [
        torch.randn(batch, channels, size, size).contiguous(memory_format=FORMATS[memory_format])
        for channels, size in scales
    ]
    vertices = 1.8 * torch.rand(batch, count, 3) - 0.9
    camera = torch.tensor([[0.9, 0.05, -0.05]]).repeat(batch, 1)
    inputs = [*maps, vertices, camera]
    for tensor in inputs:
        tensor.requires_grad_()
    contenders = {"ours": vertex_sample, "grid_sample": baseline, **compiled(baseline)}
    op = "vertex_sample" if case in LEVELS else "vertex_sample, four scales"
    compare(
        f"{op}, {memory_format}, batch {batch}, {direction}",
        {name: timed(lambda f=f: f(maps, vertices, camera), inputs) for name, f in contenders.items()},
        work(batch, count, scales, direction),
    )
