"""The private names of torch: each is hidden, and what it is for is still right or refused."""

import importlib.util
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from repository import HELPERS
from torch.autograd import forward_ad

import pahm_ops
from pahm_ops import _library, _torch_internals

FOLDER = Path(pahm_ops.__file__).parent


def load(monkeypatch, hides):
    """The module anew, in a torch without the names that `hides` is true of."""

    def getter(name):
        if hides(name):
            raise AttributeError(name)
        return attrgetter(name)

    spec = importlib.util.spec_from_file_location("internals", _torch_internals.__file__)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr("operator.attrgetter", getter)
        spec.loader.exec_module(module)
    return module


SOURCE = Path(_torch_internals.__file__).read_text(encoding="utf-8")
NAMES = re.findall(r'_take\(\s*"[\w.]+",\s*"([\w.]+)"', SOURCE)


@pytest.fixture(params=[*NAMES, ""])
def lacking(request, monkeypatch):
    """A torch without one of the names; without any of them."""
    module = load(monkeypatch, lambda name: request.param in (name, ""))
    assert len(module.LACKING) == 1 if request.param else len(module.LACKING) > 6
    assert all(name in "".join(module.notes()) for name in module.LACKING)
    return module


def test_every_private_name_is_in_one_file():
    private = re.compile(
        r"torch\.(_(?!_)|\w+\._|autograd\.\w+\._)|\bforward_ad\._|\._(version|values|indices)\b"
    )
    for path in [*FOLDER.rglob("*.py"), *FOLDER.with_name("pahm").rglob("*.py")]:
        if path != Path(_torch_internals.__file__):
            assert private.findall(path.read_text(encoding="utf-8")) == [], path


def test_this_torch_has_every_name():
    assert _torch_internals.LACKING == {}


def test_what_is_active_is_known(lacking):
    seen = []

    def note(x):
        seen.append((lacking.functorch_active(), lacking.dual_level_open()))
        return x.sum()

    x = torch.ones(3)
    note(x)
    torch.func.grad(note)(x)
    torch.func.vmap(note)(x)
    torch.func.jvp(note, (x,), (x,))
    with forward_ad.dual_level():
        note(x)
    note(x)
    assert [functorch for functorch, _ in seen] == [False, True, True, True, False, False]
    assert [dual for _, dual in seen] == [False, False, False, True, True, False]


def test_memory_is_used_only_where_changes_are_seen(lacking):
    x = torch.ones(2)
    before = lacking.version(x)
    x.add_(1)
    assert (
        (before is None) == (lacking.version(x) is None) == (lacking._MADE_ANEW in lacking.LACKING.values())
    )
    assert before is None or lacking.version(x) != before
    with torch.inference_mode():
        assert lacking.version(torch.ones(2)) is None
    matrix = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2), check_invariants=True)
    indices, values = lacking.coo_entries(matrix)
    assert values.sum() == 3 and indices[:, 0].tolist() == [0, 1]


def test_fake_tensors_are_known(lacking):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert lacking.is_fake(torch.ones(2))
    assert not lacking.is_fake(torch.ones(2))


def test_the_ops_without_any_of_them():
    if not _library.LOADED:
        pytest.skip("nothing was compiled")
    code = """
import operator, sys
real = operator.attrgetter
def attrgetter(*names):
    if sys._getframe(1).f_globals["__name__"] == "pahm_ops._torch_internals":
        raise AttributeError(names)
    return real(*names)
operator.attrgetter = attrgetter
import torch, pahm_ops
from op_samples import OPS, samples
operator.attrgetter = real
from pahm_ops.backends import served
assert served(torch.device("cpu")) and "_are_functorch_transforms_active" in str(pahm_ops.backends())

def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

for op in OPS:
    for sample in samples(op)[::3]:
        loss = lambda f, *a: f(*a).pow(3).sum()
        found = []
        for f in (sample.function, sample.definition):
            leaves = sample.leaves()
            first = torch.autograd.grad(loss(f, *leaves), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
            found.append([*first, *second])
        close(*found)
        stacked = [torch.stack([a, 2 * a]) for a in sample.arguments]
        close(torch.vmap(sample.function)(*stacked), torch.vmap(sample.definition)(*stacked))
        every = tuple(range(len(leaves)))
        both = sample.function, sample.definition
        close(*(torch.func.grad(lambda *a: loss(f, *a), every)(*sample.arguments) for f in both))
        if op != "vertex_sample":
            close(*(torch.func.jvp(f, sample.arguments, sample.arguments) for f in both))
x = torch.ones(1, 2, 3)
matrix = torch.eye(2).to_sparse()
assert torch.equal(pahm_ops.mesh_pool(x, matrix), x) and torch.equal(pahm_ops.mesh_pool(x, matrix * 2), x * 2)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
