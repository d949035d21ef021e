"""What cannot be frozen is refused in one sentence."""

from dataclasses import dataclass

import pytest
import torch
from frozen_modules import Through
from torch import Tensor, nn

from pahm_ops.frozen import FreezeError, freeze


@dataclass
class Answer:
    value: Tensor


def refused(forward, match, *layers):
    with pytest.raises(FreezeError, match=match):
        freeze(Through(forward, *layers))(torch.randn(2, 5))


def test_a_module_that_trains():
    with pytest.raises(ValueError, match="expected a module in evaluation mode"):
        freeze(nn.Linear(2, 2))


def test_a_module_elsewhere():
    with pytest.raises(ValueError, match="expected a module on the CPU, but weight is on meta"):
        freeze(nn.Linear(2, 2, device="meta").eval())
    with pytest.raises(ValueError, match="but running_mean is on meta"):
        freeze(nn.BatchNorm2d(2, affine=False, device="meta").eval())


def test_nothing_compiled(monkeypatch):
    monkeypatch.setattr("pahm_ops._library.LOADED", False)
    with pytest.raises(ValueError, match="the kernels are not compiled here"):
        freeze(nn.Linear(2, 2).eval())


@pytest.mark.parametrize("known", [False, True])
def test_inputs_of_another_kind(known):
    frozen = freeze(nn.Linear(5, 2).eval())
    if known:
        frozen(torch.randn(2, 5))
    for wrong, match in (
        (torch.randn(2, 5).double(), "takes float32 tensors on the CPU, got torch.float64 on cpu"),
        (torch.ones(2, 5).int(), "got torch.int32 on cpu"),
        (torch.randn(2, 5).half(), "got torch.float16 on cpu"),
        (torch.empty(2, 5, device="meta"), "got torch.float32 on meta"),
        ([[1.0] * 5], "takes tensors, got list"),
        (None, "takes tensors, got NoneType"),
    ):
        with pytest.raises(ValueError, match=match):
            frozen(wrong)


def test_an_input_too_few_or_of_a_wrong_shape():
    frozen = freeze(nn.Linear(5, 2).eval())
    frozen(torch.randn(2, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        frozen(torch.randn(2, 4))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        frozen()
    assert frozen(torch.randn(3, 5)).shape == (3, 2)


def test_numbers_that_are_read():
    reads = "the module reads numbers of its inputs"
    refused(lambda x: x * x.sum().item(), reads)
    refused(lambda x: x * float(x[0, 0]), reads)
    refused(lambda x: x if x.sum() > 0 else -x, reads)
    refused(lambda x: x if torch.equal(x, x) else -x, reads)
    refused(lambda x: x * x.tolist()[0][0], reads)
    refused(lambda a, x: a(x) * float(a(x).numpy()[0, 0]), reads, nn.Linear(5, 5))
    refused(lambda x: x[:, : int(x.argmax())], reads)


def test_shapes_that_depend_on_numbers():
    reads = "the module reads numbers of its inputs"
    refused(lambda x: x.nonzero(), reads)
    refused(lambda x: x[x > 0], reads)
    refused(lambda x: torch.masked_select(x, x > 0), reads)
    refused(lambda x: x.unique(), reads)


def test_overwritten_views():
    follow = "the module overwrites a tensor in a way that cannot be followed"

    def part(x):
        y = x + 1
        y[:, 0] = 0
        return y

    def view(x):
        y = x * 2
        z = y.view(-1)
        y.add_(1)
        return z

    def fresh(x):
        y = torch.empty_like(x)
        y[:1] = x[:1]
        return y

    for forward in (part, view, fresh):
        refused(forward, follow)


def test_overwritten_weights_and_buffers():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("sum", torch.zeros(5))

        def forward(self, x):
            self.sum.add_(x.sum(0))
            return x + self.sum

    with pytest.raises(FreezeError, match="overwrites a tensor"):
        freeze(Counting().eval())(torch.randn(2, 5))


def test_several_tensors_overwritten_at_once():
    refused(lambda x: torch._foreach_add_([x + 1, x + 2], 1.0), "overwrites a tensor")


def test_results_of_an_unknown_form():
    refused(lambda x: Answer(x * 2), "the module returns a Answer; expected tensors in lists, tuples")
    refused(lambda x: [x, {1, 2}], "the module returns a set")


def test_the_module_may_be_called_after_a_refusal():
    seen = []

    def forward(layer, x):
        y = layer(x)
        if not seen:
            seen.append(1)
            float(y.sum())
        return y

    frozen, x = freeze(Through(forward, nn.Linear(5, 4))), torch.randn(2, 5)
    with pytest.raises(FreezeError):
        frozen(x)
    torch.testing.assert_close(frozen(x), frozen._module(x).detach())


def test_a_torch_without_dispatch_modes(monkeypatch):
    monkeypatch.setattr("pahm_ops._torch_internals.DispatchMode", None)
    with pytest.raises(ValueError, match="this torch cannot say which ops a module calls"):
        freeze(nn.ReLU().eval())
