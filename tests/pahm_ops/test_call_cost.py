"""What a call on a GPU costs the host before its kernel starts: dispatcher crossings and Python frames.

The tensors pretend: they hold no memory, and `backends` takes them for a GPU's. tests/simt/test_cuda_layer.py
counts what comes below the dispatcher.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pahm_ops import (
    MeshPool,
    MeshTransform,
    SpiralConv,
    SpiralTable,
    _library,
    mesh_pool,
    spiral_conv,
    vertex_sample,
)

pytestmark = pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled")
backends = sys.modules["pahm_ops.backends"]


class Costs:
    """Counts while `on`: the ops that the dispatcher was asked for, and our frames and what they call."""

    def __init__(self) -> None:
        self.on = False
        self.ops: list[str] = []
        self.frames: list[str] = []

    def note_frame(self, frame: Any, event: str, argument: object) -> None:
        # How PyTorch finds the method of a tensor like ours costs nothing on a GPU.
        if not self.on or event != "call" or frame.f_code.co_name == "__torch_dispatch__":
            return
        name, files = frame.f_code.co_name, []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if "simple_registry" not in files[0] and any("/pahm_ops/" in f and "/tests/" not in f for f in files):
            self.frames.append(name)


class OnGpu(Tensor):
    """A tensor without memory that does not say so. Its ops run on the meta device and are counted."""

    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl
    costs = Costs()
    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, requires_grad: bool = False) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, meta.stride(), dtype=meta.dtype, device="meta:0", requires_grad=requires_grad
        )

    def __init__(self, meta: Tensor, requires_grad: bool = False) -> None:
        self.meta = meta

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counting, cls.costs.on = cls.costs.on, False
        if counting:
            cls.costs.ops.append(op.__name__)
        out = op(*tree_map_only(cls, lambda t: t.meta, args), **(kwargs or {}))
        out = tree_map_only(Tensor, cls, out)
        cls.costs.on = counting
        return out


def on_gpu(tensors: Any, requires_grad: bool = False) -> Any:
    return tree_map_only(Tensor, lambda t: OnGpu(t.detach().to("meta"), requires_grad), tensors)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A machine whose GPUs are the meta device and have the compiled kernels."""
    monkeypatch.setattr(backends, "GPUS", (*backends.GPUS, "meta"))
    monkeypatch.setattr(backends, "_CHOSEN", {})
    monkeypatch.setattr(backends, "available", lambda path, device: path == "cuda")
    monkeypatch.delenv("PAHM_GPU_PATH", raising=False)
    # Where an exporter was imported, each call asks whether it is at work.
    monkeypatch.delitem(sys.modules, "torch.onnx", raising=False)


def count(function: Callable[[], object]) -> Costs:
    function()  # makes choices that later calls remember
    costs = OnGpu.costs = Costs()
    before = sys.getprofile()
    sys.setprofile(costs.note_frame)
    costs.on = True
    try:
        function()
    finally:
        costs.on = False
        sys.setprofile(before)
    return costs


def call(name: str, recorded: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call of a public function or module, and the leaves that it is differentiable in."""
    batch, vertices, channels, length = 2, 7, 32, 3
    indices = torch.randint(0, vertices, (vertices, length))
    matrix = torch.eye(vertices)[[1, 2, 3]].to_sparse()
    x, weight, bias = on_gpu(
        [
            torch.ones(batch, vertices, channels),
            torch.ones(channels, length * channels),
            torch.ones(channels),
        ],
        recorded,
    )
    if name == "spiral_conv":
        table = SpiralTable.prepare(indices, vertices)
        table = SpiralTable(vertices, *on_gpu(table[1:]))
        return lambda: spiral_conv(x, table, weight, bias), [x, weight, bias]
    if name == "mesh_pool":
        transform = MeshTransform.prepare(matrix)
        transform = MeshTransform(transform.shape, on_gpu(transform.forward), on_gpu(transform.backward))
        return lambda: mesh_pool(x, transform), [x]
    if name == "vertex_sample":
        maps = on_gpu([torch.ones(batch, 3, 4, 5), torch.ones(batch, 3, 2, 5)], recorded)
        points, camera = on_gpu([torch.ones(batch, vertices, 3), torch.ones(batch, 3)], recorded)
        return lambda: vertex_sample(maps, points, camera), [*maps, points, camera]
    module: nn.Module = MeshPool(matrix) if name == "MeshPool" else SpiralConv(channels, channels, indices)
    for part in module.modules():
        part._buffers.update(on_gpu(part._buffers))
    if isinstance(module, SpiralConv):
        module.layer.weight, module.layer.bias = nn.Parameter(weight, recorded), nn.Parameter(bias, recorded)
        return lambda: module(x), [x, *module.parameters()]
    return lambda: module(x), [x]


# Each limit is what was counted, so a new frame shows here.
@pytest.mark.parametrize(
    ("name", "op", "frames"),
    [
        ("spiral_conv", "spiral_conv", 24),
        ("SpiralConv", "spiral_conv", 31),
        ("mesh_pool", "mesh_pool", 22),
        ("MeshPool", "mesh_pool", 25),
        ("vertex_sample", "vertex_sample", 25),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_call_crosses_the_dispatcher_once(name, op, frames, recorded):
    function, _ = call(name, recorded)
    costs = count(function)
    assert costs.ops == [f"{op}.default"]
    # Autograd calls a function of ours, which saves its tensors.
    assert len(costs.frames) <= frames + (3 if recorded else 0), costs.frames


@pytest.mark.parametrize(
    ("name", "ops", "frames"),
    [
        (
            "spiral_conv",
            ["_spiral_conv_input_grad.default", "_spiral_conv_weight_grad.default", "sum.dim_IntList"],
            32,
        ),
        ("mesh_pool", ["mesh_pool.default"], 14),
        ("vertex_sample", ["_vertex_sample_backward.default"], 19),
    ],
)
def test_a_backward_crosses_the_dispatcher_once_an_op(name, ops, frames):
    function, leaves = call(name, True)
    out = function()
    grad = on_gpu(out)
    costs = count(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert costs.ops == ops
    assert len(costs.frames) <= frames, costs.frames
