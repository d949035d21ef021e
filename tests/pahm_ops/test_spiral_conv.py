import pytest
import torch
import torch.nn.functional as F

import pahm_ops
from pahm_ops import SpiralConv, SpiralTable, spiral_conv
from pahm_ops.reference import spiral_conv as reference

OPS = torch.ops.pahm_ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}

# batch, vertices in, vertices out, spiral length, channels in, channels out
SHAPES = [
    (3, 98, 98, 9, 64, 64),
    (2, 50, 50, 9, 24, 40),
    (2, 20, 18, 4, 5, 7),
    (2, 30, 30, 3, 17, 33),
    (2, 50, 33, 5, 131, 3),
    (2, 30, 45, 9, 64, 1),
    (1, 30, 30, 3, 16, 4),
    (1, 1, 1, 1, 1, 1),
    (1, 3, 40, 27, 3, 16),
    (2, 60, 1200, 3, 40, 20),
    # The weight gradient: several meshes at a time and some left, many more vertices than are used, and both.
    (13, 50, 60, 2, 20, 9),
    (2, 100, 20, 3, 20, 9),
    (1, 2500, 1201, 2, 20, 5),
]

EMPTY = [(0, 5, 5, 2, 3, 4), (2, 5, 0, 2, 3, 4), (2, 0, 0, 2, 3, 4), (2, 5, 4, 2, 0, 4)]


def arguments(shape, dtype=torch.float32):
    batch, vertices, rows, length, channels, out_channels = shape
    x = torch.randn(batch, vertices, channels, dtype=dtype)
    indices = torch.randint(0, max(vertices, 1), (rows, length))
    weight = torch.randn(out_channels, length * channels, dtype=dtype) / max(1, length * channels) ** 0.5
    bias = torch.randn(out_channels, dtype=dtype)
    return x, indices, weight, bias


def gradients(function, x, indices, weight, bias, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = function(leaves[0], indices, leaves[1], leaves[2])
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_equals_the_reference(isa, shape, dtype):
    x, indices, weight, bias = arguments(shape, dtype)
    grad = torch.randn(shape[0], shape[2], shape[5], dtype=dtype)
    expected = gradients(
        reference.spiral_conv, x.double(), indices, weight.double(), bias.double(), grad.double()
    )
    for actual, wanted in zip(gradients(spiral_conv, x, indices, weight, bias, grad), expected, strict=True):
        assert_close(actual, wanted, dtype)


def test_reference_is_spiralnets_definition():
    x, indices, weight, bias = arguments((2, 6, 5, 3, 4, 7), torch.float64)
    out = reference.spiral_conv(x, indices, weight, bias)
    for b in range(2):
        for m in range(5):
            column = torch.cat([x[b, n] for n in indices[m].tolist()])
            torch.testing.assert_close(out[b, m], weight @ column + bias)


def test_without_bias_and_without_batch(backend):
    x, indices, weight, _ = arguments((1, 20, 18, 4, 16, 8))
    out = spiral_conv(x[0], indices, weight)
    assert out.shape == (18, 8)
    torch.testing.assert_close(out, reference.spiral_conv(x, indices, weight)[0])


def test_strided_arguments(backend):
    x, indices, weight, bias = arguments((2, 20, 18, 4, 16, 8))
    strided = (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        indices.T.contiguous().T,
        weight.T.contiguous().T,
        torch.stack([bias, bias], 1)[:, 0],
    )
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(spiral_conv(*strided), reference.spiral_conv(x, indices, weight, bias))
    expanded = x[:1].expand(2, -1, -1)
    torch.testing.assert_close(
        spiral_conv(expanded, indices, weight), reference.spiral_conv(expanded, indices, weight)
    )


@pytest.mark.parametrize(
    "shape", [(2, 7, 6, 3, 4, 5), (2, 7, 7, 3, 17, 3), (1, 1, 1, 1, 1, 1), (0, 4, 4, 2, 3, 2)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_once_and_twice(backend, shape, with_bias):
    x, indices, weight, bias = arguments(shape, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)[: 3 if with_bias else 2]]

    def function(x, weight, bias=None):
        return spiral_conv(x, indices, weight, bias)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_bfloat16_sums_in_float32(isa):
    # 4096 products of 1 are 4096; summed in bfloat16 they would stop at 256.
    x = torch.ones(1, 4, 1024, dtype=torch.bfloat16)
    weight = torch.ones(20, 4096, dtype=torch.bfloat16)
    indices = torch.tensor([[0, 1, 2, 3]])
    assert (spiral_conv(x, indices, weight) == 4096).all()
    assert (spiral_conv(x, indices, weight[:2]) == 4096).all()
    grad = torch.ones(1, 1000, 16, dtype=torch.bfloat16)
    _, _, *tables = SpiralTable.prepare(torch.zeros(1000, 1, dtype=torch.int64), 4)
    sums = OPS._spiral_conv_weight_grad(grad, x, *tables)
    assert (sums == 1000).all()
    sums = OPS._spiral_conv_input_grad(grad, *tables, torch.ones(16, 8, dtype=torch.bfloat16), 4)
    assert (sums[0, 0] == 16000).all()
    assert (sums[0, 1:] == 0).all()


# Rows past one block and past one stretch of the weight gradient's sum, channels past one panel and one block
# of depth, odd ones, and one more and one less than whole blocks.
@pytest.mark.parametrize(
    "shape",
    [
        (3, 200, 190, 9, 70, 45),
        (1, 33, 31, 3, 31, 33),
        (2, 40, 513, 2, 64, 32),
        (5, 98, 98, 9, 96, 65),
        (1, 7, 5, 1, 1, 5),
        (1, 1, 130, 27, 33, 3),
    ],
)
def test_bfloat16_is_exact_for_small_integers(isa, shape):
    batch, vertices, rows, length, channels, out_channels = shape
    x = torch.randint(-3, 4, (batch, vertices, channels)).to(torch.bfloat16)
    weight = torch.randint(-3, 4, (out_channels, length * channels)).to(torch.bfloat16)
    bias = torch.randint(-9, 10, (out_channels,)).to(torch.bfloat16)
    grad = torch.randint(-3, 4, (batch, rows, out_channels)).to(torch.bfloat16)
    indices = torch.randint(0, vertices, (rows, length))
    exact = gradients(
        reference.spiral_conv, x.double(), indices, weight.double(), bias.double(), grad.double()
    )
    for actual, wanted in zip(gradients(spiral_conv, x, indices, weight, bias, grad), exact, strict=True):
        assert torch.equal(actual, wanted.to(torch.bfloat16))


def test_bfloat16_weight_on_an_odd_address(isa):
    x, indices, weight, bias = arguments((2, 20, 18, 4, 16, 8), torch.bfloat16)
    odd = torch.empty(weight.numel() + 1, dtype=torch.bfloat16)[1:].view(weight.shape).copy_(weight)
    assert odd.data_ptr() % 4 == 2
    assert torch.equal(spiral_conv(x, indices, odd, bias), spiral_conv(x, indices, weight, bias))


@pytest.mark.parametrize("activation", ["relu", "elu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_channels", [40, 3])
def test_activations_are_exact_over_their_range(isa, dtype, activation, out_channels):
    ends = torch.tensor([-1e4, 1e4, float("inf"), -float("inf"), float("nan"), 0.0])
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.linspace(-1e-3, 1e-3, 101), ends]).to(dtype)
    x, weight = z[None, :, None], torch.ones(out_channels, 1, dtype=dtype)
    if out_channels == 3:  # the thin kernel wants a vector of channels, and infinity times zero is no number
        x = F.pad(x.nan_to_num(nan=0.0, posinf=1e4, neginf=-1e4), (0, 19))
        weight = F.pad(weight, (0, 19))
    indices = torch.arange(len(z))[:, None]
    out = spiral_conv(x, indices, weight, None, activation)
    expected = reference.spiral_conv(x.double(), indices, weight.double(), None, activation)
    atol = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=atol, atol=atol, equal_nan=True)


def test_an_activation_that_does_not_exist_is_refused():
    x, indices, weight, bias = arguments((2, 9, 8, 3, 5, 4))
    with pytest.raises(ValueError, match="activation must be None, 'relu', 'elu' or 'gelu', got 'swish'"):
        spiral_conv(x, indices, weight, bias, "swish")
    with pytest.raises(ValueError, match="activation must be None, 'relu', 'elu' or 'gelu', got 'ELU'"):
        SpiralConv(5, 4, indices, activation="ELU")


@pytest.mark.parametrize("shape", [(4, 195, 195, 9, 64, 64), (4, 195, 195, 9, 64, 3), (3, 98, 98, 9, 19, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(isa, shape, dtype):
    x, indices, weight, bias = arguments(shape, dtype)
    grad = torch.randn(shape[0], shape[2], shape[5], dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(gradients(spiral_conv, x, indices, weight, bias, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_ops_pass_opcheck():
    if pahm_ops.backends()["spiral_conv"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    x, indices, weight, bias = arguments((2, 9, 8, 3, 5, 4))
    grad = torch.randn(2, 8, 4)
    _, _, *tables = SpiralTable.prepare(indices, 9)
    for leaf in (x, weight, bias, grad):
        leaf.requires_grad_()
    torch.library.opcheck(OPS.spiral_conv, (x, *tables, weight, bias, 1))
    torch.library.opcheck(OPS.spiral_conv, (x, *tables, weight, None, 0))
    torch.library.opcheck(OPS._spiral_conv_input_grad, (grad, *tables, weight, 9))
    torch.library.opcheck(OPS._spiral_conv_weight_grad, (grad, x, *tables))


def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    x, indices, _, _ = arguments((2, 20, 20, 4, 16, 8))
    module = SpiralConv(16, 8, indices)

    def function(x):
        return F.relu(module(x)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = function(first)
    expected.backward()
    weight_grad = module.layer.weight.grad.clone()
    module.zero_grad()
    actual = compiled(second)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(second.grad, first.grad)
    torch.testing.assert_close(module.layer.weight.grad, weight_grad)


@pytest.mark.slow
def test_compiles_with_inductor_and_a_changing_batch():
    torch._dynamo.reset()
    _, indices, weight, bias = arguments((2, 20, 20, 4, 16, 8))
    compiled = torch.compile(spiral_conv, fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 20, 16)
        torch.testing.assert_close(compiled(x, indices, weight, bias), spiral_conv(x, indices, weight, bias))


@pytest.mark.parametrize("value", [-1, 9])
def test_index_out_of_range(backend, value):
    x, indices, weight, bias = arguments((2, 9, 8, 3, 5, 4))
    indices[5, 1] = value
    with pytest.raises(IndexError, match=rf"indices must lie in \[0, 9\), got {value}"):
        spiral_conv(x, indices, weight, bias)


@pytest.mark.parametrize("value", [-1, 9])
def test_index_out_of_range_in_the_raw_ops_and_in_a_graph(value):
    if pahm_ops.backends()["spiral_conv"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    x, indices, weight, bias = arguments((2, 9, 8, 3, 5, 4))
    _, _, table, *lists = SpiralTable.prepare(indices, 9)
    indices[5, 1] = table[1, 5] = value
    grad = torch.randn(2, 8, 4)
    torch._dynamo.reset()
    calls = [
        lambda: OPS.spiral_conv(x, table, *lists, weight, bias, 0),
        lambda: OPS._spiral_conv_input_grad(grad, table, *lists, weight, 9),
        lambda: OPS._spiral_conv_weight_grad(grad, x, table, *lists),
        lambda: torch.compile(spiral_conv, fullgraph=True, backend="aot_eager")(x, indices, weight, bias),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=rf"indices must lie in \[0, 9\), got {value}"):
            call()


def test_raw_ops_refuse_what_would_read_beyond_a_tensor():
    if pahm_ops.backends()["spiral_conv"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    x, indices, weight, bias = arguments((2, 9, 8, 3, 5, 4))
    _, _, table, *lists = SpiralTable.prepare(indices, 9)
    grad = torch.randn(2, 8, 4)
    input_grad, weight_grad = OPS._spiral_conv_input_grad, OPS._spiral_conv_weight_grad
    calls = [
        lambda: OPS.spiral_conv(x, table, *lists, weight[:, 1:], bias, 0),
        lambda: OPS.spiral_conv(x, table, *lists, weight, bias[1:], 0),
        lambda: OPS.spiral_conv(x, table, *lists, weight, bias, 4),
        lambda: OPS.spiral_conv(x, table, *lists, weight.double(), bias, 0),
        lambda: OPS.spiral_conv(x, table.long(), *lists, weight, bias, 0),
        lambda: OPS.spiral_conv(x[0], table, *lists, weight, bias, 0),
        lambda: OPS.spiral_conv(x.half(), table, *lists, weight.half(), None, 0),
        lambda: input_grad(grad[:, 1:], table, *lists, weight, 9),
        lambda: input_grad(grad[..., 1:], table, *lists, weight, 9),
        lambda: input_grad(grad, table, *lists, weight[:, 1:], 9),
        lambda: weight_grad(grad, x[:1], table, *lists),
        lambda: weight_grad(grad[:, 1:], x, table, *lists),
        lambda: weight_grad(grad, x.double(), table, *lists),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"must|dtype|expected"):
            call()


def test_bad_arguments_are_named():
    x, indices, weight, bias = arguments((2, 9, 8, 3, 5, 4))
    cases = [
        (TypeError, "x must be a tensor, got list", ([1.0], indices, weight, bias)),
        (TypeError, "indices must be a tensor or a SpiralTable, got list", (x, [[0]], weight, bias)),
        (TypeError, "weight must be a tensor, got NoneType", (x, indices, None, bias)),
        (TypeError, "bias must be a tensor, got float", (x, indices, weight, 1.0)),
        (TypeError, "x must be float32, .* got torch.int64", (x.long(), indices, weight, bias)),
        (TypeError, "indices must be int64, got torch.int32", (x, indices.int(), weight, bias)),
        (TypeError, "weight must have x's dtype torch.float32, got", (x, indices, weight.double())),
        (TypeError, "bias must have x's dtype torch.float32, got", (x, indices, weight, bias.bfloat16())),
        (ValueError, r"x must be \(B, N, C\) or \(N, C\), got shape \(5,\)", (x[0, 0], indices, weight)),
        (ValueError, r"indices must be \(M, L\), got shape \(8,\)", (x, indices[:, 0], weight)),
        (ValueError, "indices must name at least one vertex a row", (x, indices[:, :0], weight)),
        (ValueError, r"weight must be \(Cout, 15\) .* got shape \(4, 14\)", (x, indices, weight[:, 1:])),
        (ValueError, r"bias must be \(4,\) .* got shape \(3,\)", (x, indices, weight, bias[1:])),
        (ValueError, "indices must be on x's device cpu, got meta", (x, indices.to("meta"), weight)),
    ]
    for error, sentence, call in cases:
        with pytest.raises(error, match=sentence):
            spiral_conv(*call)


def test_float16_is_computed_in_float32(backend):
    if backend == "reference":
        pytest.skip("the kernels' business")
    x, indices, weight, bias = arguments((2, 9, 800, 3, 5, 4), torch.float16)
    grad = torch.randn(2, 800, 4).half()
    wide = gradients(spiral_conv, x.float(), indices, weight.float(), bias.float(), grad.float())
    for a, b in zip(gradients(spiral_conv, x, indices, weight, bias, grad), wide, strict=True):
        torch.testing.assert_close(a, b.half(), rtol=1e-3, atol=0)
    assert spiral_conv(x, indices, weight).dtype == torch.float16


def test_autocast_casts_like_a_linear_layer():
    x, indices, _, _ = arguments((2, 9, 8, 3, 5, 4))
    module = SpiralConv(5, 4, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        assert out.dtype == F.linear(x, torch.randn(4, 5)).dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), module(x), rtol=0, atol=0.03)


def test_module_loads_spiralnets_checkpoint():
    _, indices, weight, bias = arguments((1, 9, 8, 3, 5, 4))
    module = SpiralConv(5, 4, indices, dim=1)
    assert set(module.state_dict()) == {"layer.weight", "layer.bias"}
    assert torch.equal(module.layer.bias, torch.zeros(4))
    bound = (6 / (15 + 4)) ** 0.5
    assert 0.5 * bound < module.layer.weight.abs().max() <= bound
    module.load_state_dict({"layer.weight": weight, "layer.bias": bias})
    x = torch.randn(9, 5)
    torch.testing.assert_close(module(x), reference.spiral_conv(x[None], indices, weight, bias)[0])


def test_module_moves_its_table_and_keeps_its_type():
    module = SpiralConv(5, 4, torch.zeros(8, 3, dtype=torch.int64))
    assert module.to(torch.bfloat16).indices.dtype == torch.int64
    assert module.to("meta").indices.device.type == "meta"
    with pytest.raises(ValueError, match="dim must be 1 or -2"):
        SpiralConv(5, 4, torch.zeros(8, 3, dtype=torch.int64), dim=2)
    with pytest.raises(TypeError, match="indices must be int64"):
        SpiralConv(5, 4, torch.zeros(8, 3))


def test_more_than_two_to_the_31_elements():
    # Untouched pages of the input cost no memory: only its last rows are written and read.
    if pahm_ops.backends()["spiral_conv"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    vertices, channels = 2**27 + 8, 16
    try:
        x = torch.empty(1, vertices, channels)
    except RuntimeError:
        pytest.skip("not enough address space")
    x[0, -8:] = torch.randn(8, channels)
    table = torch.randint(0, 8, (6, 3))
    weight = torch.randn(20, 3 * channels)
    small = x[:, -8:].clone()
    _, _, rows, *lists = SpiralTable.prepare(table, 8)
    torch.testing.assert_close(
        OPS.spiral_conv(x, rows + vertices - 8, *lists, weight, None, 0),
        reference.spiral_conv(small, table, weight),
    )
    grad = torch.randn(1, 6, 20)
    actual = OPS._spiral_conv_weight_grad(grad, x, rows + vertices - 8, *lists)
    torch.testing.assert_close(actual, OPS._spiral_conv_weight_grad(grad, small, rows, *lists))
