"""The cases of `vertex_sample` for tests/helpers/triton_cases.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import triton_checks as checks
from torch import Tensor
from triton_checks import DTYPES, TOLERANCE, check, name_of, on_device, random

from pahm_ops.reference import vertex_sample as reference

CAMERAS = ("points", "weak", "perspective")
FORMATS = {"nchw": torch.contiguous_format, "last": torch.channels_last}
SCALES = ((20, 5, 6), (3, 7, 4), (1, 2, 3))
Scene = tuple[list[Tensor], Tensor, "Tensor | None", "tuple[int, int] | None"]


def scene(
    kind: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    batch: int = 2,
    count: int = 13,
    scales: Sequence[Sequence[int]] = SCALES,
    geometry: torch.dtype | None = None,
) -> Scene:
    """Maps, vertices of which some lie outside the maps, camera and image size."""
    maps = [random(batch, *s).to(dtype).contiguous(memory_format=memory_format) for s in scales]
    points = random(batch, count, 2).clamp(-2, 2) * 0.8
    camera = size = None
    vertices = points
    if kind == "weak":
        camera = random(batch, 3).abs() * 0.2 + 0.7
        vertices = torch.cat([points, random(batch, count, 1)], 2)
    elif kind == "perspective":
        size = (224, 200)
        camera = torch.tensor([[210.0, 3, 101], [1, 190, 110], [0.01, -0.02, 1]], dtype=torch.float64)
        camera = camera.repeat(batch, 1, 1)
        depth = 0.5 + random(batch, count, 1).abs()
        vertices = torch.cat([points * 0.5 * depth, depth], 2)
    geometry = geometry or dtype
    return maps, vertices.to(geometry), None if camera is None else camera.to(geometry), size


def sample(
    maps: list[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    size: tuple[int, int] | None,
    align: bool = False,
    padding: str = "zeros",
    tolerance: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """Both functions; on a GPU the gradients of float32 twice."""
    from pahm_ops.triton import vertex_sample as ours

    tensors = [*maps, vertices] + ([] if camera is None else [camera])
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wide_maps, rest = wide[: len(maps)], wide[len(maps) :]
    wide_camera = rest[1] if camera is not None else None
    expected = reference.vertex_sample_gather(
        wide_maps, rest[0], wide_camera, size, align, padding, strict=False
    )
    grad = random(*expected.shape, seed=3).to(maps[0].dtype)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    arguments = (
        [on_device(m) for m in maps],
        on_device(vertices),
        on_device(camera),
        *(size or (0, 0)),
        align,
        padding == "border",
    )
    out = ours.vertex_sample(*arguments)
    assert out.is_contiguous()
    check("out", out, expected.detach(), maps[0].dtype, tolerance)

    def gradients() -> tuple[list[Tensor], Tensor, Tensor]:
        needs = [True] * (len(maps) + 2)
        return ours.vertex_sample_backward(on_device(grad), *arguments, needs)

    map_grads, *others = gradients()
    found = [*map_grads, *others][: len(wide)]
    if maps[0].dtype == torch.float32 and checks.device == "cuda":
        again, *rest = gradients()
        assert all(map(torch.equal, [*again, *rest], [*map_grads, *others])), "other bits"
    if camera is None:
        assert others[1].shape == (0,)
    for i, (tensor, a, b) in enumerate(zip(tensors, found, expected_grads, strict=True)):
        check(f"gradient {i}", a, b, tensor.dtype, tolerance)
    for feature, found_grad in zip(maps, map_grads, strict=True):
        last = not feature.is_contiguous() and feature.stride(1) == 1
        assert found_grad.is_contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
    return out.cpu(), [g.cpu() for g in found]


def sample_scene(dtype: torch.dtype, kind: str, layout: str, align: bool, padding: str) -> None:
    sample(*scene(kind, dtype, FORMATS[layout]), align, padding)


def sample_edges(layout: str, align: bool, padding: str) -> None:
    """On the border of the maps, on the last pixels' centres, far outside."""
    values = [-3e38, -100, -1.2, -1, 0, 1, 1e12]
    points = torch.cartesian_prod(*[torch.tensor(values)] * 2).unsqueeze(0)
    maps, *_ = scene("points", torch.float32, FORMATS[layout], 1, scales=((18, 5, 4), (2, 1, 1), (4, 1, 3)))
    _, grads = sample(maps, points, None, None, align, padding, tolerance=1e-5)
    assert (grads[-1][points.abs() > 10] == 0).all()


def sample_wide(dtype: torch.dtype, layout: str) -> None:
    scales = ((1025, 1, 2) if layout == "last" else (130, 1, 2), (71, 1, 2), (64, 3, 2), (30, 2, 1))
    sample(*scene("weak", dtype, FORMATS[layout], 1, 3, scales))


def sample_many_in_a_cell(layout: str) -> None:
    """All vertices in two cells: long lists, in the order of the vertices."""
    maps, vertices, *_ = scene("points", torch.float32, FORMATS[layout], 2, 40, ((24, 4, 4),))
    sample(maps, vertices * 0.1 + 0.02, None, None)


def sample_geometry_of_its_own(dtype: torch.dtype) -> None:
    maps, vertices, camera, size = scene("perspective", dtype, geometry=torch.float32)
    out, grads = sample(maps, vertices, camera, size, tolerance=TOLERANCE[dtype])
    assert [g.dtype for g in grads] == [dtype] * len(maps) + [torch.float32] * 2 and out.dtype == dtype


def sample_invalid(kind: str, padding: str) -> None:
    """Not finite, or behind the camera: zero features, zero gradients, as if the vertex were not there."""
    maps, vertices, camera, size = scene(kind, torch.float32)
    vertices[0, 3, 0], vertices[0, 4, -1], vertices[1, 5, 1] = torch.nan, torch.inf, -torch.inf
    bad = [(0, 3), (0, 4), (1, 5)]
    if kind == "perspective":
        vertices[1, 7, 2], vertices[1, 8, 2] = -1.0, 0.0
        vertices[1, 8, :2] = 0.0
        bad += [(1, 7), (1, 8)]
    out, grads = sample(maps, vertices, camera, size, False, padding)
    for b, n in bad:
        assert (out[b, n] == 0).all() and (grads[len(maps)][b, n] == 0).all()
    for value in () if camera is None else (torch.nan, torch.inf):
        camera[1].view(-1)[-1] = value
        out, grads = sample(maps, vertices, camera, size, False, padding)
        assert (out[1] == 0).all() and (grads[-1][1] == 0).all() and (out[0] != 0).any()


def sample_reads_four_pixels_only() -> None:
    from pahm_ops.triton import vertex_sample as ours

    feature = torch.full((1, 20, 4, 4), torch.nan)
    feature[:, :, 0, 0] = 1
    points = torch.tensor([[[-1.0, -1.0], [-1.2, -0.8], [1.0, 1.0]]])
    out = ours.vertex_sample([on_device(feature)], on_device(points), None, 0, 0, False, False)
    assert out[0, :2].isfinite().all() and out[0, 2].isnan().all()


def sample_any_strides() -> None:
    wide, last = random(2, 12, 8, 10), random(2, 8, 10, 24).permute(0, 3, 1, 2)
    for feature in (
        wide[:, ::2],
        wide[:, :, 2:7, 3:8],
        wide[..., ::2, ::3],
        last[:, 3:19],
        last[:, :, 1:5, 2:8],
        wide.transpose(2, 3),
        wide[:1].expand(2, -1, -1, -1),
        wide[:, :1].expand(-1, 4, -1, -1),
        wide[:, :, :1, :1].expand(-1, -1, 2, 3),
    ):
        _, vertices, *_ = scene("points", torch.float64, count=5)
        sample([feature], vertices, None, None)


def sample_empties() -> None:
    for batch, count in ((0, 5), (2, 0), (1, 1), (0, 0)):
        for kind in CAMERAS:
            _, grads = sample(*scene(kind, torch.float32, batch=batch, count=count))
            assert count or all((grad == 0).all() for grad in grads)
    sample([torch.zeros(2, 0, 3, 3), random(2, 4, 3, 3).float()], torch.zeros(2, 6, 2), None, None)


def sample_needs() -> None:
    """Each gradient is as with all the others, and what is not needed is empty."""
    from pahm_ops.triton import vertex_sample as ours

    maps, vertices, camera, _ = scene("weak", torch.float32)
    grad = random(2, 13, 24).float()
    arguments = on_device(grad), [on_device(m) for m in maps], on_device(vertices), on_device(camera)

    def backward(needs: list[bool]) -> list[Tensor]:
        map_grads, *others = ours.vertex_sample_backward(*arguments, 0, 0, False, False, needs)
        return [*map_grads, *others]

    full = backward([True] * 5)
    for wanted in ([], [0], [1, 2], [3], [4], [0, 4]):
        found = backward([i in wanted for i in range(5)])
        for i, (a, b) in enumerate(zip(found, full, strict=True)):
            if i in wanted:
                assert torch.equal(a, b)
            elif i == 3 and 4 in wanted:
                assert a.shape == b.shape
            else:
                assert a.shape == (0,) and a.dtype == b.dtype


def sample_beyond_32_bits(last: bool) -> None:
    """A view with huge strides; memory that is never written is never touched either."""
    from pahm_ops.triton import vertex_sample as ours

    memory = torch.empty(2**32 + 4096, dtype=torch.bfloat16, device=checks.device)
    strides = (0, 1, 2**31, 2**30) if last else (0, 2**30, 2**31, 1)
    feature = memory.as_strided((1, 2, 2, 2) if last else (1, 3, 2, 2), strides)
    feature.copy_(torch.arange(feature.numel()).view(feature.shape))
    points = torch.tensor([[[-0.5, -0.5], [0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]])
    wide = [feature.cpu().double()]
    expected = reference.vertex_sample(wide, points.double(), None, None, False, "zeros")
    found = ours.vertex_sample([feature], on_device(points), None, 0, 0, False, False)
    assert torch.equal(found.cpu().double(), expected)


#: float32 holds no more than every second one of the last pixels, and none of their number.
LONG = 2**24 + 3


def long_map(tall: bool) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A map, its last four pixels written; points at and past its end; its height and width."""
    line = torch.empty(LONG, device=checks.device)
    line[-4:] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    points = torch.tensor([[[1.0, 0.0], [1.5, 0.0], [3e38, 0.0]]])
    size = (LONG, 1) if tall else (1, LONG)
    return line.view(1, 1, *size), on_device(points.flip(2) if tall else points), size


def sample_past_what_floats_count(tall: bool) -> None:
    """With border padding the last pixel serves, and a vertex's cell is one of the map's."""
    from pahm_ops.triton import vertex_sample as ours

    feature, points, (height, width) = long_map(tall)
    for align in (False, True):
        options = None, 0, 0, align, True
        out = ours.vertex_sample([feature], points, *options)
        assert (out == 8).all(), out
        grads = ours.vertex_sample_backward(
            torch.ones_like(out), [feature], points, *options, [False, True, False]
        )
        assert (grads[1] == 0).all(), grads[1]
        keys = torch.empty(3, dtype=torch.int64, device=checks.device)
        ours._CELL.launch(
            [(3, "BLOCK_V")],
            [ours.config(4, 1, BLOCK_V=16)],
            **ours._geometry(points, None, 0, 0, align),
            keys=keys,
            positions=torch.empty(3, 2, device=checks.device),
            height=height,
            width=width,
            base=0,
            none=2 * (LONG + 1),
            BORDER=True,
        )
        assert (keys == (height if tall else 1) * (width + 1) + (1 if tall else width)).all(), keys


def sample_gradient_past_what_floats_count() -> None:
    from pahm_ops.triton import vertex_sample as ours

    feature, points, _ = long_map(False)
    candidates, ours._candidates = (
        ours._candidates,
        lambda rows, *_, **constants: [ours.config(4, 1, **{rows: 2**19}, BLOCK_C=1, **constants)],
    )
    try:
        grad = on_device(torch.tensor([[[1.0], [2.0], [4.0]]]))
        options = None, 0, 0, False, True
        [found], *_ = ours.vertex_sample_backward(grad, [feature], points, *options, [True, False, False])
    finally:
        ours._candidates = candidates
    assert found[0, 0, 0, -1] == 7 and found.count_nonzero() == 1, found[0, 0, 0, -4:]


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and functions."""
    flags = [(align, padding) for align in (False, True) for padding in ("zeros", "border")]
    for dtype in DTYPES:
        for kind in CAMERAS:
            for layout in FORMATS:
                for align, padding in flags:
                    # All combinations in one type, half of them in the others.
                    if dtype == torch.float64 or align == (padding == "border"):
                        name = f"{kind} {layout} {'corners' if align else 'edges'} {padding}"
                        given = (dtype, kind, layout, align, padding)
                        yield f"vertex_sample {name_of(dtype)} {name}", partial(sample_scene, *given)
        for layout in FORMATS:
            yield f"vertex_sample {name_of(dtype)} wide {layout}", partial(sample_wide, dtype, layout)
    for layout in FORMATS:
        yield f"vertex_sample many in a cell {layout}", partial(sample_many_in_a_cell, layout)
        yield f"vertex_sample beyond 32 bits {layout}", partial(sample_beyond_32_bits, layout == "last")
        for align, padding in flags:
            name = f"vertex_sample edges {layout} {'corners' if align else 'edges'} {padding}"
            yield name, partial(sample_edges, layout, align, padding)
    for kind in CAMERAS:
        for padding in ("zeros", "border"):
            yield f"vertex_sample invalid {kind} {padding}", partial(sample_invalid, kind, padding)
    for dtype in DTYPES[2:]:
        name = f"vertex_sample {name_of(dtype)} maps, float32 geometry"
        yield name, partial(sample_geometry_of_its_own, dtype)
    for tall in (False, True):
        name = f"vertex_sample past what floats count, {'tall' if tall else 'wide'}"
        yield name, partial(sample_past_what_floats_count, tall)
    yield "vertex_sample gradient past what floats count", sample_gradient_past_what_floats_count
    for function in (sample_reads_four_pixels_only, sample_any_strides, sample_empties, sample_needs):
        yield function.__name__, function
