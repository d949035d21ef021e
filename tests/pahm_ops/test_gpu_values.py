"""The kernels for GPUs against the reference in float64 on the same device: results and first gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
from gpu_cases import (
    DEVICE,
    DTYPES,
    FORMATS,
    all_close,
    compare,
    expected,
    feature_maps,
    geometry,
    image_points,
    map_sample,
    pool_sample,
    spiral_sample,
    sum_type,
    with_gradients,
)

from pahm_ops import MeshPool, MeshTransform, SpiralConv, mesh_pool, vertex_sample
from pahm_ops.reference import mesh_pool as pool_reference

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

CAMERAS = ("points", "weak", "perspective")
CHANNELS = (1, 3, 30, 64, 71, 1025)
LAYOUTS = ("NCHW", "channels_last")
#: batch, vertices, rows, spiral length, channels in and out
SPIRALS = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 1, 9, 3, 5),
    (2, 98, 98, 9, 30, 30),
    (2, 98, 98, 27, 3, 3),
    (3, 98, 195, 9, 64, 64),
    (3, 50, 70, 9, 71, 66),
    (1, 5, 4, 1, 1025, 8),
    (1, 7, 5, 2, 8, 1025),
    (5, 60, 101, 1, 64, 1),
    (2, 778, 778, 27, 1, 30),
    (1, 6890, 6890, 9, 3, 3),
    (2, 6890, 6890, 1, 1, 8),
    # The paper's levels and the head.
    (32, 98, 98, 9, 256, 256),
    (32, 195, 195, 9, 256, 128),
    (32, 389, 389, 9, 128, 64),
    (32, 778, 778, 9, 64, 64),
    (32, 778, 778, 9, 64, 3),
    # Nothing to compute, or a sum of nothing.
    (0, 5, 5, 2, 3, 4),
    (2, 5, 0, 2, 3, 4),
    (2, 5, 5, 2, 0, 4),
    (2, 5, 5, 2, 3, 0),
]


def named(shape: tuple[int, ...]) -> str:
    # tools/gpu_check runs the small ones under compute-sanitizer.
    return f"{'small' if shape[0] * shape[2] < 1000 else 'large'} {shape}"


@pytest.mark.parametrize("shape", SPIRALS, ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spiral_conv(path, dtype, shape):
    with DEVICE:
        compare(spiral_sample(shape, dtype))


@pytest.mark.parametrize("out_channels", [3, 20])
@pytest.mark.parametrize("activation", ["relu", "elu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(path, dtype, activation, out_channels):
    with DEVICE:
        sample = spiral_sample((2, 20, 20, 3, 8, out_channels), dtype, activation)
        compare(sample)
        # Without a gradient GELU is fused as the others are.
        with torch.no_grad():
            out = sample.function(*sample.arguments)
    all_close([out], expected(sample)[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spiral_conv_takes_any_strides_and_no_bias(path, dtype):
    with DEVICE:
        compare(spiral_sample((2, 20, 20, 3, 8, 8), dtype, bias=False))
        sample = spiral_sample((2, 20, 20, 3, 8, 8), dtype)
        x, weight, bias = sample.arguments
        strided = (x.mT.contiguous().mT, weight.t().contiguous().t(), bias.repeat_interleave(2)[::2])
        run = with_gradients(sample)()
        moved = with_gradients(replace(sample, arguments=strided))()
    assert all(torch.equal(a, b) for a, b in zip(run, moved, strict=True))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mesh_pool(path, dtype, channels):
    with DEVICE:
        compare(pool_sample(2, 20, 39, channels, dtype))


@pytest.mark.parametrize(
    ("batch", "vertices", "rows"),
    [(1, 1, 1), (3, 2, 1), (1, 1, 98), (2, 98, 778), (1, 778, 6890), (2, 6890, 98), (0, 5, 4)],
)
def test_mesh_pool_of_any_size(path, batch, vertices, rows):
    with DEVICE:
        for dtype in DTYPES:
            compare(pool_sample(batch, vertices, rows, 4, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("vertices", "rows", "channels"), [(98, 195, 256), (195, 389, 128), (389, 778, 64), (778, 98, 64)]
)
def test_mesh_pool_at_the_papers_levels(path, dtype, vertices, rows, channels):
    with DEVICE:
        compare(pool_sample(32, vertices, rows, channels, dtype, entries=1 if rows < vertices else 3))


def test_mesh_pool_takes_sparse_tensors_of_the_device(path):
    with DEVICE:
        matrix = (torch.rand(9, 7) * (torch.rand(9, 7) < 0.4)).to_sparse()
        x = torch.randn(2, 7, 5)
        for given in (matrix, matrix.to_sparse_csr(), torch.zeros(9, 7).to_sparse()):
            wanted = given.to_dense().double() @ x.double()
            all_close([mesh_pool(x, given), mesh_pool(x, given)], [wanted, wanted])


def test_modules_follow_to_the_device(path):
    torch.manual_seed(0)
    indices = torch.randint(0, 7, (7, 3))
    transform = MeshTransform.prepare(torch.rand(9, 7).to_sparse())
    module = torch.nn.Sequential(SpiralConv(4, 5, indices, activation="elu"), MeshPool(transform))
    x = torch.randn(2, 7, 4)
    wanted = module(x)
    all_close([module.to(DEVICE)(x.to(DEVICE))], [wanted.double().to(DEVICE)])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", CAMERAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vertex_sample(path, dtype, kind, layout):
    with DEVICE:
        maps = feature_maps([(16, 5, 6), (3, 9, 4), (8, 3, 3), (1, 2, 7)], dtype, layout=layout)
        scene = geometry(kind, image_points(2, 30), sum_type(dtype))
        for align, padding in itertools.product((False, True), ("zeros", "border")):
            compare(map_sample(maps, *scene, align=align, padding=padding))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_maps_of_any_number_of_channels(path, channels, layout):
    with DEVICE:
        for dtype in DTYPES:
            maps = feature_maps([(channels, 4, 5)], dtype, layout=layout)
            compare(map_sample(maps, *geometry("weak", image_points(2, 20), sum_type(dtype))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "count"), [(0, 5), (2, 0), (0, 0), (1, 1), (3, 98), (2, 778), (1, 20_003)])
def test_any_number_of_vertices(path, batch, count, layout):
    with DEVICE:
        maps = feature_maps([(4, 7, 7), (8, 14, 14)], torch.float32, batch, layout)
        for kind in CAMERAS:
            found = compare(map_sample(maps, *geometry(kind, image_points(batch, count), torch.float32)))
            assert count or not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (90, 1), (40, 33), (150, 150)], ids=str)
def test_maps_of_any_size(path, size, layout):
    with DEVICE:
        maps = feature_maps([(8, *size)], torch.float32, layout=layout)
        compare(map_sample(maps, image_points(2, 60).float(), padding="border"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", [0, 1, 2, 3, 4], ids=["7", "14", "28", "56", "all four"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vertex_sample_at_the_papers_levels(path, dtype, scales, layout):
    count = (98, 195, 389, 778, 778)[scales]
    shapes = [(256, 7 << scales, 7 << scales)]
    if scales == 4:
        shapes = [(256, 7, 7), (256, 14, 14), (128, 28, 28), (64, 56, 56)]
    with DEVICE:
        maps = feature_maps(shapes, dtype, 32, layout)
        compare(map_sample(maps, *geometry("weak", image_points(32, count, 0.9), sum_type(dtype))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_geometry_of_half_precision(path, dtype):
    with DEVICE:
        for kind in CAMERAS:
            maps = feature_maps([(8, 5, 6), (3, 4, 4)], dtype)
            # Near the centre, where few products are lost to rounding.
            compare(map_sample(maps, *geometry(kind, image_points(2, 20, 0.5), dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("align", [False, True])
def test_vertices_on_the_border_outside_and_not_finite(path, align, padding, layout):
    edge = [-1.0, 1.0, -1.25, 1.25, 5.0, -5.0, 2.0**33, -1e30, 3e38, torch.nan, torch.inf, 0.0, 0.5]
    with DEVICE:
        points = torch.cartesian_prod(torch.tensor(edge), torch.tensor(edge)).unsqueeze(0)
        maps = feature_maps([(8, 4, 4), (3, 1, 1), (4, 1, 3)], torch.float32, 1, layout)
        out, vertex_grad, *map_grads = compare(map_sample(maps, points, align=align, padding=padding))
    lost = ~points.isfinite().all(-1)
    far = (points.abs() > 10) | lost.unsqueeze(-1)
    assert lost.any() and not out[lost].any() and not vertex_grad[far].any()
    assert all(gradient.isfinite().all() for gradient in (vertex_grad, *map_grads))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_vertex_behind_the_camera_takes_and_gives_nothing(path, padding, layout):
    with DEVICE:
        vertices, camera, size = geometry("perspective", image_points(2, 12), torch.float32)
        camera[:, 2, 0] = 0
        vertices[0, 2, 2], vertices[1, 4, 2], vertices[1, 5, 2] = -1.0, 0.0, torch.nan
        maps = feature_maps([(8, 4, 4)], torch.float32, layout=layout)
        out, vertex_grad, *_ = compare(map_sample(maps, vertices, camera, size, padding=padding))
        for b, n in ((0, 2), (1, 4), (1, 5)):
            assert not out[b, n].any() and not vertex_grad[b, n].any()
        # A camera that is not finite silences its batch item.
        camera[1, 0, 0] = torch.nan
        sample = map_sample(maps, vertices, camera, size, padding=padding)
        out, vertex_grad, camera_grad, _ = compare(sample)
    assert out[0].any() and not out[1].any() and not vertex_grad[1].any() and not camera_grad[1].any()


def test_only_the_four_pixels_are_read(path):
    with DEVICE:
        feature = torch.full((1, 20, 4, 4), torch.nan)
        feature[:, :, 0, 0] = 1
        points = torch.tensor([[[-1.0, -1.0], [-1.2, -0.8], [1.0, 1.0]]])
        for layout in (feature, feature.contiguous(memory_format=torch.channels_last)):
            out = vertex_sample(layout, points)
            assert out[0, :2].isfinite().all() and out[0, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_of_any_strides(path, dtype):
    with DEVICE:
        wide = torch.randn(2, 12, 8, 10).to(dtype)
        last = torch.randn(2, 8, 10, 24).to(dtype).permute(0, 3, 1, 2)
        points = image_points(2, 9).to(sum_type(dtype))
        for maps in (
            [wide[:, ::2], last[:, 3:19]],
            [wide[:, :, 2:7, 3:8], last[:, :, 1:5, 2:8]],
            [wide[..., ::2, ::3], wide.transpose(2, 3)],
            [wide[:1].expand(2, -1, -1, -1)],
            [wide[:, :1].expand(-1, 4, -1, -1), wide[:, :, :1, :1].expand(-1, -1, 2, 3)],
            [wide.flatten()[7 : 7 + 2 * 5 * 9 * 9].view(2, 5, 9, 9)],
        ):
            compare(map_sample(maps, points))
            compare(map_sample(maps, points.mT.contiguous().mT))


def test_gradients_only_where_they_are_wanted(path):
    with DEVICE:
        vertices, camera, _ = geometry("weak", image_points(2, 20), torch.float32)
        sample = map_sample(feature_maps([(3, 4, 4), (8, 6, 5)], torch.float32), vertices, camera)
        grad = torch.randn_like(sample.function(*sample.arguments))
        full = with_gradients(sample, grad)()[1:]
    for wanted in ([0], [1], [2], [3], [0, 3], [1, 2]):
        for i, argument in enumerate(sample.arguments):
            argument.requires_grad_(i in wanted)
        some = [sample.arguments[i] for i in wanted]
        found = torch.autograd.grad(sample.function(*sample.arguments), some, grad)
        all_close(found, [full[i].double() for i in wanted])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_vertices_in_one_cell(path, layout):
    with DEVICE:
        maps = feature_maps([(24, 6, 6)], torch.float32, layout=layout)
        compare(map_sample(maps, torch.full((2, 500, 2), 0.1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_numbers_survive_both_conversions(path, dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers.nan_to_num(1.0, torch.inf, -torch.inf).view(1, 64, 1024)
    out = mesh_pool(x.to(DEVICE), MeshTransform.prepare(torch.eye(64).to_sparse()).to(DEVICE))
    assert torch.equal(out.cpu(), x)


def test_half_precision_is_summed_in_float32(path):
    """2049 has no float16: neither a row's entries nor a vertex' gradients may be rounded on the way."""
    with DEVICE:
        x = torch.tensor([[[2048.0], [1.0], [-2048.0]]], dtype=torch.float16)
        transform = MeshTransform.prepare(torch.ones(1, 3).to_sparse())
        assert mesh_pool(x, transform).item() == 1
        assert pool_reference.mesh_pool(x, *transform.forward).item() == 1
        sample = spiral_sample((1, 1, 2, 1, 1, 2), torch.float16, bias=False)
        sample.arguments[1].copy_(torch.tensor([[1.0], [-1.0]]))
        grad = torch.tensor([[[2048.0, 2048.0], [1.0, 0.0]]], dtype=torch.float16)
        assert with_gradients(sample, grad)()[1].item() == 1
