"""Calls of a frozen module: what runs in PyTorch on the way, and what comes back."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from frozen_modules import Through, compare, units
from torch import Tensor, nn
from torch.nn import functional as F

from pahm_ops.frozen import freeze


class Pair(NamedTuple):
    first: Tensor
    rest: list[Tensor]


def linear(width=5):
    return nn.Linear(width, width)


def deep(layer, x, count=6):
    """Enough steps that the workspace's early places are used again."""
    for _ in range(count):
        x = layer(x)
    return x


def test_views_of_values_live_as_long_as_they_are_read():
    x = torch.randn(2, 6, 5)
    for view in (
        lambda y: y.view(2, 30),
        lambda y: y.transpose(1, 2),
        lambda y: y[:, 1:3, ::2],
        lambda y: y.unbind(1)[2],
        lambda y: y.chunk(2, 1)[1].expand(2, 3, 5),
        lambda y: y.permute(2, 0, 1).transpose(0, 1)[..., None].squeeze(-1),
        lambda y: torch.broadcast_tensors(y, y[:, :1])[1],
        lambda y: y.unflatten(1, (2, 3)).flatten(0, 1),
    ):

        def forward(a, b, x, view=view):
            y = a(x)
            early = view(y)
            # PyTorch is the last that reads y itself; the steps that follow could overwrite it.
            late = deep(b, y.sigmoid())
            return early * late.mean(), late, early

        compare(Through(forward, linear(), linear()), x)


def test_maps_keep_their_order_of_numbers_whatever_their_layout():
    x = torch.randn(2, 16, 6, 4)

    def forward(conv, layer, x):
        y = conv(x)
        flat = y.view(2, -1)
        return (
            layer(flat),
            y.contiguous().view(-1),
            y.flatten(2).transpose(1, 2),
            y.reshape(4, -1),
            y.mean((2, 3)),
        )

    module = Through(forward, nn.Conv2d(16, 8, 3, padding=1), nn.Linear(192, 3))
    compare(module, x)
    frozen = freeze(module)
    frozen(x)
    turned = x.to(memory_format=torch.channels_last)
    for ours, theirs in zip(frozen(turned), frozen(x), strict=True):
        assert torch.equal(ours, theirs)


def test_inputs_of_any_layout():
    module = Through(lambda x: x.contiguous().view(len(x), -1) + 0)
    frozen, x = freeze(module), torch.randn(2, 4, 5, 3)
    frozen(x.permute(0, 3, 1, 2).contiguous())
    turned = x.permute(0, 3, 1, 2)
    assert torch.equal(frozen(turned), module(turned))
    layers = Through(lambda conv, x: conv(x), nn.Conv2d(3, 5, 3))
    frozen = freeze(layers)
    expected = frozen(turned.contiguous())
    assert torch.equal(frozen(turned), expected)
    assert torch.equal(frozen(turned.contiguous().requires_grad_()), expected)
    large = torch.zeros(2, 6, 8, 10)
    large[:, ::2, ::2, ::2] = turned
    assert torch.equal(frozen(large[:, ::2, ::2, ::2]), expected)


def test_ops_that_no_kernel_knows_run_between_steps():
    x = torch.randn(2, 6, 5)

    def forward(a, b, gru, x):
        y = a(x)
        values, places = y.max(1)
        parts = torch.split(b(y.sigmoid()), [1, 5], 1)
        sequence, state = gru(parts[1])
        order = torch.argsort(y, 1)
        picked = y.gather(1, order) + y[:, torch.tensor([5, 4, 3, 2, 1, 0])]
        return values, places, sequence, state, b(picked), y.softmax(-1) @ b(y).transpose(1, 2), parts[0]

    module = Through(forward, linear(), linear(), nn.GRU(5, 5, batch_first=True))
    names = units(module, x)
    assert names.count("product") >= 4 and "aten.gru.input" in names
    compare(module, x)


def test_overwriting_a_fresh_value():
    x = torch.randn(2, 6, 5)

    def forward(a, b, x):
        y = a(x).sigmoid_().mul_(2)
        z = b(y).add_(1).add_(x)
        z = z.clamp_(-1, 1)
        w = torch.tanh(z)
        w += y
        return w, F.dropout(b(w), 0.5, False).exp_()

    before = x.clone()
    compare(Through(forward, linear(), linear()), x)
    assert torch.equal(x, before)


def test_overwriting_does_not_reach_other_readers():
    def forward(a, x):
        y = a(x)
        early = y * 1.5
        return early, y.relu_() + early, a(y)

    compare(Through(forward, linear()), torch.randn(2, 6, 5))


def test_overwriting_waits_for_earlier_readers():
    def forward(a, b, x):
        y = a(x)
        # The sum is a step, which runs after both calls of PyTorch.
        total = b(y.sin()) + y
        return total, y.exp_()

    compare(Through(forward, linear(), linear()), torch.randn(2, 6, 5))


def test_out_arguments():
    def forward(a, x):
        y = a(x)
        return torch.add(y, x, out=y), a(x)

    compare(Through(forward, linear()), torch.randn(2, 5))


def test_an_attention_layer_and_a_transformer():
    x = torch.randn(2, 6, 8)
    compare(Through(lambda layer, x: layer(x, x, x), nn.MultiheadAttention(8, 2, batch_first=True)), x)
    compare(Through(lambda layer, x: layer(x), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), x)


def test_results_of_each_form():
    x, y = torch.randn(2, 5), torch.randn(2, 5)

    def forward(a, x, y):
        z = a(x)
        return {
            "pair": Pair(z, [z.t(), y]),
            "ordered": OrderedDict(view=z[:, 1:], same=(z, z)),
            "constant": (1, "name", None, 2.5, True),
            "maximum": torch.max(z, 1),
        }

    module = Through(forward, linear())
    found, expected = freeze(module)(x, y), module(x, y)
    assert list(found) == list(expected) and isinstance(found["pair"], Pair)
    assert found["constant"] == expected["constant"]
    compare(Through(lambda a, x, y: tuple(forward(a, x, y)[k] for k in ("pair", "ordered")), linear()), x, y)
    assert torch.equal(found["maximum"].indices, expected["maximum"].indices)


def test_inputs_and_weights_that_come_back():
    x, y = torch.randn(2, 5), torch.randn(2, 5)
    for forward in (
        lambda a, x, y: x,
        lambda a, x, y: (y, a(x)),
        lambda a, x, y: (x, a(x), x),
        lambda a, x, y: a.weight,
        lambda a, x, y: (a.weight, a(y), y.t()),
        lambda a, x, y: [],
    ):
        compare(Through(forward, linear()), x, y)


def test_results_are_not_overwritten_by_the_next_call():
    def forward(a, conv, x, y):
        z = a(x)
        return x, z, z.t(), z.relu(), z[:, :1].expand(2, 5), conv(y), conv(y).flatten(1), F.max_pool2d(y, 2)

    inputs = torch.randn(2, 5), torch.randn(2, 3, 4, 4)
    frozen = freeze(Through(forward, linear(), nn.Conv2d(3, 4, 3)))
    first = frozen(*inputs)
    kept = [tensor.clone() for tensor in first]
    second = frozen(*(tensor + 1 for tensor in inputs))
    for result, copy in zip(first, kept, strict=True):
        assert torch.equal(result, copy)
    with torch.inference_mode():
        for result in second:
            result.fill_(7)
    for result, copy in zip(frozen(*inputs), kept, strict=True):
        assert torch.equal(result, copy)


def test_no_numbers_at_all():
    for layer, shape in ((nn.Conv2d(3, 5, 3), (0, 3, 9, 8)), (nn.Linear(5, 4), (2, 0, 5))):
        frozen = freeze(layer.eval())
        expected = layer(torch.empty(shape))
        assert frozen(torch.empty(shape)).shape == expected.shape


def test_many_shapes_in_turn(isa):
    layer = nn.Conv2d(3, 5, 3, padding=1).eval()
    frozen, inputs = freeze(layer), [torch.randn(1 + i % 3, 3, 4 + i, 9 - i) for i in range(7)]
    expected = [layer(x) for x in inputs]
    for order in (range(7), reversed(range(7)), (0, 6, 0, 6, 3)):
        for i in order:
            torch.testing.assert_close(frozen(inputs[i]), expected[i].detach(), atol=2e-6, rtol=1e-5)
    assert len(frozen._programs) == 4


def test_another_instruction_set_at_each_call(monkeypatch):
    layer = nn.Conv2d(16, 20, 3, padding=1).eval()
    frozen, x = freeze(layer), torch.randn(2, 16, 6, 6)
    expected = layer(x).detach()
    for name in ("plain", None, "plain", None):
        monkeypatch.delenv("PAHM_CPU_ISA", raising=False)
        if name is not None:
            monkeypatch.setenv("PAHM_CPU_ISA", name)
        torch.testing.assert_close(frozen(x), expected, atol=2e-6, rtol=1e-5)


def test_a_module_calls_itself_within_another():
    layer = Through(lambda a, x: F.relu(a(x)), linear())
    x = torch.randn(2, 5)
    twice = Through(lambda a, b, x: b(a(b(x))), linear(), layer)
    compare(twice, x)
