"""Batch normalisation with its clamp, for training on a CPU, against PyTorch's in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from pahm_ops import _library
from pahm_ops.batch_norm import batch_norm

pytestmark = pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled")

LIMITS = {"nothing": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def operands(*shape, mean=2.0):
    torch.manual_seed(0)
    x = (mean + torch.randn(shape)).contiguous(memory_format=torch.channels_last).requires_grad_()
    channels = shape[1]
    weight = (3 * torch.rand(channels)).requires_grad_()
    return x, weight, (3 * torch.randn(channels)).requires_grad_()


@pytest.mark.parametrize("isa", ["", "plain"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("shape", [(4, 32, 9, 9), (3, 13, 5, 4), (2, 70, 1, 3), (2, 8200, 1, 1)])
def test_results_statistics_and_gradients_are_those_of_pytorch(monkeypatch, shape, limits, isa):
    monkeypatch.setenv("PAHM_CPU_ISA", isa)
    x, weight, bias = operands(*shape)
    channels = shape[1]
    running = [torch.rand(channels), torch.rand(channels)]
    theirs = [value.double() for value in running]
    out = batch_norm(x, weight, bias, *running, 0.3, 1e-3, LIMITS[limits])
    truth = F.batch_norm(x.double(), *theirs, weight.double(), bias.double(), True, 0.3, 1e-3)
    truth = truth.clamp(*LIMITS[limits])
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=2e-5)
    for ours, other in zip(running, theirs, strict=True):
        torch.testing.assert_close(ours.double(), other, rtol=1e-5, atol=1e-6)
    grad = torch.randn(truth.shape)  # in another memory format than the result
    inputs = [x, weight, bias]
    found, wanted = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(truth, inputs, grad.double())
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_a_mean_far_from_zero_keeps_the_deviation():
    x, weight, bias = operands(4, 16, 20, 20, mean=1000.0)
    running = [torch.zeros(16), torch.ones(16)]
    batch_norm(x, weight, bias, *running, 1.0, 1e-5, LIMITS["nothing"])
    exact = x.detach().double().var(dim=(0, 2, 3))
    torch.testing.assert_close(running[1].double(), exact, rtol=1e-4, atol=0)


def test_a_nan_stays_one():
    x, weight, bias = operands(2, 8, 4, 4)
    with torch.no_grad():
        x[0, 3, 0, 0] = math.nan
    out = batch_norm(x, weight, bias, torch.zeros(8), torch.ones(8), 0.1, 1e-5, LIMITS["relu6"])
    assert out[:, 3].isnan().all() and not out[:, :3].isnan().any()
    assert torch.autograd.grad(out, x, torch.ones_like(out))[0][:, 3].isnan().all()


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, weight, bias = operands(8, 48, 30, 30)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            running = [torch.zeros(48), torch.ones(48)]
            out = batch_norm(x, weight, bias, *running, 0.1, 1e-5, LIMITS["relu"])
            results.append([out, *running, *torch.autograd.grad(out, [x, weight, bias], out)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_refused():
    x, weight, bias = operands(1, 8, 1, 1)
    with pytest.raises(ValueError, match="x must have more than one number in a channel"):
        batch_norm(x, weight, bias, torch.zeros(8), torch.ones(8), 0.1, 1e-5, LIMITS["relu"])
    with pytest.raises(ValueError, match="running_mean must have one number of float32 for each channel"):
        batch_norm(x, weight, bias, torch.zeros(7), torch.ones(8), 0.1, 1e-5, LIMITS["relu"])


def test_the_result_can_be_changed_in_place():
    x, weight, bias = operands(2, 8, 4, 4)
    running = [torch.zeros(8), torch.ones(8)]
    out = batch_norm(x, weight, bias, *running, 0.1, 1e-5, LIMITS["nothing"])
    torch.relu_(out)
    clamped = batch_norm(x, weight, bias, *running, 0.1, 1e-5, LIMITS["relu"])
    assert torch.equal(out, clamped)
    grad = torch.randn_like(out)
    a, b = (torch.autograd.grad(y, x, grad)[0] for y in (out, clamped))
    torch.testing.assert_close(a, b)
