"""vertex_sample's CUDA kernels, run on the CPU by the machine of tests/simt."""

import numpy as np
import pytest
import torch
from paper_levels import MAPS, levels
from simt_kernels import DTYPES, SEEDS, Counts, needs_gxx
from simt_ops import (
    VERTEX_SAMPLE,
    Scene,
    add_up,
    assert_same_sum,
    level_scene,
    sample,
    sample_backward,
    sample_least_bytes,
    scene,
    wide_numbers,
)
from torch import Tensor

from pahm_ops.reference import vertex_sample as reference

pytestmark = needs_gxx

CAMERAS = ("none", "weak", "perspective")
#: of results of the order of 1
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def expected(s: Scene) -> tuple[Tensor, list[Tensor], Tensor, Tensor | None]:
    """The output and all gradients, in float64, of the rounded inputs."""
    maps = [m.double().requires_grad_() for m in s.maps]
    vertices = s.vertices.double().requires_grad_()
    camera = None if s.camera is None else s.camera.double().requires_grad_()
    mode = "border" if s.border else "zeros"
    out = reference.vertex_sample_gather(maps, vertices, camera, s.size, s.align_corners, mode, strict=False)
    leaves = [*maps, vertices, *([] if camera is None else [camera])]
    grads = torch.autograd.grad(out, leaves, s.grad.double())
    return out.detach(), list(grads[: len(maps)]), grads[len(maps)], None if camera is None else grads[-1]


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * scale)


def check(s: Scene, **options: object) -> None:
    dtype = s.grad.dtype
    out, map_grads, vertex_grad, camera_grad = expected(s)
    assert_close(sample(s, **options)[0], out, dtype)
    actual_maps, actual_vertices, actual_camera, _ = sample_backward(s, **options)
    for a, e in zip(actual_maps, map_grads, strict=True):
        assert_close(a, e, dtype)
    # Gradients of geometry are sums in float32, also of half-precision maps.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(actual_vertices, vertex_grad, wide)
    if camera_grad is not None:
        assert_close(actual_camera, camera_grad, wide)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kind", CAMERAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype, kind, align_corners, border, last):
    maps = [(16, 5, 6), (8, 9, 4)]
    check(scene(maps, dtype, kind=kind, last=last, align_corners=align_corners, border=border, count=20))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 30, 64, 71, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_channels(dtype, channels, last):
    check(
        scene([(channels, 4, 5)], dtype, last=last, batch=1, count=5 if channels > 100 else 20, kind="weak")
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("batch", "count"), [(1, 0), (1, 1), (1, 98), (1, 778), (1, 6890), (0, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_vertices(dtype, batch, count, last):
    check(scene([(4, 6, 5)], dtype, last=last, batch=batch, count=count, spread=0.5))


@pytest.mark.parametrize("last", [False, True])
def test_more_than_twenty_thousand_vertices(last):
    check(scene([(4, 13, 7), (0, 3, 3)], torch.float32, last=last, batch=1, count=20_003), races=False)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (90, 1), (40, 33), (70, 70)], ids=str)
def test_maps_of_several_tiles_and_bands(size, last):
    check(scene([(8, *size)], torch.float32, last=last, batch=1, count=60, border=True))


def test_a_map_too_wide_for_shared_memory_is_read_in_place():
    check(scene([(3, 2, 4000)], torch.float64, batch=1, count=30))


def test_both_memory_formats_in_one_call():
    check(
        scene([(4, 5, 6), (8, 3, 3), (4, 7, 2)], torch.float32, last=[False, True, False], kind="perspective")
    )


def test_all_vertices_in_one_cell():
    s = scene([(8, 6, 6)], torch.float32, batch=1, count=70, last=True)
    s.vertices = torch.full_like(s.vertices, 0.1)
    check(s)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vertices_on_the_border_outside_and_not_finite(dtype, align_corners, border, last):
    s = scene([(8, 4, 4)], dtype, batch=1, count=14, align_corners=align_corners, border=border, last=last)
    edge = torch.tensor(
        [-1.0, 1.0, -1.25, 1.25, 5.0, -5.0, 1e30, -1e30, float("nan"), float("inf"), 0.0, 0.5]
    )
    s.vertices[0, :12, 0] = edge
    s.vertices[0, 2:14, 1] = edge
    out, map_grads, *_ = expected(s)
    assert_close(sample(s)[0], out, dtype)
    actual, vertex_grad, *_ = sample_backward(s)
    assert_close(actual[0], map_grads[0], dtype)
    lost = ~s.vertices.isfinite().all(-1)
    assert lost.any() and not vertex_grad[lost].any() and vertex_grad.isfinite().all()


@pytest.mark.parametrize("last", [False, True])
def test_a_vertex_behind_the_camera_takes_nothing(last):
    s = scene([(8, 4, 4)], torch.float32, batch=1, kind="perspective", count=6, last=last)
    s.vertices[0, 2] = torch.tensor([0.0, 0.0, -1.0])  # its image would lie on the map
    s.vertices[0, 4, 2] = 0.0
    check(s)
    assert not sample(s)[0][0, [2, 4]].any()


@pytest.mark.parametrize("last", [False, True])
def test_only_what_is_wanted_is_written(last):
    s = scene([(8, 4, 4)], torch.float32, kind="weak", last=last)
    _, map_grads, vertex_grad, camera_grad = expected(s)
    maps, vertices, camera, _ = sample_backward(s, (True, False, False))
    assert vertices is None and camera is None
    assert_close(maps[0], map_grads[0], torch.float32)
    maps, vertices, camera, _ = sample_backward(s, (False, True, False))
    assert maps == [None] and camera is None
    assert_close(vertices, vertex_grad, torch.float32)
    assert_close(sample_backward(s, (False, False, True))[2], camera_grad, torch.float32)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("maps", [[(8, 6, 5), (16, 3, 3)], [(3, 5, 4)]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order(dtype, maps, last):
    """Packs of 16 bytes, and single numbers."""
    s = scene(maps, dtype, batch=1, kind="weak", last=last, count=40)
    first = sample(s)[0], *sample_backward(s)[:3]
    for seed in SEEDS:
        again = sample(s, seed=seed)[0], *sample_backward(s, seed=seed)[:3]
        assert torch.equal(again[0], first[0])
        assert all(torch.equal(a, b) for a, b in zip(again[1], first[1], strict=True))
        assert torch.equal(again[2], first[2]) and torch.equal(again[3], first[3])


@pytest.mark.parametrize("last", [False, True])
def test_sanitizers_find_nothing(last):
    check(
        scene([(8, 4, 5), (4, 3, 3)], torch.float32, kind="perspective", last=last, count=10), sanitize=True
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_traffic_at_the_papers_levels(dtype, level, last):
    s = level_scene(levels()[level], MAPS[level], dtype, batch=1, last=last)
    _, counts = sample(s)
    assert counts.dram_bytes <= 1.15 * sample_least_bytes(s, "forward")
    # A plane of 7 x 7 halves has no whole number of sectors.
    assert counts.sectors <= (1.1 if last or level > 0 else 1.15) * counts.ideal_sectors
    *_, counts = sample_backward(s)
    assert counts.atomics == 0
    # Of the coarsest level's half-precision planes the workspace is a sixth.
    assert counts.dram_bytes <= (1.2 if dtype == torch.float16 and level == 0 else 1.15) * sample_least_bytes(
        s, "backward"
    )
    if last:
        assert counts.sectors <= 1.1 * counts.ideal_sectors


# ---- from a float to an index ----


def cells(dtype: torch.dtype, side: int, points: Tensor, align_corners: bool, border: bool) -> Tensor:
    """(N, 3): whether x is on a map `side` pixels wide, its pixel, and how far inside, in millionths."""
    out = torch.full((len(points), 3), -7, dtype=torch.int32)
    vertices = torch.stack([points, torch.zeros_like(points)], 1).contiguous()
    VERTEX_SAMPLE.call("locate", dtype, vertices, len(points), side, align_corners, border, out)
    return out


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("side", [1, 7, 2**24 - 1, *range(2**24 + 1, 2**24 + 8), 2**26 + 3, 2**30 - 2])
def test_a_cell_begins_on_the_map_however_floats_round(side, dtype, border, align_corners):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    one = torch.tensor(1.0, dtype=wide)
    ends = [one, torch.nextafter(one, 0 * one), torch.nextafter(one, 2 * one), -one, 1e30 * one]
    points = torch.stack([*ends, 1 - one / side, 1 + one / side, -1 - one / side, 0.3 * one])
    found = cells(dtype, side, points, align_corners, border)
    there = found[:, 0] == 1
    assert there[8] and (not border or there.all())
    assert (found[there, 1] >= (0 if border else -1)).all() and (found[there, 1] < side).all()
    assert (found[there, 2] >= 0).all() and (found[there, 2] < 10**6).all()
    if border:
        assert int(found[4, 1]) == side - 1 or side > 2**24
        # As far as floats of this size tell pixels apart.
        assert side - 1 - int(found[4, 1]) <= np.spacing(np.float32(side)) / 2


@pytest.mark.parametrize("align_corners", [False, True])
def test_border_padding_reads_the_last_pixel_of_a_map_wider_than_floats_count(align_corners):
    side = 2**24 + 4  # side - 1 rounds up to it
    wide_map = torch.zeros(1, 1, 1, side)
    wide_map[..., -1] = 5
    points = torch.tensor([[[3.0, 0.0]]])
    out = torch.full((1, 1, 1), torch.nan)
    sizes = [1, 1, 0, 0, int(align_corners), 1, 1, 1, side, 0]
    VERTEX_SAMPLE.call("vertex_sample", torch.float32, [wide_map], points, None, 0, out, 1, sizes, 4)
    assert out.item() == 5


# ---- sorting the vertices by cell ----

CHUNK = 1024  # vertices that one launch sorts
NO_CELL = 2**31 - 2


def sort_vertices(
    points: Tensor, maps: list[tuple[int, int]], border: bool = False, **options: object
) -> tuple[Tensor, Tensor, Tensor, Counts]:
    """Cells, vertices and positions (B, maps, N) of points (B, N, 2) on maps (height, width)."""
    (batch, count), dtype = points.shape[:2], points.dtype
    numbers = [torch.full((batch, len(maps), count), -7, dtype=torch.int32) for _ in range(4)]
    positions = torch.full((batch, len(maps), count, 2), torch.nan, dtype=dtype)
    spare = numbers[2:] if count > CHUNK else [None, None]
    sizes = [batch, count, 0, 0, 0, int(border), *(n for h, w in maps for n in (1, h, w, 0))]
    made = [torch.zeros(batch, 1, *size, dtype=dtype) for size in maps]
    counts = VERTEX_SAMPLE.call(
        "sort_vertices", dtype, made, points, *numbers[:2], positions, *spare, len(maps), sizes, **options
    )
    return numbers[0], numbers[1], positions, counts


def check_order(
    points: Tensor, maps: list[tuple[int, int]], border: bool = False, **options: object
) -> Counts:
    """Holds the order to a stable sort by cell, computed in the same dtype; gives the counts."""
    cells, order, positions, counts = sort_vertices(points, maps, border, **options)
    for i, (height, width) in enumerate(maps):
        size = torch.tensor([width, height], dtype=points.dtype)
        pixels = ((points + 1) * size - 1) / 2
        if border:
            pixels = torch.minimum(pixels.clamp(min=0), size - 1)
        corner = pixels.floor()
        key = ((corner[..., 1] + 1) * (width + 1) + corner[..., 0] + 1).int()
        near = ((pixels >= -1) & (pixels < size)).all(-1)
        key, place = torch.where(near, key, NO_CELL).sort(dim=1, stable=True)
        assert torch.equal(cells[:, i], key) and torch.equal(order[:, i], place.int())
        inside = (pixels - corner).gather(1, place[..., None].expand(-1, -1, 2))
        assert torch.equal(positions[:, i][key < NO_CELL], inside[key < NO_CELL])
    return counts


@pytest.mark.parametrize("count", [1, 2, 31, 33, 778, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vertices_are_sorted_by_cell(dtype, count):
    points = torch.rand(2, count, 2, dtype=dtype) * 2.6 - 1.3
    counts = check_order(points, [(5, 4), (17, 9)])
    chunks = -(-count // CHUNK)
    assert counts.launches == 1 + (chunks - 1).bit_length() and counts.atomics == 0


@pytest.mark.parametrize("cells", ["many", "four", "one", "none"])
def test_more_than_twenty_thousand_vertices_are_sorted(cells):
    points = torch.rand(1, 20_011, 2) * 2 - 1
    if cells == "four":
        points = (points > 0).float() - 0.5
    elif cells != "many":
        points = torch.full_like(points, 0.1 if cells == "one" else 9.0)
    check_order(points, [(56, 56)])


def test_sorted_vertices_have_one_order_however_threads_run():
    points = torch.rand(1, 2 * CHUNK + 77, 2) * 3 - 1.5
    for seed in SEEDS[:4]:
        check_order(points, [(6, 7)], border=True, seed=seed)


def test_sorting_takes_n_log_n_steps():
    """Of warps, at global and at shared memory; the ratio of n log n is 9.7, of n^2 it is 64."""

    def steps(count: int) -> int:
        counts = sort_vertices(torch.rand(1, count, 2) * 2 - 1, [(56, 56)], races=False)[-1]
        return counts.requests + counts.shared_requests

    assert steps(16 * CHUNK) < 12 * steps(2 * CHUNK)


# ---- the order of sums ----


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [8, 3])
def test_a_pixel_adds_up_its_cells_rising_and_in_a_cell_the_vertices_rising(channels, last):
    """Vertices in the four cells around the pixel in the middle, a quarter of it each."""
    s = scene([(channels, 5, 5)], torch.float32, batch=1, count=60, last=last, align_corners=True)
    cell = torch.randint(0, 4, (60,))
    s.vertices[0] = torch.stack([cell % 2, cell // 2], 1) / 2 - 0.25
    s.grad = wide_numbers(*s.grad.shape)
    (grad,), *_ = sample_backward(s)
    rising = torch.argsort(cell, stable=True)
    assert_same_sum(grad[0, :, 2, 2], s.grad[0, rising] / 4)


def slope_scene(channels: int, count: int, kind: str, last: bool) -> Scene:
    """Two pixels, 0 and 1, so that a vertex' gradient in x is half the sum of its output gradients."""
    shape = [(channels, 1, 2)]
    s = scene(shape, torch.float32, batch=1, count=count, kind=kind, last=last, align_corners=True)
    s.maps[0][..., 0], s.maps[0][..., 1] = 0, 1
    s.vertices[..., :2] = 0
    s.grad = wide_numbers(*s.grad.shape)
    return s


def tree(lanes: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, in halves."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


@pytest.mark.parametrize("last", [False, True])
def test_a_vertex_adds_up_channels_lanes_and_slabs_in_one_order(last):
    s = slope_scene(384, 5, "none", last)
    grad = s.grad[0]
    if last:  # slabs of 32 lanes of 4 channels
        parts = tree(add_up(grad.view(5, 3, 32, 4).permute(3, 0, 1, 2)))
    else:  # slabs of 8 groups of 2 lanes of 4 channels
        lanes = grad.view(5, 6, 8, 2, 4).permute(2, 4, 0, 1, 3).flatten(0, 1)
        parts = tree(add_up(lanes))
    assert_same_sum(sample_backward(s)[1][0, :, 0] * 2, parts.t())


def test_a_camera_adds_up_threads_lanes_and_warps_in_one_order():
    s = slope_scene(1, 600, "weak", False)
    assert s.camera is not None
    s.camera[:] = torch.tensor([1.0, 0, 0])
    threads = torch.zeros(768)
    threads[:600] = s.grad[0, :, 0] / 2
    warps = tree(add_up(threads.view(3, 256)).view(8, 32))
    assert_same_sum(sample_backward(s)[2][0, 1], warps)


# Of whole sectors, so that the lanes stage runs of one length, which are counted together.
@pytest.mark.parametrize("width", [16, 32, 48, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_staged_planes_lie_in_different_banks(dtype, width):
    """The lanes of a vertex read one place of each plane."""
    s = scene([(32, 3, width)], dtype, batch=1, count=1, border=True)
    for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        s.vertices[:] = torch.tensor(corner)
        assert sample(s)[1].bank_conflicts == 0


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_staged_planes_have_room_for_whole_sectors_at_both_ends(dtype, width):
    """Three bands of 47 rows of cells: the middle one needs 48 rows of pixels, a multiple of the banks."""
    height = 139
    s = scene([(32, height, width)], dtype, batch=1, count=2 * height, align_corners=True, border=True)
    rows = torch.linspace(-1, 1, height)
    s.vertices[0] = torch.stack([torch.tensor([-1.0, 1.0]).repeat(height), rows.repeat_interleave(2)], 1)
    assert_close(sample(s)[0], expected(s)[0], dtype)
