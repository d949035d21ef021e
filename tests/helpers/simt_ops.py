"""The three ops' CUDA kernels as functions of tensors, run on the CPU by the machine of tests/simt.

Each gives its results and what the machine counted. `*_least_bytes` is what such a call must move at least:
the sectors, of 32 bytes, of every input that it needs and of every result, each once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from paper_levels import Level
from simt_kernels import Counts, Kernels
from torch import Tensor

from pahm_ops import MeshTransform, SpiralTable
from pahm_ops.spiral_conv import ACTIVATIONS

MESH_POOL = Kernels("mesh_pool.cpp")
SPIRAL_CONV = Kernels("spiral_conv.cpp")
VERTEX_SAMPLE = Kernels("vertex_sample.cpp")


def _sectors(*tensors: Tensor | int) -> int:
    """Bytes of whole sectors; an int is a number of bytes."""
    return sum(-(-(t if isinstance(t, int) else t.nbytes) // 32) * 32 for t in tensors)


def hostile(table: Tensor, limit: int, every: int = 3) -> Tensor:
    """An int32 table with each `every`-th number out of [0, limit): by one, and by as much as there is."""
    table = table.int().clone()
    flat = table.view(-1)
    values = torch.tensor([-1, -2, -(2**31), 2**31 - 1, 2**31 - 2, 2**30, 10**6, limit, limit + 1])
    flat[::every] = values.int().repeat(flat.numel())[: flat[::every].numel()]
    return table


def list_bound(value: Tensor, count: int) -> int:
    """As csrc/kernels/common.cuh has it."""
    return int(value) if 0 <= value < count else count


# The order of a sum is held bit for bit, on numbers whose sum is another one in another order.


def wide_numbers(*shape: int) -> Tensor:
    """float32 of many magnitudes."""
    return torch.randn(shape) * 10 ** (torch.rand(shape) * 6)


def add_up(numbers: Tensor) -> Tensor:
    """The sum over the first dimension from its first entry to its last, rounded to float32 each time."""
    total = torch.zeros(numbers.shape[1:])
    for number in numbers:
        total = total + number
    return total


def assert_same_sum(actual: Tensor, numbers: Tensor) -> None:
    assert not torch.equal(add_up(numbers), add_up(numbers.flip(0))), "the order must matter"
    assert torch.equal(actual, add_up(numbers))


# ---- mesh_pool ----


def pool(
    x: Tensor, transform: MeshTransform, processors: int = 4, transposed: bool = False, **options: object
) -> tuple[Tensor, Counts]:
    rows = transform.backward if transposed else transform.forward
    height = transform.shape[1 if transposed else 0]
    out = torch.full((x.shape[0], height, x.shape[2]), torch.nan, dtype=x.dtype)
    sizes = x.shape[0], x.shape[1], height, x.shape[2], len(rows[1])
    wide = int(rows[2].dtype == torch.float64)
    return out, MESH_POOL.call("mesh_pool", x.dtype, wide, x, *rows, out, *sizes, processors, **options)


def pool_least_bytes(x: Tensor, transform: MeshTransform, transposed: bool = False) -> int:
    pointers, columns, values = transform.backward if transposed else transform.forward
    out = x.shape[0] * (len(pointers) - 1) * x.shape[2] * x.element_size()
    touched = x.shape[0] * columns.unique().numel() * x.shape[2] * x.element_size()
    return _sectors(touched, out, 4 * pointers.numel(), 4 * columns.numel(), values.nbytes)


# ---- spiral_conv ----


def spiral_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, vertices, rows, length, channels, out_channels = shape
    x = torch.randn(batch, vertices, channels).to(dtype)
    indices = torch.randint(0, vertices, (rows, length))
    weight = (torch.randn(out_channels, length * channels) / (length * channels) ** 0.5).to(dtype)
    grad = (torch.randn(batch, rows, out_channels) / out_channels**0.5).to(dtype)
    return x, indices, weight, torch.randn(out_channels).to(dtype), grad


def spiral_product(
    product: str,
    tensors: tuple[Tensor, ...],
    *,
    activation: str | None = None,
    bias: bool = True,
    processors: int = 4,
    **options: object,
) -> tuple[Tensor, Counts]:
    x, indices, weight, offset, grad = tensors
    (batch, vertices, channels), (rows, length), out_channels = x.shape, indices.shape, weight.shape[0]
    _, _, table, t_pointers, t_rows = SpiralTable.prepare(indices, vertices)
    shapes = {
        "forward": grad.shape,
        "input_grad": x.shape,
        "weight_grad": weight.shape,
    }
    out = torch.full(shapes[product], torch.nan, dtype=x.dtype)
    partial = torch.full((64 * out.numel(),), torch.nan, dtype=torch.float64)
    given: tuple[object, ...] = {
        "forward": (x, table, weight, offset if bias else None, ACTIVATIONS.index(activation)),
        "input_grad": (grad, t_pointers, t_rows, weight),
        "weight_grad": (grad, x, table),
    }[product]
    name = "spiral_conv" if product == "forward" else f"spiral_conv_{product}"
    sizes = (batch, vertices, rows, length, channels, out_channels, processors)
    counts = SPIRAL_CONV.call(name, x.dtype, *given, out, partial, partial.nbytes, *sizes, **options)
    return out, counts


def spiral_least_bytes(product: str, tensors: tuple[Tensor, ...]) -> int:
    """Without a bias."""
    x, indices, weight, _, grad = tensors
    return _sectors(x, grad, weight, 4 * indices.numel())


# ---- vertex_sample ----


@dataclass
class Scene:
    maps: list[Tensor]
    vertices: Tensor
    camera: Tensor | None
    grad: Tensor
    size: tuple[int, int]
    align_corners: bool = False
    border: bool = False


def scene(
    maps: list[tuple[int, int, int]],
    dtype: torch.dtype,
    *,
    batch: int = 2,
    count: int = 40,
    kind: str = "none",
    last: bool | list[bool] = False,
    align_corners: bool = False,
    border: bool = False,
    spread: float = 1.3,
) -> Scene:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    formats = last if isinstance(last, list) else [last] * len(maps)
    made = [
        torch.randn(batch, *m)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last if f else torch.contiguous_format)
        for m, f in zip(maps, formats, strict=True)
    ]
    points = (torch.rand(batch, count, 2, dtype=wide) * 2 - 1) * spread
    depth = torch.rand(batch, count, 1, dtype=wide) + 1
    camera, vertices = None, points
    if kind == "weak":
        vertices = torch.cat([points, depth], 2)
        two = torch.tensor([[0.9, 0.1, -0.1], [0.8, 0.0, 0.2]], dtype=wide)
        camera = two.repeat(batch, 1)[:batch].contiguous()
    elif kind == "perspective":
        vertices = torch.cat([points * 0.5 * depth, depth], 2)
        camera = torch.tensor([[20.0, 0.5, 10], [0, 22, 9], [0.01, 0, 1]], dtype=wide).repeat(batch, 1, 1)
    grad = torch.randn(batch, count, sum(m[0] for m in maps)).to(dtype)
    return Scene(made, vertices, camera, grad, (20, 22), align_corners, border)


def _memory(t: Tensor) -> Tensor:
    """A map as it lies in memory."""
    return t if t.is_contiguous() else t.permute(0, 2, 3, 1)


def _arguments(s: Scene) -> tuple[list[Tensor], int, list[int]]:
    sizes = [s.vertices.shape[0], s.vertices.shape[1], *s.size, int(s.align_corners), int(s.border)]
    for m in s.maps:
        sizes += [*m.shape[1:], int(not m.is_contiguous())]
    kind = 0 if s.camera is None else s.camera.dim() - 1
    return [_memory(m) for m in s.maps], kind, sizes


def sample(s: Scene, processors: int = 4, **options: object) -> tuple[Tensor, Counts]:
    maps, kind, sizes = _arguments(s)
    out = torch.full_like(s.grad, torch.nan)
    counts = VERTEX_SAMPLE.call(
        "vertex_sample",
        out.dtype,
        maps,
        s.vertices,
        s.camera,
        kind,
        out,
        len(maps),
        sizes,
        processors,
        **options,
    )
    return out, counts


def sample_backward(
    s: Scene, needs: tuple[bool, bool, bool] = (True, True, True), processors: int = 4, **options: object
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None, Counts]:
    """`needs`: of the maps, the vertices, the camera."""
    maps, kind, sizes = _arguments(s)
    grads = [torch.full_like(m, torch.nan) if needs[0] else None for m in maps]
    vertex_grad = torch.full_like(s.vertices, torch.nan) if needs[1] else None
    camera_grad = torch.full_like(s.camera, torch.nan) if needs[2] and s.camera is not None else None
    workspace = torch.full(
        (s.grad.numel() * 20 + 40 * len(maps) * sizes[0] * sizes[1] + 256,), 255, dtype=torch.uint8
    )
    counts = VERTEX_SAMPLE.call(
        "vertex_sample_backward", s.grad.dtype, s.grad, maps, s.vertices, s.camera, kind, grads, vertex_grad,
        camera_grad, workspace, workspace.numel(), len(maps), sizes, processors, **options,
    )  # fmt: skip
    moved = [
        g if g is None or m.is_contiguous() else g.permute(0, 3, 1, 2)
        for g, m in zip(grads, s.maps, strict=True)
    ]
    return moved, vertex_grad, camera_grad, counts


def level_scene(level: Level, shape: tuple[int, int], dtype: torch.dtype, batch: int, last: bool) -> Scene:
    """A hand's vertices on one feature map, by weak perspective."""
    channels, size = shape
    s = scene([(channels, size, size)], dtype, batch=batch, count=level.count, kind="weak", last=last)
    s.vertices[..., :2] = level.points
    assert s.camera is not None
    s.camera[:] = torch.tensor([1.0, 0.0, 0.0])
    return s


def sample_least_bytes(s: Scene, direction: str) -> int:
    """For one map and the same vertices, by weak perspective of scale 1, in every item."""
    (m,) = s.maps
    (batch, channels, height, width), per_sector = m.shape, 32 // m.element_size()
    corner = (((s.vertices[0, :, :2] + 1) * torch.tensor([width, height]) - 1) / 2).floor().long()
    touched = torch.zeros(height, width, dtype=torch.bool)
    for step in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = (corner + torch.tensor(step)).unbind(1)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        touched[y[inside], x[inside]] = True
    if m.is_contiguous():
        flat = touched.flatten().repeat(channels).nonzero().flatten()
        read = (flat // per_sector).unique().numel() * 32 * batch
    else:
        read = _sectors(int(touched.sum()) * channels * m.element_size() * batch)
    assert s.camera is not None
    common = read + _sectors(s.grad, s.vertices, s.camera)
    return common if direction == "forward" else common + _sectors(m, s.vertices, s.camera)
