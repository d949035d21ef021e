"""The depthwise convolution for training on a CPU, against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from pahm_ops import _library
from pahm_ops.depthwise_conv import depthwise_conv, is_served

pytestmark = pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled")

# channels, height, width, kernel, stride, (above, left), (below, right)
CASES = {
    "padded on all sides": (16, 9, 12, (3, 3), 1, (1, 1), (1, 1)),
    "a part of a vector of channels": (13, 6, 7, (5, 5), 1, (2, 2), (2, 2)),
    "several blocks of channels": (150, 5, 5, (3, 3), 1, (1, 1), (1, 1)),
    "a map smaller than the kernel": (24, 3, 3, (5, 5), 1, (2, 2), (2, 2)),
    "padded below and on the right": (32, 8, 10, (3, 3), 2, (0, 0), (1, 1)),
    "uneven padding and a stride": (17, 12, 12, (5, 5), 2, (1, 1), (2, 2)),
    "a stride of 3": (8, 11, 7, (3, 3), 3, (1, 0), (1, 2)),
    "a kernel that is not square": (8, 9, 9, (1, 7), 1, (0, 3), (0, 3)),
    "no padding": (8, 6, 6, (2, 4), 2, (0, 0), (0, 0)),
    "one pixel": (8, 1, 1, (3, 3), 1, (1, 1), (1, 1)),
}


def expected(x, weight, stride, before, after):
    padded = F.pad(x, (before[1], after[1], before[0], after[0]))
    return F.conv2d(padded, weight, stride=stride, groups=x.shape[1])


def maps(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("isa", ["", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_pytorch(monkeypatch, name, isa):
    monkeypatch.setenv("PAHM_CPU_ISA", isa)
    channels, height, width, kernel, stride, before, after = CASES[name]
    torch.manual_seed(0)
    x, weight = maps(3, channels, height, width), torch.randn(channels, 1, *kernel, requires_grad=True)
    truth = expected(x.double(), weight.double(), stride, before, after)
    out = depthwise_conv(x, weight, stride, before, tuple(truth.shape[2:]))
    assert out.shape == truth.shape and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    grad = torch.randn(truth.shape)  # in another memory format than the result
    found = torch.autograd.grad(out, [x, weight], grad)
    for ours, theirs in zip(found, torch.autograd.grad(truth, [x, weight], grad.double()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, weight = maps(8, 200, 24, 24), torch.randn(200, 1, 5, 5, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = depthwise_conv(x, weight, 2, (1, 1), (12, 12))
            results.append([out, *torch.autograd.grad(out, [x, weight], out)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_needed_gradients_are_computed():
    x, weight = maps(1, 8, 4, 4), torch.randn(8, 1, 3, 3)
    out = depthwise_conv(x, weight, 1, (1, 1), (4, 4))
    out.sum().backward()
    assert x.grad is not None and weight.grad is None


def test_what_is_served():
    x = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert is_served(x)
    assert not is_served(x.contiguous()) and not is_served(x.double()) and not is_served(x[0])
    assert not is_served(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_served(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "x must be .B, C, H, W. in channels_last and float32"),
        ({"weight": torch.zeros(7, 3, 3)}, "weight must be .C, KH, KW. and float32"),
        ({"stride": 0}, "stride must be from 1"),
        ({"top": 3}, "padding must be at least 0 and less than the kernel"),
        ({"out_height": -1}, "sizes must be from 0"),
    ],
)
def test_the_op_refuses_what_is_not_safe(change, message):
    given = {"x": maps(1, 8, 4, 4), "weight": torch.zeros(8, 3, 3), "stride": 1, "top": 1, "left": 1}
    given |= {"out_height": 4, "out_width": 4} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.pahm_ops._depthwise_conv(**given)


def test_results_beyond_the_padding_read_zeros():
    ones, weight = maps(1, 8, 4, 4).detach().fill_(1), torch.ones(8, 3, 3)
    out = torch.ops.pahm_ops._depthwise_conv(ones, weight, 1, 1, 1, 9, 9)
    assert (out[:, :, 5:] == 0).all() and (out[..., 5:] == 0).all() and (out[..., 0, 0] == 4).all()
    grad = maps(1, 8, 9, 9).detach().fill_(1)
    given = torch.ops.pahm_ops._depthwise_conv_input_grad(grad, weight, 1, 1, 1, 4, 4)
    assert given[0, 0].tolist() == [[4, 6, 6, 6], *[[6, 9, 9, 9]] * 3]
    summed = torch.ops.pahm_ops._depthwise_conv_weight_grad(grad, ones, 3, 3, 1, 1, 1)
    assert summed[0].tolist() == [[16, 16, 12], [16, 16, 12], [12, 12, 9]]
