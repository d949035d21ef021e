"""The registered ops with arguments that none of our functions would pass: a result or an error.

The quick test draws 150 calls an op, the slow one 20,000 (`pytest -m slow
tests/pahm_ops/test_fuzz_raw_ops.py`).
`tools/sanitize.sh` runs the same with the address and undefined-behaviour sanitizers.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pahm_ops

pytestmark = pytest.mark.skipif(
    pahm_ops.backends()["spiral_conv"]["cpu"] == "reference", reason="no compiled kernels here"
)
OPS = torch.ops.pahm_ops
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
INTEGERS = (0, 1, 2, 3, -1, 7, 2**31, -(2**31), 2**40, 2**62, -(2**63))
ERRORS = (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError, MemoryError)


@st.composite
def tensors(draw, dtypes, sizes):
    """Of nearly the right sizes, in any layout, with overlaps."""
    shape = [draw(st.sampled_from((n, n, n, n, 0, 1, n + 1))) for n in sizes]
    if draw(st.integers(0, 9)) == 0:
        shape = shape[:-1] if draw(st.booleans()) else [*shape, 2]
    dtype = draw(st.sampled_from((*dtypes * 3, torch.float16, torch.int32, torch.complex64)))
    tensor = torch.full(shape, 0.5).to(dtype)
    if shape and draw(st.integers(0, 5)) == 0:
        dim = draw(st.integers(0, len(shape) - 1))
        if shape[dim]:
            sizes = [-1] * len(shape)
            sizes[dim] = draw(st.sampled_from((shape[dim], shape[dim], 2**40)))
            tensor = tensor.narrow(dim, 0, 1).expand(sizes)
    return tensor


@st.composite
def tables(draw, sizes, limit):
    """Indices, most of them in range."""
    tensor = draw(tensors((torch.int32,), sizes))
    if tensor.dtype != torch.int32 or tensor.numel() > 1000 or tensor.numel() == 0:
        return tensor
    values = [draw(st.one_of(st.integers(0, max(0, limit - 1)), st.sampled_from(INTEGERS))) for _ in range(3)]
    table = torch.tensor(values).clamp(-(2**31), 2**31 - 1).int()
    tensor = table[torch.arange(tensor.numel()) % 3].reshape(tensor.shape)
    return tensor


@st.composite
def calls(draw, op):
    one = st.integers(1, 4)
    b, n, m, c, d, length = (draw(one) for _ in range(6))
    dtype = (draw(st.sampled_from(FLOATS)),)
    integer = st.sampled_from(INTEGERS)
    if "spiral_conv" in op:
        length = draw(st.sampled_from((length, length, 0)))
        x, grad = draw(tensors(dtype, (b, n, c))), draw(tensors(dtype, (b, m, d)))
        weight, table = draw(tensors(dtype, (d, length * c))), draw(tables((length, m), n))
        lists = draw(tables((length * n + 1,), length * m)), draw(tables((length * m,), m))
        if op == "spiral_conv":
            bias = draw(st.one_of(st.none(), tensors(dtype, (d,))))
            return x, table, *lists, weight, bias, draw(st.one_of(st.integers(0, 3), integer))
        if op == "_spiral_conv_input_grad":
            return grad, table, *lists, weight, draw(st.one_of(st.just(n), integer))
        return grad, x, table, *lists
    if op == "mesh_pool":
        pointers = torch.arange(m + 1).int() if draw(st.booleans()) else draw(tables((m + 1,), m + 1))
        x, columns = draw(tensors(dtype, (b, n, c))), draw(tables((m,), n))
        values = (torch.float32, torch.float64)
        rest = [draw(tables((s,), m)) for s in (n + 1, m)]
        return x, pointers, columns, draw(tensors(values, (m,))), *rest, draw(tensors(values, (m,)))
    kind = draw(st.sampled_from(("none", "weak", "perspective")))
    maps = [draw(tensors(dtype, (b, c, draw(one), draw(one)))) for _ in range(draw(st.integers(0, 3)))]
    vertices = draw(tensors(dtype, (b, n, 2 if kind == "none" else 3)))
    camera = {"none": None, "weak": (b, 3), "perspective": (b, 3, 3)}[kind]
    camera = None if camera is None else draw(tensors(dtype, camera))
    size = [draw(st.one_of(st.integers(1, 9), integer)) for _ in range(2)]
    given_ = (maps, vertices, camera, *size, draw(st.booleans()), draw(st.booleans()))
    if op == "vertex_sample":
        return given_
    needs = [draw(st.booleans()) for _ in range(len(maps) + draw(st.sampled_from((2, 2, 2, 1, 3))))]
    return draw(tensors(dtype, (b, n, c * len(maps)))), *given_, needs


NAMES = (
    "spiral_conv",
    "_spiral_conv_input_grad",
    "_spiral_conv_weight_grad",
    "mesh_pool",
    "vertex_sample",
    "_vertex_sample_backward",
)
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def check(name: str, data: Any) -> None:
    arguments = data.draw(calls(name))
    try:
        with torch.no_grad():
            result = getattr(OPS, name)(*arguments)
    except ERRORS as error:
        assert str(error)
        return
    for tensor in torch.utils._pytree.tree_leaves(result):
        assert tensor.device.type == "cpu"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, **SETTINGS)
@given(data=st.data())
def test_hostile_arguments(name, data):
    check(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20_000, **SETTINGS)
@given(data=st.data())
def test_hostile_arguments_at_length(name, data):
    check(name, data)


@pytest.mark.parametrize("dtype", FLOATS)
def test_spirals_of_no_vertex_are_refused(dtype):
    x, table, weight = torch.ones(1, 2, 3).to(dtype), torch.zeros(0, 2).int(), torch.ones(4, 0).to(dtype)
    grad, none = torch.ones(1, 2, 4).to(dtype), torch.zeros(0).int()
    for call in (
        lambda: OPS.spiral_conv(x, table, none, none, weight, None, 0),
        lambda: OPS._spiral_conv_input_grad(grad, table, none, none, weight, 2),
        lambda: OPS._spiral_conv_weight_grad(grad, x, table, none, none),
    ):
        with pytest.raises(ValueError, match="table must name at least one vertex a row"):
            call()


def test_channels_that_share_memory_are_bounded():
    maps, points = [torch.ones(1, 1, 2, 2).expand(1, 2**40, 2, 2)], torch.zeros(1, 0, 2)
    with pytest.raises(ValueError, match="features must have at most 16777216 channels, got 1099511627776"):
        OPS.vertex_sample(maps, points, None, 0, 0, False, True)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("border", [False, True])
def test_maps_longer_than_floats_count(border, turned):
    """The last pixels of a map of more than 2^24: the edge is read and written, nothing behind it."""
    length = 2**24 + 3  # which float32 rounds up
    row = torch.zeros(1, 1, 1, length)
    row[..., -4:] = 1
    points = torch.tensor([[[1.0, 0.0], [9.0, 0.0], [1 - 2**-24, 0.0], [float("nan"), 0.0]]])
    if turned:
        row, points = row.transpose(2, 3).contiguous(), points.flip(-1)
    row.requires_grad_()
    mode = "border" if border else "zeros"
    for align in (False, True):
        out = pahm_ops.vertex_sample(row, points, align_corners=align, padding_mode=mode)
        values = out[0, :, 0].tolist()
        assert all(0 <= value <= 1 for value in values) and values[3] == 0
        assert values[1] == (1 if border else 0)
        (grad,) = torch.autograd.grad(out.sum(), row)
        assert grad.count_nonzero() <= 8 and abs(float(grad.double().sum()) - sum(values)) < 1e-5
