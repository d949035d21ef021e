"""spiral_conv's CUDA kernels, run on the CPU by the machine of tests/simt."""

import pytest
import torch
from paper_levels import CHANNELS, levels
from simt_kernels import DTYPES, SEEDS, needs_gxx
from simt_ops import (
    SPIRAL_CONV,
    add_up,
    assert_same_sum,
    hostile,
    list_bound,
    spiral_inputs,
    spiral_least_bytes,
    spiral_product,
    wide_numbers,
)
from torch import Tensor

from pahm_ops.reference import spiral_conv as reference

pytestmark = needs_gxx

#: batch, vertices, rows, spiral length, channels in and out
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 1, 9, 3, 5),
    (1, 98, 98, 9, 30, 30),
    (2, 98, 98, 27, 3, 3),
    (1, 98, 195, 9, 64, 64),
    (3, 50, 70, 9, 71, 66),
    (1, 5, 4, 1, 1025, 8),
    (1, 7, 5, 2, 8, 1025),
    (1, 778, 778, 9, 16, 3),
    (1, 778, 778, 27, 1, 1),
    (1, 6890, 6890, 9, 3, 3),
    (1, 6890, 6890, 1, 1, 8),
    (0, 5, 5, 2, 3, 4),
]
#: rounding of a result of the order of 1, and of sums in float32
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PRODUCTS = ("forward", "input_grad", "weight_grad")


def expected(product: str, tensors: tuple[Tensor, ...], activation: str | None = None) -> Tensor:
    """In float64, of the rounded inputs."""
    x, indices, weight, offset, grad = (t if t.dtype == torch.int64 else t.double() for t in tensors)
    if product == "forward":
        return reference.spiral_conv(x, indices, weight, offset, activation)
    x.requires_grad_()
    weight.requires_grad_()
    result = reference.spiral_conv(x, indices, weight)
    return torch.autograd.grad(result, x if product == "input_grad" else weight, grad)[0]


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=TOLERANCE[actual.dtype] * scale)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype, product):
    tensors = spiral_inputs(shape, dtype)
    assert_close(spiral_product(product, tensors)[0], expected(product, tensors))


@pytest.mark.parametrize("activation", ["relu", "elu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_channels", [3, 20])
def test_activations_are_fused(activation, dtype, out_channels):
    tensors = spiral_inputs((1, 20, 20, 3, 8, out_channels), dtype)
    assert_close(
        spiral_product("forward", tensors, activation=activation)[0], expected("forward", tensors, activation)
    )


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_sums_are_added_up_with_bias_and_activation(dtype, product):
    shape = {
        "forward": (1, 20, 20, 9, 64, 24),
        "input_grad": (1, 20, 20, 9, 24, 64),
        "weight_grad": (16, 98, 98, 3, 16, 24),
    }[product]
    tensors = spiral_inputs(shape, dtype)
    out, counts = spiral_product(
        product, tensors, activation="elu" if product == "forward" else None, processors=64
    )
    assert counts.launches == 2
    assert_close(out, expected(product, tensors, "elu"))


def test_without_a_bias():
    x, indices, weight, offset, grad = spiral_inputs((1, 20, 20, 3, 8, 8), torch.float32)
    out, _ = spiral_product("forward", (x, indices, weight, offset, grad), bias=False)
    assert_close(out, expected("forward", (x, indices, weight, torch.zeros_like(offset), grad)))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    "shape",
    [(2, 70, 70, 3, 8, 8), (2, 70, 70, 3, 8, 3), (2, 70, 70, 2, 3, 5), (2, 70, 70, 2, 5, 3)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order(shape, dtype, product):
    """Wide and thin tiles, packs of 16 bytes and single numbers."""
    tensors = spiral_inputs(shape, dtype)
    first, _ = spiral_product(product, tensors)
    for seed in SEEDS:
        assert torch.equal(spiral_product(product, tensors, seed=seed)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_sums_have_the_same_bits_in_any_order(dtype):
    tensors = spiral_inputs((16, 40, 40, 2, 8, 8), dtype)
    first, counts = spiral_product("weight_grad", tensors, processors=64)
    assert counts.launches == 2
    for seed in SEEDS:
        assert torch.equal(spiral_product("weight_grad", tensors, processors=64, seed=seed)[0], first)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 20, 20, 3, 8, 8), (2, 9, 9, 2, 5, 3)], ids=str)
def test_sanitizers_find_nothing(shape, product):
    tensors = spiral_inputs(shape, torch.float32)
    assert_close(spiral_product(product, tensors, sanitize=True)[0], expected(product, tensors))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_traffic_at_the_papers_levels(dtype, level, product):
    at, (channels, out_channels) = levels()[level], CHANNELS[level]
    tensors = list(spiral_inputs((1, at.count, at.count, 9, channels, out_channels), dtype))
    tensors[1] = at.indices
    _, counts = spiral_product(product, tuple(tensors), processors=108)
    assert counts.dram_bytes <= 1.5 * spiral_least_bytes(product, tuple(tensors))
    # Of 64 channels in half precision, what the lists add to the rows shows most.
    assert counts.sectors <= (1.11 if level == 3 else 1.1) * counts.ideal_sectors
    assert counts.atomics == 0
    assert counts.bank_conflicts == 0


def conv(name: str, dtype: torch.dtype, out: Tensor, *arguments: object) -> None:
    """`arguments`: those of the case before `out`, then the six sizes."""
    given, sizes = arguments[:-6], arguments[-6:]
    partial = torch.zeros(64 * out.numel(), dtype=torch.float64)
    SPIRAL_CONV.call(name, dtype, *given, out, partial, partial.nbytes, *sizes, 4)


@pytest.mark.parametrize(("channels", "out_channels"), [(8, 16), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("product", ["forward", "weight_grad"])
@pytest.mark.parametrize("vertices", [11, 0])
def test_memory_is_safe_whatever_the_table_says(vertices, product, dtype, channels, out_channels):
    """A spiral's entry out of range counts as a vertex of zeros."""
    batch, rows, length = 2, 13, 4
    table = hostile(torch.randint(0, 11, (length, rows)), vertices)
    x = torch.randn(batch, vertices, channels).to(dtype)
    grad = torch.randn(batch, rows, out_channels).to(dtype)
    weight = torch.randn(out_channels, length * channels).to(dtype) / 4
    found = (table >= 0) & (table < vertices)
    padded = torch.cat([x.double(), torch.zeros(batch, 1, channels).double()], 1)
    gathered = padded[:, torch.where(found, table, vertices).long().t()].flatten(2)  # (B, M, L * C)
    sizes = (batch, vertices, rows, length, channels, out_channels)
    if product == "forward":
        out = torch.full_like(grad, torch.nan)
        conv("spiral_conv", dtype, out, x, table, weight, None, 0, *sizes)
        assert_close(out, gathered @ weight.double().t())
    else:
        out = torch.full_like(weight, torch.nan)
        conv("spiral_conv_weight_grad", dtype, out, grad, x, table, *sizes)
        assert_close(out, torch.einsum("bmo,bmk->ok", grad.double(), gathered))


@pytest.mark.parametrize(("channels", "out_channels"), [(8, 16), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("what", ["t_rows", "t_pointers"])
def test_memory_is_safe_whatever_the_lists_say(what, dtype, channels, out_channels):
    batch, vertices, rows, length = 2, 11, 13, 4
    count = length * rows
    pointers = torch.linspace(0, count, length * vertices + 1).int()
    lists = torch.arange(count).int() % rows
    if what == "t_rows":
        lists = hostile(lists, rows)
    else:
        pointers = hostile(pointers, count, 4)
    grad = torch.randn(batch, rows, out_channels).to(dtype)
    weight = torch.randn(out_channels, length * channels).to(dtype) / 8
    out = torch.full((batch, vertices, channels), torch.nan, dtype=dtype)
    sizes = (batch, vertices, rows, length, channels, out_channels)
    conv("spiral_conv_input_grad", dtype, out, grad, pointers, lists, weight, *sizes)

    wanted = torch.zeros(batch, vertices, channels, dtype=torch.float64)
    parts = weight.double().view(out_channels, length, channels)
    for place in range(length * vertices):
        begin, end = (list_bound(p, count) for p in pointers[place : place + 2])
        total = torch.zeros(batch, out_channels, dtype=torch.float64)
        for e in range(begin, end):
            if 0 <= lists[e] < rows:
                total += grad[:, int(lists[e])].double()
        wanted[:, place % vertices] += total @ parts[:, place // vertices]
    assert_close(out, wanted)


#: channels in and out: tiles of packs of 16 bytes and of single numbers, wide and thin
TILES = [(8, 8), (8, 4), (5, 7), (5, 3)]


@pytest.mark.parametrize(("channels", "out_channels"), TILES)
def test_a_sum_over_a_spiral_has_one_order(channels, out_channels):
    x, indices, weight, offset, grad = spiral_inputs((1, 20, 20, 3, channels, out_channels), torch.float32)
    x = wide_numbers(*x.shape)
    tensors = (x, indices, torch.ones_like(weight), offset, grad)
    out, counts = spiral_product("forward", tensors, bias=False)
    assert counts.launches == 1
    gathered = x[0, indices].flatten(1)  # (M, L * C)
    assert_same_sum(out[0], gathered.t()[..., None].expand(-1, -1, out_channels))


@pytest.mark.parametrize(("channels", "out_channels"), TILES)
def test_a_sum_over_vertices_has_one_order(channels, out_channels):
    x, indices, weight, offset, grad = spiral_inputs((2, 20, 20, 3, channels, out_channels), torch.float32)
    grad = wide_numbers(*grad.shape)
    tensors = (torch.ones_like(x), indices, weight, offset, grad)
    out, counts = spiral_product("weight_grad", tensors)
    assert counts.launches == 1
    assert_same_sum(out, grad.flatten(0, 1)[..., None].expand(-1, -1, 3 * channels))


@pytest.mark.parametrize(("channels", "out_channels"), TILES)
def test_the_rows_of_a_list_are_added_up_rising(channels, out_channels):
    x, _, weight, offset, grad = spiral_inputs((1, 2, 40, 1, channels, out_channels), torch.float32)
    indices = torch.arange(40)[:, None] % 2
    grad = wide_numbers(*grad.shape)
    weight = torch.zeros_like(weight)
    weight[0] = 1
    out, _ = spiral_product("input_grad", (x, indices, weight, offset, grad))
    assert_same_sum(out[0], grad[0, :, 0].view(20, 2, 1).expand(-1, -1, channels))


def test_split_sums_are_added_up_in_their_order():
    x, indices, weight, offset, grad = spiral_inputs((1, 20, 20, 9, 64, 24), torch.float32)
    x = wide_numbers(*x.shape)
    tensors = (x, indices, torch.ones_like(weight), offset, grad)
    out, counts = spiral_product("forward", tensors, bias=False, processors=64)
    assert counts.launches == 2
    # plan_product makes 4 splits of 144 of the 9 * 64.
    splits = x[0, indices].flatten(1).view(20, 4, 144)
    sums = add_up(splits.permute(2, 1, 0))
    assert_same_sum(out[0], sums[..., None].expand(-1, -1, 24))
