"""Each op on all of torch's threads against the same on one thread: the ratio is the gain from threads."""

from collections.abc import Callable

import pytest
import torch
from bench_spiral_conv import LEVELS as SPIRAL_LEVELS
from bench_vertex_sample import FORMATS, LEVELS
from torch import Tensor

from pahm_ops import MeshTransform, mesh_pool, spiral_conv, vertex_sample

BATCH = 32
OPS = ["spiral_conv", "mesh_pool", *(f"vertex_sample, {name}" for name in FORMATS)]


def on_threads(count: int, function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return run


def spiral_case() -> tuple[Callable[[], Tensor], list[Tensor]]:
    count, channels, out_channels = SPIRAL_LEVELS[2]
    x = torch.randn(BATCH, count, channels)
    indices = (torch.arange(count)[:, None] + torch.randint(-20, 21, (count, 9))).remainder(count)
    weight, bias = torch.randn(out_channels, 9 * channels), torch.randn(out_channels)
    return lambda: spiral_conv(x, indices, weight, bias), [x, weight, bias]


def pool_case() -> tuple[Callable[[], Tensor], list[Tensor]]:
    columns = torch.randint(0, 195, (389 * 3,))
    rows = torch.arange(389).repeat_interleave(3)
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), torch.rand(389 * 3), (389, 195))
    transform = MeshTransform.prepare(matrix)
    x = torch.randn(BATCH, 195, 128)
    return lambda: mesh_pool(x, transform), [x]


def sample_case(memory_format: torch.memory_format) -> tuple[Callable[[], Tensor], list[Tensor]]:
    count, ((channels, size),) = LEVELS["389 on 28x28"]
    maps = torch.randn(BATCH, channels, size, size).contiguous(memory_format=memory_format)
    points = 1.8 * torch.rand(BATCH, count, 2) - 0.9
    return lambda: vertex_sample([maps], points), [maps, points]


@pytest.mark.skipif(torch.get_num_threads() == 1, reason="torch has one thread")
@pytest.mark.parametrize("op", OPS)
def bench_threads(compare, timed, direction, op):
    if op == "spiral_conv":
        function, inputs = spiral_case()
    elif op == "mesh_pool":
        function, inputs = pool_case()
    else:
        function, inputs = sample_case(FORMATS[op.split(", ")[1]])
    for tensor in inputs:
        tensor.requires_grad_()
    run = timed(function, inputs)
    threads = torch.get_num_threads()
    contenders = {f"{threads} threads": run, "1 thread": on_threads(1, run)}
    compare(f"{threads} threads against one, {direction}", contenders)
