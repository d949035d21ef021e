"""Generated inputs: each op equals its definition, or refuses with a sentence.

The quick tests draw a few hundred cases an op, the slow ones 20,000 (`pytest -m slow
tests/pahm_ops/test_fuzz.py`);
`tools/sanitize.sh` runs the same with the address and undefined-behaviour sanitizers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pahm_ops
from pahm_ops import MeshTransform, mesh_pool, spiral_conv, vertex_sample
from pahm_ops.reference import vertex_sample as reference_sample
from pahm_ops.spiral_conv import ACTIVATIONS

pytestmark = pytest.mark.skipif(
    pahm_ops.backends()["spiral_conv"]["cpu"] == "reference", reason="no compiled kernels here"
)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 3e-2, torch.float16: 4e-3}
REFUSALS = (TypeError, ValueError, IndexError)

Draw = Callable[[st.SearchStrategy[Any]], Any]


def laid_out(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers in any memory layout: strides in any order, gaps, offsets, overlaps."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    kind = draw(st.sampled_from(["contiguous", "permuted", "gaps", "expanded", "last"]))
    if kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        back = [order.index(i) for i in range(len(shape))]
        return values.permute(order).contiguous().permute(back)
    if kind == "gaps" and shape:
        dim, step, offset = (
            draw(st.integers(0, len(shape) - 1)),
            draw(st.integers(1, 3)),
            draw(st.integers(0, 2)),
        )
        wide = torch.full((*shape[:dim], offset + step * shape[dim] + 1, *shape[dim + 1 :]), float("nan")).to(
            dtype
        )
        view = wide.narrow(dim, offset, step * shape[dim])[(slice(None),) * dim + (slice(None, None, step),)]
        view.copy_(values)
        return view
    if kind == "expanded" and shape:
        dim = draw(st.integers(0, len(shape) - 1))
        if shape[dim]:
            return values.narrow(dim, 0, 1).expand(shape)
    if kind == "last" and len(shape) == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values


def spoilt(draw: Draw, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One of the tensors, or its dtype, rank, size or device, turned into what no op takes."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kinds = ["dtype", "rank up", "device", "nothing"] + (["rank down"] if tensor.dim() else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "dtype":
        wrong = (
            [d for d in OTHERS if d != tensor.dtype]
            if tensor.is_floating_point()
            else [torch.float32, torch.int32]
        )
        tensor = tensor.to(draw(st.sampled_from(wrong)))
    elif kind == "rank up":
        tensor = tensor[None, None]
    elif kind == "rank down":
        tensor = tensor.flatten()[:0].sum()
    elif kind == "device":
        tensor = tensor.to("meta")
    else:
        tensor = [1.0]
    return {**tensors, name: tensor}


def compare(
    dtype: torch.dtype,
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    tensors: list[Tensor],
) -> None:
    """The output and the gradients of all tensors, against the definition in float64."""
    ours = [t.detach().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, expected = function(*ours), definition(*exact)
    assert out.shape == expected.shape and out.dtype == dtype and out.is_contiguous()
    close(out, expected, dtype)
    grad = (
        torch.ones_like(out)
        if out.numel() == 0
        else torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
    )
    found = torch.autograd.grad(out, ours, grad, allow_unused=True)
    wanted = torch.autograd.grad(expected, exact, grad.double(), allow_unused=True)
    for tensor, a, b in zip(tensors, found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == tensor.shape and a.dtype == tensor.dtype
            close(a, b, dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double(), expected.detach(), rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True
    )


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(REFUSALS) as caught:
        call()
    sentence = str(caught.value)
    assert len(sentence) > 15 and "\n" not in sentence, sentence


def case_spiral_conv(draw: Draw) -> None:
    dtype, size = draw(st.sampled_from(FLOATS)), st.integers(0, 7)
    batch, n, m, cin = draw(size), draw(size), draw(size), draw(st.integers(0, 40))
    length, cout, seed = draw(st.integers(1, 9)), draw(st.integers(0, 40)), draw(st.integers(0, 999))
    unbatched, with_bias = draw(st.booleans()), draw(st.booleans())
    # In half precision a sum and its exact value may lie on the two sides of ReLU's corner.
    activation = draw(st.sampled_from(ACTIVATIONS)) if dtype in FLOATS[:2] else None
    bad = draw(st.integers(0, 3)) == 0
    if n == 0:
        m = 0
    tensors = {
        "x": laid_out(draw, (n, cin) if unbatched else (batch, n, cin), dtype, seed),
        "indices": torch.randint(0, max(n, 1), (m, length), generator=torch.Generator().manual_seed(seed)),
        "weight": laid_out(draw, (cout, length * cin), dtype, seed + 1),
    }
    if with_bias:
        tensors["bias"] = laid_out(draw, (cout,), dtype, seed + 2)
    if draw(st.booleans()):
        tensors["indices"] = tensors["indices"].t().contiguous().t()
    if bad and m and n and draw(st.booleans()):
        tensors["indices"] = tensors["indices"].clone()
        tensors["indices"][-1, -1] = draw(st.sampled_from([-1, n, 2**40, -(2**63)]))
        return refused(lambda: spiral_conv(**tensors))
    if bad:
        return refused(lambda: spiral_conv(**spoilt(draw, tensors)))
    indices = tensors.pop("indices")

    def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        gathered = x[..., indices, :].flatten(-2)
        out = gathered @ weight.T + (0 if bias is None else bias)
        return out if activation is None else getattr(F, activation)(out)

    compare(
        dtype,
        lambda x, weight, bias=None: spiral_conv(x, indices, weight, bias, activation),
        definition,
        list(tensors.values()),
    )


def case_mesh_pool(draw: Draw) -> None:
    dtype, size = draw(st.sampled_from(FLOATS)), st.integers(0, 7)
    batch, n, m, channels = draw(size), draw(size), draw(size), draw(st.integers(0, 70))
    seed, entries = draw(st.integers(0, 999)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(seed)
    if n == 0 or m == 0:
        entries = 0
    places = torch.stack(
        [
            torch.randint(0, max(m, 1), (entries,), generator=generator),
            torch.randint(0, max(n, 1), (entries,), generator=generator),
        ]
    )
    # Quarters add up exactly in either precision.
    values = torch.randint(-9, 10, (entries,), generator=generator) / 4
    values = values.to(draw(st.sampled_from([torch.float32, torch.float64])))
    bad = draw(st.integers(0, 3)) == 0
    if bad and entries and draw(st.booleans()):
        places[draw(st.integers(0, 1)), -1] = draw(st.sampled_from([-1, max(m, n), 2**40]))
        wrong = torch.sparse_coo_tensor(places, values, (m, n), check_invariants=False)
        return refused(lambda: mesh_pool(torch.zeros(n, 1), wrong))
    matrix = torch.sparse_coo_tensor(places, values, (m, n), check_invariants=True)
    given: Any = matrix
    form = draw(st.sampled_from(["coo", "csr", "prepared"]))
    if form == "csr":
        given = matrix.coalesce().to_sparse_csr()
    elif form == "prepared":
        given = MeshTransform.prepare(matrix)
    x = laid_out(draw, (n, channels) if draw(st.booleans()) else (batch, n, channels), dtype, seed)
    if bad:
        return refused(lambda: mesh_pool(transform=given, **spoilt(draw, {"x": x})))
    full = matrix.to_dense().double()
    compare(dtype, lambda x: mesh_pool(x, given), lambda x: full @ x, [x])


def case_vertex_sample(draw: Draw) -> None:
    dtype, size = draw(st.sampled_from(FLOATS)), st.integers(0, 5)
    batch, count, seed = draw(size), draw(st.integers(0, 40)), draw(st.integers(0, 999))
    side = st.integers(1, 7)
    maps = [
        laid_out(draw, (batch, draw(st.integers(0, 20)), draw(side), draw(side)), dtype, seed + i)
        for i in range(draw(st.integers(1, 4)))
    ]
    kind = draw(st.sampled_from(["points", "weak", "perspective"]))
    geometry = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    vertices = laid_out(draw, (batch, count, 2 if kind == "points" else 3), geometry, seed + 7)
    options: dict[str, Any] = {
        "align_corners": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "border"])),
    }
    camera = None
    if kind == "weak":
        camera = laid_out(draw, (batch, 3), geometry, seed + 8)
    elif kind == "perspective":
        options["image_size"] = (draw(st.integers(2, 300)), draw(st.integers(2, 300)))
        # Fewer than all layouts here: every vertex must lie in front of the camera.
        vertices = torch.cat([vertices[..., :2], vertices[..., 2:].abs() + 1], -1)
        focal = torch.tensor([[90.0, 1.0, 60.0], [0.0, 80.0, 50.0], [0.0, 0.0, 1.0]], dtype=geometry)
        camera = focal.expand(batch, 3, 3)
    if count and batch and draw(st.integers(0, 4)) == 0:
        vertices = vertices.clone()
        vertices[-1, -1, 0] = draw(st.sampled_from([float("nan"), float("inf"), 1e30, -1e30]))
    if draw(st.integers(0, 3)) == 0:
        tensors = {f"map {i}": m for i, m in enumerate(maps)} | {"vertices": vertices}
        if camera is not None:
            tensors["camera"] = camera
        wrong = spoilt(draw, tensors)
        given = [wrong[f"map {i}"] for i in range(len(maps))]
        return refused(lambda: vertex_sample(given, wrong["vertices"], wrong.get("camera"), **options))
    size_ = options.get("image_size")

    def definition(vertices: Tensor, *rest: Tensor) -> Tensor:
        view, planes = (None, rest) if camera is None else (rest[0], rest[1:])
        return reference_sample.vertex_sample_gather(
            planes, vertices, view, size_, options["align_corners"], options["padding_mode"]
        )

    def function(vertices: Tensor, *rest: Tensor) -> Tensor:
        view, planes = (None, rest) if camera is None else (rest[0], rest[1:])
        return vertex_sample(planes, vertices, view, **options)

    # Not the gradients to points: where a point lies on a pixel's border the two precisions may see different
    # cells, and the gradient jumps there.
    tensors = [vertices, *([] if camera is None else [camera]), *maps]
    with torch.no_grad():
        out = function(*tensors)
        expected = definition(*(t.double() for t in tensors))
    assert out.dtype == dtype and out.is_contiguous()
    close(out, expected, dtype)
    leaves = [m.detach().requires_grad_() for m in maps]
    exact = [m.detach().double().requires_grad_() for m in maps]
    fixed = tensors[: len(tensors) - len(maps)]
    grad = torch.ones_like(out)
    found = torch.autograd.grad(function(*fixed, *leaves), leaves, grad)
    wanted = torch.autograd.grad(definition(*(t.double() for t in fixed), *exact), exact, grad.double())
    for a, b in zip(found, wanted, strict=True):
        close(a, b, dtype)


CASES = {f.__name__.removeprefix("case_"): f for f in (case_spiral_conv, case_mesh_pool, case_vertex_sample)}
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(op: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=CHECKS, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        CASES[op](data.draw)

    run()


@pytest.mark.parametrize("op", CASES)
def test_a_few_hundred_cases(op):
    fuzz(op, 300)


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_twenty_thousand_cases(op):
    fuzz(op, 20_000)
