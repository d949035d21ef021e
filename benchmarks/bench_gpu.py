"""The ops on a GPU at the paper's levels: ours against what users have today (timed by gpu_measure.py)."""

from collections.abc import Callable

import pytest
import torch
from bench_mesh_pool import CASES as POOLS
from bench_mesh_pool import ENTRIES, csr, dense, gather_scatter
from bench_spiral_conv import HEAD, LENGTH, LEVELS
from bench_vertex_sample import CASES as SCENES
from bench_vertex_sample import FORMATS, baseline
from torch import Tensor

from pahm_ops import MeshTransform, mesh_pool, spiral_conv, vertex_sample
from pahm_ops.backends import choose
from pahm_ops.reference import spiral_conv as reference

pytest_plugins = ["gpu_measure"]

DEVICE = torch.device("cuda", 0)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

each_batch = pytest.mark.parametrize("batch", [32, 1])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def timed(
    direction: str, functions: dict[str, Callable[[], Tensor]], inputs: list[Tensor]
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The functions to time: they compute the result, or the result and the gradients of all inputs."""
    with torch.no_grad():
        grad = torch.randn_like(next(iter(functions.values()))())

    def forward(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(),)

    def backward(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = function()
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    run = forward if direction == "forward" else backward
    return {name: lambda f=f: run(f) for name, f in functions.items()}


@each_batch
@each_dtype
@pytest.mark.parametrize("case", [*LEVELS, HEAD], ids=lambda case: "{} {}-{}".format(*case))
def bench_spiral_conv_on_gpu(compare_on_gpu, compiled, direction, case, dtype, batch):
    (count, channels, out_channels), kind = case, DTYPES[dtype]
    with DEVICE:
        x = torch.randn(batch, count, channels).to(kind).requires_grad_()
        # Neighbours in a mesh have nearby indices, so do the same here.
        near = torch.arange(count)[:, None] + torch.randint(-20, 21, (count, LENGTH))
        indices = near.remainder(count)
        scale = (LENGTH * channels) ** -0.5
        weight = (scale * torch.randn(out_channels, LENGTH * channels)).to(kind).requires_grad_()
        bias = torch.randn(out_channels).to(kind).requires_grad_()
    theirs = {"gather + linear": reference.spiral_conv, **compiled(reference.spiral_conv)}
    functions = {
        name: lambda f=f: f(x, indices, weight, bias) for name, f in {"ours": spiral_conv, **theirs}.items()
    }
    compare_on_gpu(
        f"spiral_conv {count} {channels}-{out_channels} {direction} {dtype} batch {batch}",
        choose("spiral_conv", kind, DEVICE, out_channels),
        timed(direction, functions, [x, weight, bias]),
    )


@each_batch
@each_dtype
@pytest.mark.parametrize("case", POOLS, ids=lambda case: "{}-{} {}".format(*case))
def bench_mesh_pool_on_gpu(compare_on_gpu, compiled, direction, case, dtype, batch):
    (coarse, fine, channels), kind = case, DTYPES[dtype]
    with DEVICE:
        x = torch.randn(batch, coarse, channels).to(kind).requires_grad_()
        # Corners of a coarse triangle have nearby indices, so do the same here.
        near = torch.arange(fine)[:, None] * coarse // fine
        columns = (near + torch.rand(fine, 21).argsort(1)[:, :ENTRIES]).remainder(coarse)
        values = torch.rand(fine, ENTRIES).softmax(1).to(kind)
        places = torch.stack([torch.arange(fine).repeat_interleave(ENTRIES), columns.flatten()])
        matrix = torch.sparse_coo_tensor(places, values.flatten(), (fine, coarse)).coalesce()
        transform = MeshTransform.prepare(matrix)
        theirs = {
            "gather + scatter_add": gather_scatter(matrix),
            "dense": dense(matrix),
            "CSR": csr(matrix),
            **compiled(gather_scatter(matrix)),
        }
    ours = {"ours": lambda x: mesh_pool(x, transform)}
    functions = {name: lambda f=f: f(x) for name, f in (ours | theirs).items()}
    compare_on_gpu(
        f"mesh_pool {coarse}-{fine} {channels} {direction} {dtype} batch {batch}",
        choose("mesh_pool", kind, DEVICE),
        timed(direction, functions, [x]),
    )


def in_float32(maps: list[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
    """grid_sample as autocast runs it, because it rejects coordinates with a wider dtype than the maps."""
    return baseline([m.float() for m in maps], vertices, camera).to(maps[0].dtype)


@each_batch
@each_dtype
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", SCENES)
def bench_vertex_sample_on_gpu(compare_on_gpu, compiled, direction, case, layout, dtype, batch):
    (count, scales), kind = SCENES[case], DTYPES[dtype]
    with DEVICE:
        maps = [
            torch.randn(batch, channels, size, size)
            .to(kind)
            .contiguous(memory_format=FORMATS[layout])
            .requires_grad_()
            for channels, size in scales
        ]
        # Stay away from pixel borders, where gradients jump and a rounding error decides the side.
        cells = torch.randint(-50, 50, (batch, count, 3))
        points = (cells + 0.1 + 0.8 * torch.rand(batch, count, 3)) / 56
        camera = torch.tensor([[0.9, 0.05, -0.05]]).repeat(batch, 1).requires_grad_()
        vertices = (points / 0.9 - torch.tensor([0.05, -0.05, 0])).requires_grad_()
    theirs = {"grid_sample": in_float32, **compiled(in_float32)}
    functions = {
        name: lambda f=f: f(maps, vertices, camera) for name, f in {"ours": vertex_sample, **theirs}.items()
    }
    compare_on_gpu(
        f"vertex_sample {case} {layout} {direction} {dtype} batch {batch}",
        choose("vertex_sample", kind, DEVICE),
        timed(direction, functions, [*maps, vertices, camera]),
    )
