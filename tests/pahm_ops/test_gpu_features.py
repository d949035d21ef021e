"""What holds on a GPU beside the values: derivatives, autocast, TF32, the same bits, compilers, errors."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_cases import (
    DEVICE,
    DTYPES,
    TOLERANCE,
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
from op_samples import OPS, Sample, samples
from torch import Tensor
from torch.func import jvp, vmap

from pahm_ops import MeshTransform, SpiralTable, mesh_pool, spiral_conv, vertex_sample

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

EACH = [pytest.param(op, i, id=f"{op}-{s.name}") for op in OPS for i, s in enumerate(samples(op))]
each = pytest.mark.parametrize(("op", "index"), EACH)
each_op = pytest.mark.parametrize("op", OPS)


def small(op: str, index: int, dtype: torch.dtype = torch.float64) -> Sample:
    with DEVICE:
        return samples(op, dtype)[index]


def at_a_level(op: str, dtype: torch.dtype = torch.float32, batch: int = 8) -> Sample:
    """An op as the paper's decoder calls it; sums long enough to be split between blocks."""
    with DEVICE:
        if op == "spiral_conv":
            return spiral_sample((batch, 98, 98, 9, 256, 256), dtype, "elu")
        if op == "mesh_pool":
            return pool_sample(batch, 389, 778, 64, dtype)
        maps = feature_maps([(256, 28, 28), (64, 14, 14)], dtype, batch, "mixed")
        return map_sample(maps, *geometry("weak", image_points(batch, 389, 0.9), sum_type(dtype)))


@contextmanager
def switched(setting: Callable[[object], None], on: object, off: object) -> Iterator[None]:
    setting(on)
    try:
        yield
    finally:
        setting(off)


@each
def test_samples_of_any_dtype(path, op, index):
    for dtype in DTYPES:
        compare(small(op, index, dtype))


@each
def test_higher_derivatives(path, op, index):
    """That of vertex_sample's gradient is PyTorch's own, whose sums on a GPU have no fixed order."""
    sample = small(op, index)
    assert torch.autograd.gradgradcheck(sample.function, sample.leaves(), nondet_tol=1e-9)


@each
def test_forward_mode(path, op, index):
    sample = small(op, index)
    tangents = tuple(torch.randn_like(a) for a in sample.arguments)
    found, wanted = (jvp(f, sample.arguments, tangents) for f in (sample.function, sample.definition))
    all_close(found, wanted)


@each
def test_vmap(path, op, index):
    sample = small(op, index)
    several = tuple(torch.stack([a, 0.9 * a, 1.1 * a]) for a in sample.arguments)
    for only in range(len(several)):
        dims = tuple(0 if i == only else None for i in range(len(several)))
        given = [
            s if i == only else a for i, (s, a) in enumerate(zip(several, sample.arguments, strict=True))
        ]
        all_close([vmap(sample.function, dims)(*given)], [vmap(sample.definition, dims)(*given)])
    all_close([vmap(sample.function)(*several)], [vmap(sample.definition)(*several)])


@each
def test_opcheck(path, op, index):
    raw = small(op, index, torch.float32).raw
    differentiable = raw[:1] if op == "mesh_pool" else raw
    for leaf in torch.utils._pytree.tree_leaves(differentiable):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.pahm_ops, op), raw)


@each_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(path, op, dtype):
    """One like a linear layer follows it, others do not; gradients have the dtypes of the arguments."""
    sample = at_a_level(op)
    wanted = expected(sample)
    with torch.autocast(DEVICE.type, dtype=dtype):
        out = sample.function(*sample.leaves())
        found = with_gradients(sample)()
    assert out.dtype == found[0].dtype == (dtype if op == "spiral_conv" else torch.float32)
    assert {gradient.dtype for gradient in found[1:]} == {torch.float32}
    # Wider than a rounding: arguments are rounded as well, and so is the gradient on its way.
    tolerance = 4 * TOLERANCE[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def test_autocast_brings_maps_to_one_dtype(path):
    with DEVICE:
        maps = feature_maps([(4, 5, 6), (3, 4, 4)], torch.float32)
        points = image_points(2, 9).float()
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        out = vertex_sample([maps[0].half(), maps[1]], points)
        narrow = vertex_sample([maps[0].half()], points.half())
    assert out.dtype == torch.float32 and narrow.dtype == torch.float16


def test_tf32_where_pytorch_allows_it(path):
    sample = at_a_level("spiral_conv")
    tolerance = {torch.float32: 2e-3}
    compare(sample)
    exact = with_gradients(sample)()
    with switched(torch.set_float32_matmul_precision, "high", "highest"):
        compare(sample, tolerance)
        fast = with_gradients(sample)()
    if path == "triton" and torch.cuda.get_device_capability() >= (8, 0):
        assert not any(torch.equal(a, b) for a, b in zip(exact[:3], fast[:3], strict=True))


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_run(path, op, dtype):
    """Memory that PyTorch fills with NaN where it must be deterministic is all written."""
    run = with_gradients(at_a_level(op, dtype))
    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    with switched(torch.use_deterministic_algorithms, True, False):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@each_op
def test_same_bits_after_tuning(path, op, monkeypatch):
    """With the configuration that Triton found to be the fastest at first use."""
    monkeypatch.delenv("PAHM_TRITON_TUNE")
    sample = at_a_level(op, batch=2)
    run = with_gradients(sample)
    first = run()
    all_close(first, expected(sample))
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@each_op
def test_nothing_waits_for_the_device(path, op):
    """Once tables were made and checked, the host only launches."""
    run = with_gradients(at_a_level(op))
    run()
    with switched(torch.cuda.set_sync_debug_mode, "error", "default"):
        run()


@each_op
def test_nothing_is_kept(path, op):
    run = with_gradients(at_a_level(op))
    run()
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    for _ in range(10):
        run()
    gc.collect()
    assert torch.cuda.memory_allocated(DEVICE) == before


def test_spiral_conv_makes_no_gathered_copy(path):
    with DEVICE:
        sample = spiral_sample((32, 778, 778, 9, 64, 64), torch.float32)
    run = with_gradients(sample)
    run()
    x, weight, _ = sample.arguments
    gathered = 9 * x.nbytes

    def peak(function: Callable[[], object]) -> int:
        gc.collect()
        before = torch.cuda.memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        function()
        return torch.cuda.max_memory_allocated(DEVICE) - before

    # The result, which is as large as x, and sums of splits.
    assert peak(lambda: sample.function(x.detach(), weight.detach())) < 1.6 * x.nbytes
    # The gradient of x too.
    assert peak(run) < 4 * x.nbytes < gathered


@each_op
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(path, op, mode):
    torch._dynamo.reset()
    sample = at_a_level(op)

    def loss(*arguments: Tensor) -> Tensor:
        return sample.function(*[1.01 * a for a in arguments]).square().mean()

    graph = torch.compile(loss, fullgraph=True, mode=mode)
    leaves = sample.leaves()
    for scale in (1.0, 0.99, 1.02, 0.98):
        with torch.no_grad():
            for leaf in leaves:
                leaf *= scale
        torch.compiler.cudagraph_mark_step_begin()
        out = graph(*leaves)
        found = [out.detach().clone(), *(g.clone() for g in torch.autograd.grad(out, leaves))]
        wanted = loss(*leaves)
        for a, b in zip(found, [wanted, *torch.autograd.grad(wanted, leaves)], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


# ---- bad input ----


def test_tensors_on_several_devices_are_refused(path):
    with DEVICE:
        x, indices, weight = torch.zeros(2, 7, 4), torch.zeros(7, 3, dtype=torch.int64), torch.zeros(5, 12)
        maps, points = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 3)
        camera = torch.zeros(2, 3)
    transform = MeshTransform.prepare(torch.eye(7).to_sparse())
    with pytest.raises(ValueError, match=f"indices must be on x's device {x.device}, got cpu"):
        spiral_conv(x, indices.cpu(), weight)
    with pytest.raises(ValueError, match=f"weight must be on x's device {x.device}, got cpu"):
        spiral_conv(x, indices, weight.cpu())
    with pytest.raises(ValueError, match=f"bias must be on x's device {x.device}, got cpu"):
        spiral_conv(x, indices, weight, torch.zeros(5))
    with pytest.raises(ValueError, match=f"transform must be on x's device {x.device}, got cpu"):
        mesh_pool(x, transform)
    with pytest.raises(ValueError, match=f"vertices must be on the maps' device {x.device}, got cpu"):
        vertex_sample(maps, points.cpu(), camera)
    with pytest.raises(ValueError, match=f"camera must be on the maps' device {x.device}, got cpu"):
        vertex_sample(maps, points, camera.cpu())
    with pytest.raises(ValueError, match=rf"got {x.device} for features\[0\] and cpu for features\[1\]"):
        vertex_sample([maps, maps.cpu()], points, camera)


def test_other_dtypes_are_refused(path):
    with DEVICE:
        x, indices, weight = torch.zeros(2, 7, 4), torch.zeros(7, 3, dtype=torch.int64), torch.zeros(5, 12)
        transform = MeshTransform.prepare(torch.eye(7).to_sparse())
        maps, points = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 2)
    for bad in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        sentence = f"must be float32, float64, bfloat16 or float16, got {bad}"
        with pytest.raises(TypeError, match=f"x {sentence}"):
            spiral_conv(x.to(bad), indices, weight)
        with pytest.raises(TypeError, match=f"x {sentence}"):
            mesh_pool(x.to(bad), transform)
        with pytest.raises(TypeError, match=rf"features\[0\] {sentence}"):
            vertex_sample(maps.to(bad), points)
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch\.float32, got torch\.float16"):
        spiral_conv(x, indices, weight.half())
    with pytest.raises(TypeError, match=r"indices must be int64, got torch\.int32"):
        spiral_conv(x, indices.int(), weight)
    with pytest.raises(TypeError, match="vertices must be"):
        vertex_sample(maps, points.double())


def test_indices_are_checked_when_their_table_is_made_and_again_when_they_change(path):
    with DEVICE:
        x, weight = torch.randn(2, 7, 4), torch.randn(5, 12)
        indices = torch.randint(0, 7, (9, 3))
        good = spiral_conv(x, indices, weight)
        for value in (7, -1):
            kept = indices[4, 1].clone()
            indices[4, 1] = value
            for _ in range(2):
                with pytest.raises(IndexError, match=rf"indices must lie in \[0, 7\), got {value}"):
                    spiral_conv(x, indices, weight)
            indices[4, 1] = kept
            assert torch.equal(spiral_conv(x, indices, weight), good)
        with pytest.raises(IndexError, match="an entry outside its 7 columns"):
            places = torch.tensor([[0], [7]])
            entry = torch.sparse_coo_tensor(places, torch.ones(1), (9, 7), check_invariants=False)
            mesh_pool(x, entry)


def test_a_table_is_made_once(path, monkeypatch):
    made = []
    make = SpiralTable.prepare
    monkeypatch.setattr(SpiralTable, "prepare", lambda *given: made.append(given) or make(*given))
    with DEVICE:
        run = with_gradients(spiral_sample((2, 20, 20, 3, 8, 8), torch.float32))
        for _ in range(3):
            run()
    assert len(made) == 1


def test_more_maps_than_the_kernels_take(path):
    with DEVICE:
        maps, points = feature_maps([(2, 3, 3)] * 17, torch.float32), image_points(2, 9).float()
    compare(map_sample(maps[:16], points))
    with pytest.raises(ValueError, match="features must be 1 to 16 maps, got 17"):
        vertex_sample(maps, points)
