"""Pixel-aligned features: ours against grid_sample a scale, concatenated and transposed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pahm_ops import vertex_sample

BATCH = 32
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
#: vertices, and (channels, size) of the maps that are sampled at them
CASES = {
    "98 on 7x7": (98, ((256, 7),)),
    "195 on 14x14": (195, ((256, 14),)),
    "389 on 28x28": (389, ((128, 28),)),
    "778 on 56x56": (778, ((64, 56),)),
    "778 on all four": (778, ((256, 7), (256, 14), (128, 28), (64, 56))),
}


def baseline(maps: list[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
    points = camera[:, None, :1] * (vertices[..., :2] + camera[:, None, 1:])
    sampled = [F.grid_sample(m, points.unsqueeze(2), align_corners=False).squeeze(3) for m in maps]
    return torch.cat(sampled, 1).transpose(1, 2).contiguous()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def bench_vertex_sample(compare, direction, case, memory_format):
    count, scales = CASES[case]
    maps = [
        torch.randn(BATCH, channels, size, size).contiguous(memory_format=FORMATS[memory_format])
        for channels, size in scales
    ]
    vertices = 1.8 * torch.rand(BATCH, count, 3) - 0.9
    camera = torch.tensor([[0.9, 0.05, -0.05]]).repeat(BATCH, 1)
    inputs = [*maps, vertices, camera]
    for tensor in inputs:
        tensor.requires_grad_()
    compare(
        direction(lambda: vertex_sample(maps, vertices, camera), inputs),
        direction(lambda: baseline(maps, vertices, camera), inputs),
    )
