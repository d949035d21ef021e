"""The cost of a call on the host: one thread, with tensors so small that the work is negligible.

Compares each op, called in each way that users can, with what they would write in PyTorch. The tables are
made beforehand. The rows of a group take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahm_ops import (
    MeshPool,
    MeshTransform,
    SpiralConv,
    SpiralTable,
    mesh_pool,
    spiral_conv,
    vertex_sample,
)

BATCH, VERTICES, CHANNELS, LENGTH, OUT = 1, 16, 8, 5, 8


class GatherLinear(nn.Module):
    """A spiral convolution as SpiralNet++ writes it."""

    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self.indices = indices
        self.layer = nn.Linear(LENGTH * CHANNELS, OUT)

    def forward(self, x: Tensor) -> Tensor:
        gathered = torch.index_select(x, 1, self.indices.view(-1))
        return self.layer(gathered.view(x.shape[0], *self.indices.shape[:1], -1))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""Ours, and the same in PyTorch."""


def spirals(x: Tensor, prepared: bool) -> tuple[Pair, list[Tensor]]:
    indices = torch.randint(0, VERTICES, (VERTICES, LENGTH))
    table = SpiralTable.prepare(indices, VERTICES) if prepared else indices
    weight, bias = torch.randn(OUT, LENGTH * CHANNELS), torch.randn(OUT)
    theirs = lambda: F.linear(x[:, indices].flatten(2), weight, bias)  # noqa: E731
    return (lambda: spiral_conv(x, table, weight, bias), theirs), [x, weight, bias]


def spiral_modules(x: Tensor) -> tuple[Pair, list[Tensor]]:
    indices = torch.randint(0, VERTICES, (VERTICES, LENGTH))
    ours, theirs = SpiralConv(CHANNELS, OUT, indices), GatherLinear(indices)
    theirs.layer = ours.layer
    return (lambda: ours(x), lambda: theirs(x)), [x, *ours.parameters()]


def samples(x: Tensor) -> tuple[Pair, list[Tensor]]:
    feature, points = torch.randn(BATCH, CHANNELS, 4, 4), torch.rand(BATCH, VERTICES, 2)

    def grid_sample() -> Tensor:
        return F.grid_sample(feature, points[:, None], align_corners=False)[:, :, 0].transpose(1, 2)

    return (lambda: vertex_sample(feature, points), grid_sample), [feature, points]


def pools(x: Tensor, module: bool) -> tuple[Pair, list[Tensor]]:
    matrix = torch.rand(VERTICES // 2, VERTICES) * (torch.rand(VERTICES // 2, VERTICES) < 0.3)
    transform, pool = MeshTransform.prepare(matrix.to_sparse()), MeshPool(matrix.to_sparse())
    ours = (lambda: pool(x)) if module else (lambda: mesh_pool(x, transform))
    return (ours, lambda: torch.matmul(matrix, x)), [x]


CALLS: dict[str, tuple[str, Callable[[Tensor], tuple[Pair, list[Tensor]]]]] = {
    "spiral_conv": ("gather + linear", partial(spirals, prepared=True)),
    "spiral_conv, plain indices": ("gather + linear", partial(spirals, prepared=False)),
    "SpiralConv": ("SpiralNet++'s module", spiral_modules),
    "vertex_sample": ("grid_sample", samples),
    "mesh_pool": ("dense matmul", partial(pools, module=False)),
    "MeshPool": ("dense matmul", partial(pools, module=True)),
}


@pytest.mark.parametrize("mode", ["no gradient", "forward, recorded", "forward and backward"])
@pytest.mark.parametrize("name", CALLS)
def bench_call(compare, name, mode):
    other, make = CALLS[name]
    calls, leaves = make(torch.randn(BATCH, VERTICES, CHANNELS))
    recorded = mode != "no gradient"
    for leaf in leaves:
        leaf.requires_grad_(recorded)
    if mode == "forward and backward":
        grad = torch.ones_like(calls[0]())
        calls = tuple(lambda call=call: torch.autograd.grad(call(), leaves, grad) for call in calls)
    with torch.set_grad_enabled(recorded):
        compare(f"{name}, {mode}", {"ours": calls[0], other: calls[1]}, tolerance=1e-5)
