"""What the tests on a GPU share: the device, samples of the ops, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from op_samples import Sample
from torch import Tensor

from pahm_ops import MeshTransform, SpiralTable, mesh_pool, spiral_conv, vertex_sample
from pahm_ops.reference import mesh_pool as pool_reference
from pahm_ops.reference import spiral_conv as conv_reference
from pahm_ops.reference import vertex_sample as sample_reference
from pahm_ops.spiral_conv import ACTIVATIONS

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Of results of the order of 1, and relative to the largest beyond. In float32 the gradient of a
#: perspective camera is off by 5e-5; TF32 is by 3e-4.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FORMATS = {"NCHW": (False,), "channels_last": (True,), "mixed": (False, True)}


# ---- samples, on the current device of torch: `with DEVICE:` ----


def spiral_sample(
    shape: Sequence[int], dtype: torch.dtype, activation: str | None = None, bias: bool = True
) -> Sample:
    """shape: batch, vertices, rows, spiral length, channels in and out."""
    batch, vertices, rows, length, channels, out_channels = shape
    x = torch.randn(batch, vertices, channels).to(dtype)
    indices = torch.randint(0, vertices, (rows, length))
    weight = (torch.randn(out_channels, length * channels) / max(1, length * channels) ** 0.5).to(dtype)
    offset = torch.randn(out_channels).to(dtype) if bias else None

    def function(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return spiral_conv(x, indices, weight, bias, activation)

    def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv_reference.spiral_conv(x, indices, weight, bias, activation)

    arguments = (x, weight) if offset is None else (x, weight, offset)
    raw = (x, *SpiralTable.prepare(indices, x.shape[1])[2:], weight, offset, ACTIVATIONS.index(activation))
    return Sample(f"{shape}", function, definition, arguments, raw)


def pool_sample(
    batch: int, vertices: int, rows: int, channels: int, dtype: torch.dtype, entries: int = 3
) -> Sample:
    """`entries` a row, but for the last row, which has none."""
    columns = torch.randint(0, vertices, (entries * (rows - 1),))
    places = torch.stack([torch.arange(rows - 1).repeat_interleave(entries), columns])
    values = torch.rand(columns.shape, dtype=torch.float64)
    transform = MeshTransform.prepare(torch.sparse_coo_tensor(places, values, (rows, vertices)))
    x = torch.randn(batch, vertices, channels).to(dtype)
    return Sample(
        f"{batch} x {vertices} to {rows}, {channels} channels",
        lambda x: mesh_pool(x, transform),
        lambda x: pool_reference.mesh_pool(x, *transform.forward),
        (x,),
        (x, *transform.forward, *transform.backward),
    )


def image_points(batch: int, count: int, spread: float = 1.3) -> Tensor:
    """(B, N, 2) float64, normalised, some outside the image; none near a border of 7, 14, 28 or 56 pixels.

    There gradients jump, and one rounding decides on the side.
    """
    cells = torch.randint(round(-56 * spread), round(56 * spread), (batch, count, 2))
    return (cells + 0.1 + 0.8 * torch.rand(batch, count, 2, dtype=torch.float64)) / 56


def geometry(kind: str, points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Any]:
    """Vertices, camera and image size that put vertices at `points`, by align_corners=False."""
    batch, count = points.shape[:2]
    depth = torch.rand(batch, count, 1, dtype=torch.float64) + 1
    if kind == "points":
        return points.to(dtype), None, None
    if kind == "weak":
        camera = torch.rand(batch, 3, dtype=torch.float64) * 0.4 + torch.tensor([0.8, -0.2, -0.2])
        vertices = points / camera[:, None, :1] - camera[:, None, 1:]
        return torch.cat([vertices, depth], 2).to(dtype), camera.to(dtype), None
    camera = torch.tensor([[20.0, 0.5, 10], [0, 22, 9], [0.01, 0, 1]], dtype=torch.float64)
    camera = camera.repeat(batch, 1, 1)
    pixels = ((points + 1) * torch.tensor([22.0, 20.0]) - 1) / 2
    rays = torch.cat([pixels, torch.ones_like(depth)], 2) * depth
    return torch.linalg.solve(camera, rays.mT).mT.to(dtype).contiguous(), camera.to(dtype), (20, 22)


def map_sample(
    maps: Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None = None,
    size: tuple[int, int] | None = None,
    *,
    align: bool = False,
    padding: str = "zeros",
) -> Sample:
    def function(vertices: Tensor, *rest: Tensor) -> Tensor:
        given, *maps = (None, *rest) if camera is None else rest
        return vertex_sample(
            maps, vertices, given, image_size=size, align_corners=align, padding_mode=padding
        )

    def definition(vertices: Tensor, *rest: Tensor) -> Tensor:
        given, *maps = (None, *rest) if camera is None else rest
        return sample_reference.vertex_sample_gather(maps, vertices, given, size, align, padding, False)

    arguments = (vertices, *(() if camera is None else (camera,)), *maps)
    raw = (list(maps), vertices, camera, *(size or (0, 0)), align, padding == "border")
    return Sample("maps", function, definition, arguments, raw)


def feature_maps(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, batch: int = 2, layout: str = "NCHW"
) -> list[Tensor]:
    """Maps (B, C, H, W), their memory formats in turns."""
    kinds = FORMATS[layout]
    return [
        torch.randn(batch, *shape)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last if kinds[i % len(kinds)] else torch.contiguous_format)
        for i, shape in enumerate(shapes)
    ]


def op_sample(op: str, device: torch.device = DEVICE) -> Sample:
    """A sample of moderate size, in float32, on `device`."""
    with device:
        if op == "spiral_conv":
            return spiral_sample((4, 98, 98, 9, 64, 32), torch.float32, "elu")
        if op == "mesh_pool":
            return pool_sample(4, 98, 195, 64, torch.float32)
        maps = feature_maps([(32, 14, 14), (16, 28, 28)], torch.float32, 4, "mixed")
        return map_sample(maps, *geometry("perspective", image_points(4, 98), torch.float32))


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """That of vertices and camera: float32 with maps of half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- comparison ----


def close(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape, f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    if wanted.numel():
        error = (found.detach().double() - wanted).abs().max() / wanted.detach().abs().max().clamp(min=1)
        assert error <= tolerance, f"{name} is off by {float(error):.1e} of the largest value"


def compare(sample: Sample, tolerance: dict[torch.dtype, float] = TOLERANCE) -> list[Tensor]:
    """Holds an op's result and gradients to its definition in float64; gives both."""
    leaves = [a.detach().requires_grad_() for a in sample.arguments]
    wide = [a.detach().double().requires_grad_() for a in sample.arguments]
    out, wanted = sample.function(*leaves), sample.definition(*wide)
    assert out.is_contiguous() and out.dtype == leaves[-1].dtype and out.device == leaves[0].device
    close(f"the result of {sample.name}", out, wanted, tolerance[out.dtype])
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(wanted, wide, grad.double())
    for i, (leaf, a, b) in enumerate(zip(leaves, found, expected, strict=True)):
        assert a.dtype == leaf.dtype and a.device == leaf.device
        close(f"gradient {i} of {sample.name}", a, b, tolerance[a.dtype])
        if leaf.dim() == 4:
            last = not leaf.is_contiguous() and leaf.stride(1) == 1
            assert a.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return [out.detach(), *found]


def with_gradients(sample: Sample, grad: Tensor | None = None) -> Callable[[], list[Tensor]]:
    """A function without arguments that gives the result and its gradients, each time of the same memory.

    `grad` is the gradient of the result; without it, the result itself is.
    """
    leaves = [a.requires_grad_() for a in sample.arguments]

    def run() -> list[Tensor]:
        out = sample.function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, out.detach() if grad is None else grad)]

    return run


def expected(sample: Sample, grad: Tensor | None = None) -> list[Tensor]:
    """What `with_gradients` should give, in float64."""
    wide = [a.detach().double().requires_grad_() for a in sample.arguments]
    out = sample.definition(*wide)
    return [
        out.detach(),
        *torch.autograd.grad(out, wide, (out.detach() if grad is None else grad).double()),
    ]


def all_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        close(f"result {i}", a, b, TOLERANCE[a.dtype])


# ---- CUDA graphs ----


def warm_up(function: Callable[[], object]) -> None:
    """Loads kernels and makes tables, on a stream of its own, as PyTorch asks before a capture."""
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(DEVICE).wait_stream(side)


def capture(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays the graph of a call, and what the call gave."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results
