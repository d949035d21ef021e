"""The functions that compute gradients: derivatives in both modes, batching rules, fake kernels."""

import pytest
import torch
from op_samples import samples
from torch.func import jvp, vjp, vmap

import pahm_ops
from pahm_ops import SpiralTable
from pahm_ops.autograd.spiral_conv import input_grad, weight_grad
from pahm_ops.autograd.vertex_sample import vertex_sample_backward

pytestmark = pytest.mark.skipif(
    pahm_ops.backends()["spiral_conv"]["cpu"] == "reference", reason="no compiled kernels here"
)
NEEDS = (
    [True, True, True, True],
    [True, False, True, False],
    [False, False, True, True],
    [False, True, False, False],
)


def spiral(op):
    torch.manual_seed(0)
    x, grad = (torch.randn(2, n, c, dtype=torch.float64) for n, c in ((7, 4), (6, 5)))
    _, _, *tables = SpiralTable.prepare(torch.randint(0, 7, (6, 3)), 7)
    weight = torch.randn(5, 12, dtype=torch.float64)
    if op == "input":
        return lambda grad, weight: input_grad(grad, *tables, weight, 7), (grad, weight)
    return lambda grad, x: weight_grad(grad, x, *tables), (grad, x)


def sampling(needs):
    """The gradients of a sample with a weak-perspective camera, as a function of all tensors."""
    sample = next(s for s in samples("vertex_sample") if s.name == "weak-zeros-edges-nchw")
    vertices, camera, *maps = sample.arguments
    grad = torch.randn(2, 6, 5, dtype=torch.float64)

    def function(grad, vertices, camera, *maps):
        options = (0, 0, False, False)
        found = vertex_sample_backward(grad, vertices, camera, options, tuple(needs), *maps)
        return tuple(g for g in found if g.dim() > 1)

    return function, (grad, vertices, camera, *maps)


CASES = [pytest.param(*spiral(op), id=op) for op in ("input", "weight")]
CASES += [pytest.param(*sampling(needs), id="sample " + "".join("ny"[n] for n in needs)) for needs in NEEDS]


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_derivatives_in_both_modes(function, arguments):
    leaves = [a.clone().requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_vmap_is_a_loop(function, arguments):
    several = [torch.stack([a, 0.5 * a, -a]) for a in arguments]
    is_tuple = isinstance(function(*arguments), tuple)
    for i in (*range(len(arguments)), None):
        dims = tuple(0 if i in (j, None) else None for j in range(len(arguments)))
        given = [s if d == 0 else a for s, a, d in zip(several, arguments, dims, strict=True)]
        rows = [
            function(*(g if d is None else g[k] for g, d in zip(given, dims, strict=True))) for k in range(3)
        ]
        stacked = (
            [torch.stack(column) for column in zip(*rows, strict=True)] if is_tuple else torch.stack(rows)
        )
        expected = tuple(stacked) if is_tuple else stacked
        torch.testing.assert_close(vmap(function, dims)(*given), expected)


def test_a_pullback_recorded_before_is_pushed_forward():
    """The gradient is linear in the output's gradient, also at a level of torch.func that opens later."""
    for op in ("spiral_conv", "mesh_pool", "vertex_sample"):
        sample = samples(op)[0]
        out, pull = vjp(sample.function, *sample.arguments)
        grad, tangent = torch.randn_like(out), torch.randn_like(out)
        _, pushed = jvp(pull, (grad,), (tangent,))
        for a, b in zip(pushed, pull(tangent), strict=True):
            torch.testing.assert_close(a, b)


def test_vmap_over_nothing_is_refused_or_empty():
    function, (grad, x) = spiral("weight")
    empty = torch.empty(0, *grad.shape, dtype=grad.dtype)
    assert vmap(function, (0, None))(empty, x).shape == (0, 5, 12)
    with pytest.raises(ValueError, match="vmap over a dimension of size 0"):
        vmap(function)(empty, torch.empty(0, *x.shape, dtype=x.dtype))


@pytest.mark.parametrize("op", ["spiral_conv", "mesh_pool", "vertex_sample"])
def test_meta_tensors_give_shapes(op):
    for sample in samples(op):
        moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), sample.raw)
        out = getattr(torch.ops.pahm_ops, op)(*moved)
        assert out.is_meta and out.shape == sample.function(*sample.arguments).shape


def test_the_public_function_takes_meta_tensors():
    x, indices = torch.empty(2, 7, 4, device="meta"), torch.empty(6, 3, dtype=torch.int64, device="meta")
    assert pahm_ops.spiral_conv(x, indices, torch.empty(5, 12, device="meta")).shape == (2, 6, 5)
