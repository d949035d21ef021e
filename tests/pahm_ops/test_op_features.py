"""What each op supports: one test a feature, over every sample input of every op.

The table of features in docs/operators.md names these tests, and the last test here holds it to that.
"""

import re
import sys
import warnings

import pytest
import torch
from op_samples import OPS, samples
from repository import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import pahm_ops

ALL = [pytest.param(op, i, id=f"{op}-{s.name}") for op in OPS for i, s in enumerate(samples(op))]
each = pytest.mark.parametrize(("op", "index"), ALL)
#: Those whose graphs differ, for a test that takes seconds: every activation, camera and memory format, with
#: and without a bias, and sizes of 1.
GRAPHS = {"spiral_conv": (0, 3, 4, 7, 9), "mesh_pool": (1,), "vertex_sample": (0, 2, 5, 7, 9, 11)}
each_graph = pytest.mark.parametrize(
    ("op", "index"),
    [parameters for parameters in ALL if parameters.values[1] in GRAPHS[parameters.values[0]]],
)
compiled = pytest.mark.skipif(
    pahm_ops.backends()["spiral_conv"]["cpu"] == "reference", reason="no compiled kernels here"
)


@pytest.fixture
def sample(op, index):
    return samples(op)[index]


def close(actual, expected):
    for a, b in zip(*(torch.utils._pytree.tree_leaves(t) for t in (actual, expected)), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def loss(function):
    return lambda *arguments: function(*arguments).pow(3).sum()


@compiled
@each
def test_gradient(sample):
    assert torch.autograd.gradcheck(sample.function, sample.leaves())


@compiled
@each
def test_double_backward(sample):
    assert torch.autograd.gradgradcheck(sample.function, sample.leaves(), fast_mode=True)


@compiled
@each
def test_forward_mode(sample):
    leaves = sample.leaves()
    assert torch.autograd.gradcheck(
        sample.function,
        leaves,
        check_forward_ad=True,
        check_backward_ad=False,
        check_undefined_grad=False,
        fast_mode=True,
    )
    tangents = tuple(torch.randn_like(a) for a in sample.arguments)
    close(
        jvp(sample.function, sample.arguments, tangents), jvp(sample.definition, sample.arguments, tangents)
    )


@compiled
@each
def test_forward_over_reverse_and_reverse_over_reverse(sample):
    every = tuple(range(len(sample.arguments)))
    expected = jacrev(jacrev(loss(sample.definition), every), every)(*sample.arguments)
    for transform in (jacrev, jacfwd):
        close(transform(jacrev(loss(sample.function), every), every)(*sample.arguments), expected)
    close(hessian(loss(sample.function))(*sample.arguments), expected[0][0])


@compiled
@each
def test_vmap(sample):
    """Over each argument alone, over all, from another dimension, twice, and under a gradient."""
    count = len(sample.arguments)
    several = [torch.stack([a, 0.9 * a, 1.1 * a]) for a in sample.arguments]
    axes = [tuple(0 if j == i else None for j in range(count)) for i in range(count)] + [(0,) * count]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dims in axes:
            given = [s if d == 0 else a for s, a, d in zip(several, sample.arguments, dims, strict=True)]
            close(vmap(sample.function, dims)(*given), vmap(sample.definition, dims)(*given))
            last = tuple(None if d is None else g.dim() - 1 for d, g in zip(dims, given, strict=True))
            moved = [g if d is None else g.movedim(0, -1) for d, g in zip(dims, given, strict=True)]
            close(vmap(sample.function, last, 1)(*moved), vmap(sample.definition, dims, 1)(*given))
            every = tuple(range(count))
            close(
                vmap(grad(loss(sample.function), every), dims)(*given),
                vmap(grad(loss(sample.definition), every), dims)(*given),
            )
        twice = [torch.stack([s, s.flip(0)]) for s in several]
        nested = [
            vmap(vmap(f, (0,) * count), (0,) * count)(*twice) for f in (sample.function, sample.definition)
        ]
        close(*nested)


def lowered(op, dtype):
    """What an op gives for float32 under autocast: one like a linear layer follows it, others do not."""
    return dtype if op == "spiral_conv" else torch.float32


@compiled
@each
def test_autocast_on_cpu(op, index):
    sample = samples(op, torch.float32)[index]
    leaves = sample.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sample.function(*leaves)
    assert out.dtype == lowered(op, torch.bfloat16)
    torch.testing.assert_close(out.float(), sample.definition(*sample.arguments), rtol=0.02, atol=0.03)
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def on_cuda(op, transform):
    """A call of the op with float32 tensors of a CUDA device that have no memory; with maps of two dtypes."""
    x = torch.empty(2, 7, 5, device="cuda")
    if op == "spiral_conv":
        indices = torch.zeros(6, 3, dtype=torch.int64)
        return pahm_ops.spiral_conv(x, indices.to("cuda"), torch.empty(4, 15, device="cuda"))
    if op == "mesh_pool":
        return pahm_ops.mesh_pool(x, transform.to("cuda"))
    maps = [torch.empty(2, 3, 8, 8, device="cuda", dtype=t) for t in (torch.float16, torch.float32)]
    return pahm_ops.vertex_sample(maps, torch.empty(2, 7, 2, device="cuda"))


class Calls(TorchDispatchMode):
    """Notes the ops of this package that are called, with the dtypes that they are given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pahm_ops":
            leaves = torch.utils._pytree.tree_leaves(args)
            dtypes = {a.dtype for a in leaves if isinstance(a, torch.Tensor) and a.is_floating_point()}
            self.found.append((str(function), dtypes))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPS)
def test_autocast_on_cuda(op, monkeypatch):
    """What the op is given where a CUDA device is served; torch.autocast is off where there is none."""
    transform = pahm_ops.MeshTransform.prepare(torch.eye(7).to_sparse())
    backends = sys.modules["pahm_ops.backends"]
    monkeypatch.setattr(backends, "available", lambda path, device: path != "triton")
    monkeypatch.setattr(backends, "_CHOSEN", {})  # what other tests made it remember
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Calls() as calls:
            out = on_cuda(op, transform)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert calls.found == [(f"pahm_ops.{op}.default", {lowered(op, torch.float16)})]
    assert out.device.type == "cuda" and out.dtype == lowered(op, torch.float16)


@compiled
@each
def test_deterministic(sample):
    """Nothing is refused, results are the same bits, and memory that torch fills with NaN is all written."""
    leaves = sample.leaves()
    plain = torch.autograd.grad(loss(sample.function)(*leaves), leaves)
    torch.use_deterministic_algorithms(True)
    try:
        out = sample.function(*leaves)
        again = torch.autograd.grad(out.pow(3).sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(out, sample.function(*leaves))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


@compiled
@each
def test_export(sample, op):
    """One graph with the op in it, for any batch: where only the first argument has one."""
    exported = torch.export.export(Module(sample.function), sample.arguments)
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert f"pahm_ops.{op}.default" in names
    close(exported.module()(*sample.arguments), sample.function(*sample.arguments))
    if op != "vertex_sample":
        batch = torch.export.Dim("batch", min=2, max=64)
        shapes = {"arguments": ({0: batch}, *(None for _ in sample.arguments[1:]))}
        dynamic = torch.export.export(Module(sample.function), sample.arguments, dynamic_shapes=shapes)
        more = (torch.cat([sample.arguments[0]] * 3), *sample.arguments[1:])
        close(dynamic.module()(*more), sample.function(*more))


@compiled
@each_graph
def test_compile_with_dynamic_shapes(sample):
    torch._dynamo.reset()
    function = torch.compile(loss(sample.function), fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = sample.leaves()
    for times in (1, 2):
        # Twice the batch, of those that have one.
        given = [torch.cat([a] * times).detach().requires_grad_() if a.shape[0] == 2 else a for a in leaves]
        expected = loss(sample.definition)(*given)
        actual = function(*given)
        close(actual, expected)
        close(torch.autograd.grad(actual, given), torch.autograd.grad(expected, given))
    with torch.no_grad():
        close(function(*leaves), loss(sample.definition)(*leaves))


@compiled
@each
def test_opcheck(op, index):
    raw, arguments = getattr(torch.ops.pahm_ops, op), samples(op, torch.float32)[index].raw
    differentiable = arguments[:1] if op == "mesh_pool" else arguments
    for leaf in torch.utils._pytree.tree_leaves(differentiable):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
    torch.library.opcheck(raw, arguments)


def test_the_documentation_lists_these_features_and_no_others():
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    table = re.search(r"\| supported \|(.*?)\n\n", page, re.DOTALL)
    assert table is not None
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table[0].strip().splitlines()]
    assert rows[0][1:4] == [f"`{op}`" for op in OPS]
    named = [re.search(r"`(test_\w+)`", row[-1])[1] for row in rows[2:]]
    here = [name for name, value in globals().items() if name.startswith("test_") and callable(value)]
    here.remove("test_the_documentation_lists_these_features_and_no_others")
    assert sorted(named) == sorted(here)
    for name, row in zip(named, rows[2:], strict=True):
        assert row[1:4] == ["yes" if op in ops_of(globals()[name]) else "not tested" for op in OPS], name


def ops_of(test):
    """The ops that a test is run for, by its parameters."""
    values = [v for mark in test.pytestmark if mark.name == "parametrize" for v in mark.args[1]]
    return {getattr(v, "values", (v,))[0] for v in values}
