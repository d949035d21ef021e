import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from pahm_ops import backends, vertex_sample
from pahm_ops.reference import vertex_sample as reference

CAMERAS = ("points", "weak", "perspective")
FORMATS = (torch.contiguous_format, torch.channels_last)
PADDING = ("zeros", "border")
ALL = list(itertools.product(CAMERAS, FORMATS, (False, True), PADDING))
KINDS = list(itertools.product(CAMERAS, FORMATS))
SCALES = ((20, 7, 7), (3, 14, 9), (33, 5, 6), (1, 2, 3))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}

compiled = pytest.mark.skipif(
    backends()["vertex_sample"]["cpu"] == "reference", reason="no compiled kernels here"
)


def make(kind, dtype=torch.float64, memory_format=torch.contiguous_format, batch=2, count=37, scales=SCALES):
    """Maps, vertices (some of them outside the maps), camera and image size, all wanting gradients."""
    g = torch.Generator().manual_seed(7)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    maps = [(rand(batch, *s) - 0.5).to(dtype).contiguous(memory_format=memory_format) for s in scales]
    points = 3 * rand(batch, count, 2) - 1.5
    camera = size = None
    if kind == "points":
        vertices = points
    elif kind == "weak":
        camera = torch.cat([0.5 + rand(batch, 1), rand(batch, 2) - 0.5], 1)
        vertices = torch.cat([points / camera[:, None, :1] - camera[:, None, 1:], rand(batch, count, 1)], 2)
    else:
        size = (224, 200)
        camera = torch.tensor([[210.0, 3, 101], [1, 190, 110], [0.01, -0.02, 1]], dtype=torch.float64)
        camera = camera + 0.01 * rand(batch, 3, 3)
        pixels = (points + 1) / 2 * torch.tensor([200.0, 224.0])
        rays = torch.cat([pixels, torch.ones(batch, count, 1)], 2) * (0.5 + rand(batch, count, 1))
        vertices = torch.linalg.solve(camera, rays.mT).mT
    tensors = [*maps, vertices.to(dtype)] + ([] if camera is None else [camera.to(dtype)])
    for tensor in tensors:
        tensor.requires_grad_()
    return maps, tensors[len(maps)], tensors[-1] if camera is not None else None, size


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def check_against_reference(maps, vertices, camera, size, align_corners, padding_mode):
    tolerance = TOLERANCE[maps[0].dtype]
    options = {"image_size": size, "align_corners": align_corners, "padding_mode": padding_mode}
    out = vertex_sample(maps, vertices, camera, **options)
    expected = reference.vertex_sample(maps, vertices, camera, size, align_corners, padding_mode)
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.is_contiguous()
    assert relative(out, expected) < tolerance
    inputs = [*maps, vertices] + ([] if camera is None else [camera])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        out.dtype
    )
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad)
    for tensor, a, b in zip(inputs, ours, theirs, strict=True):
        assert a.dtype == tensor.dtype and a.shape == tensor.shape
        assert relative(a, b) < tolerance
    return out, ours


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "memory_format", "align_corners", "padding_mode"), ALL)
def test_equals_reference(dtype, kind, memory_format, align_corners, padding_mode):
    maps, vertices, camera, size = make(kind, dtype, memory_format)
    _, grads = check_against_reference(maps, vertices, camera, size, align_corners, padding_mode)
    for feature, grad in zip(maps, grads, strict=False):
        assert grad.is_contiguous(memory_format=memory_format), feature.shape


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("padding_mode", PADDING)
@pytest.mark.parametrize("align_corners", [False, True])
def test_one_map_equals_grid_sample(backend, memory_format, padding_mode, align_corners):
    maps, points, *_ = make("points", scales=((40, 9, 11),), memory_format=memory_format)
    expected = F.grid_sample(
        maps[0], points.unsqueeze(2), padding_mode=padding_mode, align_corners=align_corners
    )
    out = vertex_sample(maps[0], points, align_corners=align_corners, padding_mode=padding_mode)
    torch.testing.assert_close(out, expected.squeeze(3).transpose(1, 2))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("count", [2, 37, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_instruction_set(isa, dtype, count, memory_format):
    """Few vertices on a large map, and many on a small one, take different loops."""
    scales = ((17, 24, 25), (40, 7, 7), (5, 3, 40), (64, 1, 1), (300, 2, 2))
    maps, vertices, camera, size = make("weak", dtype, memory_format, count=count, scales=scales)
    check_against_reference(maps, vertices, camera, size, False, "zeros")


def test_bfloat16_maps_with_float32_geometry_are_rounded_once():
    maps, vertices, camera, size = make("perspective", torch.float32)
    halves = [feature.detach().bfloat16().requires_grad_() for feature in maps]
    out = vertex_sample(halves, vertices, camera, image_size=size)
    wide = [feature.float() for feature in halves]
    expected = vertex_sample(wide, vertices, camera, image_size=size)
    torch.testing.assert_close(out.float(), expected.bfloat16().float(), atol=0, rtol=2**-7)
    grad = torch.randn_like(expected).bfloat16()
    ours = torch.autograd.grad(out, [*halves, vertices, camera], grad)
    theirs = torch.autograd.grad(expected, [*halves, vertices, camera], grad.float())
    assert [g.dtype for g in ours] == [torch.bfloat16] * len(halves) + [torch.float32] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a.float(), b.float()) < 2**-7


def test_float16_is_served(backend):
    maps, points, *_ = make("points", torch.float16)
    expected = vertex_sample([feature.double() for feature in maps], points.double())
    tolerance = 1e-2 if backend == "reference" else 1e-3
    assert relative(vertex_sample(maps, points).double(), expected) < tolerance


@pytest.mark.parametrize(("kind", "memory_format", "align_corners", "padding_mode"), ALL)
def test_gradients_of_first_and_second_order(kind, memory_format, align_corners, padding_mode):
    maps, vertices, camera, size = make(
        kind, memory_format=memory_format, count=3, scales=((2, 3, 4), (1, 2, 2))
    )

    def sample(vertices, first, second, camera=None):
        return vertex_sample(
            [first, second],
            vertices,
            camera,
            image_size=size,
            align_corners=align_corners,
            padding_mode=padding_mode,
        )

    inputs = (vertices, *maps) if camera is None else (vertices, *maps, camera)
    assert gradcheck(sample, inputs)
    assert gradgradcheck(sample, inputs, fast_mode=True)


def test_gradients_only_where_they_are_wanted():
    maps, vertices, camera, _ = make("weak")
    everything = [*maps, vertices, camera]
    full = torch.autograd.grad(vertex_sample(maps, vertices, camera).sum(), everything)
    for wanted in ([0], [1, 3], [4], [5], [0, 5]):
        for i, tensor in enumerate(everything):
            tensor.requires_grad_(i in wanted)
        out = vertex_sample(maps, vertices, camera)
        some = torch.autograd.grad(out.sum(), [everything[i] for i in wanted])
        for i, grad in zip(wanted, some, strict=True):
            torch.testing.assert_close(grad, full[i])
    for tensor in everything:
        tensor.requires_grad_(False)
    assert not vertex_sample(maps, vertices, camera).requires_grad


@compiled
@pytest.mark.parametrize(("kind", "memory_format"), KINDS)
def test_opcheck(kind, memory_format):
    maps, vertices, camera, size = make(kind, torch.float32, memory_format, count=5)
    maps = [feature.detach() for feature in maps]
    vertices = vertices.detach()
    camera = None if camera is None else camera.detach()
    options = (*(size or (0, 0)), False, True)
    torch.library.opcheck(torch.ops.pahm_ops.vertex_sample.default, (maps, vertices, camera, *options))
    grad = torch.ones(2, 5, sum(feature.shape[1] for feature in maps))
    backward = torch.ops.pahm_ops._vertex_sample_backward.default
    for needs in ([True] * 6, [False, True, True, False, False, True], [False] * 4 + [True, False]):
        torch.library.opcheck(backward, (grad, maps, vertices, camera, *options, needs))


@pytest.mark.parametrize(("kind", "memory_format"), KINDS)
def test_compiles_without_a_graph_break(kind, memory_format):
    maps, vertices, camera, size = make(kind, torch.float32, memory_format)

    def loss(maps, vertices, camera):
        return vertex_sample([m * 2 for m in maps], vertices, camera, image_size=size).square().sum()

    inputs = [*maps, vertices] + ([] if camera is None else [camera])
    expected = torch.autograd.grad(loss(maps, vertices, camera), inputs)
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(graph(maps, vertices, camera), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiles_with_inductor():
    maps, vertices, camera, size = make("perspective", torch.float32, torch.channels_last)

    def loss(maps, vertices, camera):
        return vertex_sample([m * 2 for m in maps], vertices, camera, image_size=size).square().sum()

    graph = torch.compile(loss, fullgraph=True)
    inputs = [*maps, vertices, camera]
    expected = torch.autograd.grad(loss(maps, vertices, camera), inputs)
    for a, b in zip(torch.autograd.grad(graph(maps, vertices, camera), inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
def test_same_bits_for_any_number_of_threads(batch, dtype, memory_format):
    scales = ((300, 14, 14), (64, 28, 28), (20, 150, 150))
    maps, vertices, camera, _ = make("weak", dtype, memory_format, batch, 400, scales)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out = vertex_sample(maps, vertices, camera)
            results.append([out, *torch.autograd.grad(out, [*maps, vertices, camera], out.detach())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_compiled_graph_without_gradients():
    maps, vertices, camera, size = make("perspective", torch.float32)
    graph = torch.compile(vertex_sample, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = graph(maps, vertices, camera, image_size=size)
        assert torch.equal(out, vertex_sample(maps, vertices, camera, image_size=size))


@pytest.mark.parametrize(("kind", "memory_format"), KINDS)
@pytest.mark.parametrize("padding_mode", PADDING)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vertex_that_is_not_finite_has_zero_features_and_gradients(
    kind, memory_format, padding_mode, value
):
    maps, vertices, camera, size = make(kind, torch.float32, memory_format)
    options = {"image_size": size, "padding_mode": padding_mode}
    with torch.no_grad():
        bad = vertices.clone()
        bad[0, 3, 0] = value
        bad[1, 5, -1] = value
    bad.requires_grad_()
    out, grads = check_against_reference(maps, bad, camera, size, False, padding_mode)
    assert (out[0, 3] == 0).all() and (out[1, 5] == 0).all()
    vertex_grad = grads[len(maps)]
    assert (vertex_grad[0, 3] == 0).all() and (vertex_grad[1, 5] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    good = vertex_sample(maps, vertices, camera, **options)
    others = torch.ones(2, 37, dtype=torch.bool)
    others[0, 3] = others[1, 5] = False
    assert torch.equal(out[others], good[others])


@pytest.mark.parametrize(
    ("kind", "entry", "value"),
    [
        ("weak", 0, "nan"),
        ("weak", 1, "inf"),
        ("perspective", 0, "nan"),
        ("perspective", 8, "inf"),
        ("perspective", 8, "-inf"),
    ],
)
def test_a_camera_that_is_not_finite_silences_its_batch_item(kind, entry, value):
    maps, vertices, camera, size = make(kind)
    with torch.no_grad():
        camera[1].view(-1)[entry] = float(value)
    out, grads = check_against_reference(maps, vertices, camera, size, False, "border")
    assert (out[1] == 0).all() and (out[0] != 0).any()
    assert all(grad.isfinite().all() for grad in grads)


def test_nan_outside_the_four_pixels_is_not_read():
    feature = torch.full((1, 20, 4, 4), float("nan"))
    feature[:, :, 0, 0] = 1
    points = torch.tensor([[[-1.0, -1.0], [-1.2, -0.8], [1.0, 1.0]]])
    for layout in (feature, feature.contiguous(memory_format=torch.channels_last)):
        out = vertex_sample(layout, points)
        assert out[0, :2].isfinite().all() and out[0, 2].isnan().all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", PADDING)
def test_edges_and_far_outside(memory_format, align_corners, padding_mode):
    values = [0.0, 1.0, 1.1, 1.4, 3.0, 100.0, 2**31, 2**33, 1e12, 1e30, 3e38]
    values = torch.tensor(sorted({-v for v in values} | set(values)))
    points = torch.cartesian_prod(values, values).unsqueeze(0)
    maps, *_ = make(
        "points", torch.float32, memory_format, batch=1, scales=((18, 5, 4), (2, 1, 1), (20, 1, 3))
    )
    options = {"align_corners": align_corners, "padding_mode": padding_mode}
    out = vertex_sample(maps, points, **options)
    near = [F.grid_sample(m, points.clamp(-10, 10).unsqueeze(2), **options).squeeze(3) for m in maps]
    torch.testing.assert_close(out, torch.cat(near, 1).transpose(1, 2), rtol=1e-5, atol=1e-6)
    points.requires_grad_()
    vertex_sample(maps, points, **options).sum().backward()
    assert points.grad.isfinite().all()
    assert (points.grad[(points.detach().abs() > 10)] == 0).all()


@pytest.mark.parametrize("depth", [-0.25, 0.0])
def test_a_vertex_behind_the_camera_is_named(backend, depth):
    maps, vertices, camera, size = make("perspective", torch.float32)
    with torch.no_grad():
        camera[:] = torch.tensor([[200.0, 0, 112], [0, 200, 112], [0, 0, 1]])
        vertices[:, :, 2] = 1
        vertices[0, 9, 2] = float("nan")
        vertices[1, 8, 2] = depth
        vertices[1, 20, 2] = -3
    sentence = rf"vertex 8 of batch item 1 is behind the camera at depth {depth:g}"
    with pytest.raises(ValueError, match=sentence):
        vertex_sample(maps, vertices, camera, image_size=size)
    with pytest.raises(ValueError, match=sentence):
        reference.vertex_sample(maps, vertices, camera, size, False, "zeros")
    graph = torch.compile(vertex_sample, fullgraph=True, backend="aot_eager")
    if backend == "compiled":
        with pytest.raises(ValueError, match=sentence):
            graph(maps, vertices, camera, image_size=size)
    else:
        assert (graph(maps, vertices, camera, image_size=size)[1, [8, 20]] == 0).all()


def test_any_strides():
    maps, points, *_ = make("points", scales=((16, 7, 9),))
    base = maps[0].detach()
    wide = torch.randn(2, 40, 14, 20, dtype=base.dtype)
    last = torch.randn(2, 14, 20, 40, dtype=base.dtype)
    layouts = {
        "every second channel": wide[:, ::2],
        "a window of planes": wide[:, :, 2:11, 3:17],
        "every second pixel": wide[..., ::2, ::3],
        "a slice of channels_last": last.permute(0, 3, 1, 2)[:, 3:27],
        "a window of channels_last": last.permute(0, 3, 1, 2)[:, :, 1:9, 2:8],
        "transposed": wide.transpose(2, 3),
        "one map for the batch": wide[:1].expand(2, -1, -1, -1),
        "one channel for all": wide[:, :1].expand(-1, 20, -1, -1),
        "one pixel for all": wide[:, :, :1, :1].expand(-1, -1, 4, 5),
        "offset storage": wide.flatten()[7 : 7 + 2 * 20 * 9 * 9].view(2, 20, 9, 9),
    }
    for name, layout in layouts.items():
        dense = layout.contiguous().requires_grad_()
        strided = layout.detach().requires_grad_()
        for points_ in (points, points.transpose(0, 1).contiguous().transpose(0, 1)):
            expected = vertex_sample(dense, points_)
            out = vertex_sample(strided, points_)
            torch.testing.assert_close(out, expected, msg=name)
            grad = torch.randn(out.shape[2], out.shape[1], 2, dtype=out.dtype).permute(2, 1, 0)
            ours = torch.autograd.grad(out, [strided, points_], grad)
            theirs = torch.autograd.grad(expected, [dense, points_], grad.contiguous())
            torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty_and_single(memory_format):
    for batch, count in ((0, 5), (2, 0), (1, 1), (0, 0)):
        for kind in CAMERAS:
            maps, vertices, camera, size = make(kind, torch.float32, memory_format, batch, count)
            out = vertex_sample(maps, vertices, camera, image_size=size)
            assert out.shape == (batch, count, sum(feature.shape[1] for feature in maps))
            inputs = [*maps, vertices] + ([] if camera is None else [camera])
            grads = torch.autograd.grad(out.sum(), inputs)
            assert [g.shape for g in grads] == [i.shape for i in inputs]
            if count == 0:
                assert all((grad == 0).all() for grad in grads)
    empty = torch.zeros(2, 0, 3, 3, requires_grad=True)
    out = vertex_sample([empty, torch.ones(2, 4, 3, 3)], torch.zeros(2, 6, 2))
    assert torch.equal(out, torch.ones(2, 6, 4))
    out.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("last", [False, True])
def test_offsets_beyond_32_bits(last):
    """A view with huge strides; memory that is never written is never touched either."""
    memory = torch.empty(2**32 + 4096, dtype=torch.bfloat16)
    strides = (0, 1, 2**31, 2**30) if last else (0, 2**30, 2**31, 1)
    feature = memory.as_strided((1, 2, 2, 2) if last else (1, 3, 2, 2), strides)
    feature.copy_(torch.arange(feature.numel()).view(feature.shape))
    points = torch.tensor([[[-0.5, -0.5], [0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]])
    expected = vertex_sample(feature.float().clone(), points)
    torch.testing.assert_close(vertex_sample(feature, points).float(), expected)


def test_autocast_takes_maps_of_several_dtypes():
    maps, vertices, camera, _ = make("weak", torch.float32)
    mixed = [maps[0].bfloat16(), *maps[1:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vertex_sample(mixed, vertices, camera)
        narrow = vertex_sample(mixed[:1], vertices.bfloat16(), camera)
    assert out.dtype == torch.float32 and narrow.dtype == torch.bfloat16


@compiled
def test_large_results_ask_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("no huge pages here")
    out = vertex_sample([torch.randn(1, 64, 4, 4)], torch.rand(1, 1 << 16, 2))
    middle = out.data_ptr() + out.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if name.endswith(":"):
            if inside and name == "VmFlags:":
                assert "hg" in rest
                return
        else:
            first, last = (int(address, 16) for address in name.split("-"))
            inside = first <= middle < last
    pytest.skip("the system does not tell the flags of memory")
