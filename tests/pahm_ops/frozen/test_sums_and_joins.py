"""Sums and concatenations in a frozen module, which belong to the steps around them."""

import pytest
import torch
from frozen_modules import Through, compare, units
from torch import nn
from torch.nn import functional as F


def conv(inputs=16, outputs=16, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


@pytest.fixture
def x():
    return 2 * torch.randn(2, 16, 7, 6)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(16)], ids=["plain", "norm"])
def test_residual_sums_belong_to_the_convolution(swapped, norm, x, isa):
    def add(a, b):
        return b + a if swapped else a + b

    for forward in (
        lambda a, n, x: add(n(a(x)), x),
        lambda a, n, x: F.relu(add(n(a(x)), x)),
        lambda a, n, x: add(F.relu(n(a(x))), x),
        lambda a, n, x: F.silu(add(n(a(x)), x)),
        lambda a, n, x: n(a(x)).add_(x).relu_(),
    ):
        module = Through(forward, conv(), norm)
        assert units(module, x) == ["product"]
        compare(module, x)


def test_an_activation_before_and_one_after_the_sum(x):
    module = Through(lambda a, x: F.relu(F.silu(a(x)) + x), conv())
    assert units(module, x) == ["product", "elementwise"]
    compare(module, x)


def test_a_sum_whose_other_operand_comes_later(x, isa):
    def forward(a, b, x):
        early = a(x)
        return F.relu(early + b(x)), F.relu(b(x) + early)

    compare(Through(forward, conv(), conv()), x)
    down = Through(lambda a, b, x: F.relu(a(x) + b(x)), conv(stride=2), nn.Conv2d(16, 16, 1, 2))
    assert units(down, x) == ["product", "product"]
    compare(down, x)


def test_sums_that_no_product_takes(x):
    for forward in (
        lambda a, b, x: a(x) + a(x) + b(x),
        lambda a, b, x: (lambda y: y + y)(a(x)),
        lambda a, b, x: (lambda y: (y + x, y))(a(x)),
        lambda a, b, x: a(x) + x[:, :1],
        lambda a, b, x: torch.add(a(x), x, alpha=0.5),
        lambda a, b, x: a(x) + 1,
        lambda a, b, x: a(x) + x.mean(),
        lambda a, b, x: a(x) * 0.125 + b(x) * 3,
        lambda a, b, x: F.relu(a(x) * -2),
        lambda a, b, x: 2 * (F.max_pool2d(a(x), 2) + F.max_pool2d(b(x), 2)),
        lambda a, b, x: x + a(x).sigmoid(),
        lambda a, b, x: F.pad(x, (1, 1)) + b(F.pad(a(x), (1, 1))),
    ):
        compare(Through(forward, conv(), conv()), x)


def test_a_sum_with_what_a_concatenation_reads_too(x):
    def forward(a, b, x):
        y = a(x)
        joined = b(torch.cat([y, x], 1))
        return joined + y, F.relu(joined) + x

    compare(Through(forward, conv(), conv(32)), x)


@pytest.mark.parametrize("widths", [(16, 16), (3, 5), (1, 17, 8)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_concatenations_before_convolutions(kernel, widths, isa):
    parts = [torch.randn(2, width, 6, 7) for width in widths]
    layer = nn.Conv2d(sum(widths), 9, kernel, padding=kernel // 2)
    module = Through(lambda layer, *parts: layer(torch.cat(parts, 1)), layer)
    assert units(module, *parts) == ["product"]
    compare(module, *parts)
    compare(Through(lambda layer, *parts: layer(torch.cat(parts, -3)), layer), *parts)


@pytest.mark.parametrize("widths", [(16, 16), (3, 5), (1, 17, 8)])
def test_concatenations_before_linear_layers(widths, isa):
    layer = nn.Linear(sum(widths), 9)
    for shape in ((5,), (2, 7)):
        parts = [torch.randn(*shape, width) for width in widths]
        module = Through(lambda layer, *parts: F.gelu(layer(torch.cat(parts, -1))), layer)
        assert units(module, *parts) == ["product"]
        compare(module, *parts)


def test_concatenations_within_concatenations(x):
    def forward(a, b, x):
        inner = torch.cat([x, a(x)], 1)
        return b(torch.cat([inner, x], 1)), a(inner[:, :16])

    compare(Through(forward, conv(), conv(48)), x)
    nested = Through(lambda a, x: a(torch.cat([torch.cat([x, x], 1), x], 1)), conv(48))
    compare(nested, x)


def test_concatenations_of_constants(x):
    constant, row = torch.randn(2, 4, 7, 6), torch.randn(2, 7, 3)

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(20), nn.Linear(6, 5)
            self.register_buffer("constant", constant)
            self.register_buffer("row", row)

        def forward(self, x, y):
            return self.a(torch.cat([x, self.constant], 1)), self.b(torch.cat([self.row, y], -1))

    compare(Joined().eval(), x, torch.randn(2, 7, 3))


def test_concatenations_that_something_else_reads():
    x = torch.randn(2, 4, 6, 6)
    linear = nn.Linear(6, 3)
    for forward in (
        lambda layer, x: (lambda y: (layer(y), y))(torch.cat([x, x], 1)),
        lambda layer, x: (lambda y: layer(y) + y.sum())(torch.cat([x, x.relu()], 1)),
        lambda layer, x: layer(F.pad(torch.cat([x, x], 1), (1, 1, 1, 1))),
        lambda layer, x: layer(F.max_pool2d(torch.cat([x, x], 1), 2)),
        lambda layer, x: layer(torch.cat([torch.cat([x], 1), x], 1)),
        lambda layer, x: layer(torch.cat([x, x], 3)[:, :, :, 2:].repeat(1, 2, 1, 1)),
    ):
        compare(Through(forward, nn.Conv2d(8, 5, 3)), x)
    for forward in (
        lambda layer, x: layer(torch.cat([x, x], 1)),  # rank 4: not the layer's inputs
        lambda layer, x: layer(torch.cat([x[:, 0], x[:, 1]], 1)),
        lambda layer, x: layer(torch.cat([x[0, 0, 0, :2], x[0, 0, 0, :4]])),
    ):
        compare(Through(forward, linear), x)


def test_a_concatenation_of_one_map():
    for channels in (3, 16):
        module = Through(lambda layer, x: layer(torch.cat([x], 1)), conv(channels, 8))
        compare(module, torch.randn(2, channels, 8, 8))


def test_a_concatenation_with_numbers_of_another_type(x):
    def forward(layer, x):
        return layer(torch.cat([x, torch.ones(2, 16, 7, 6, dtype=torch.int64)], 1))

    compare(Through(forward, conv(32)), x)


def test_a_concatenation_with_nothing():
    def forward(layer, x):
        return layer(torch.cat([x[..., :0], x, x[..., 5:]], -1))

    compare(Through(forward, nn.Linear(5, 4)), torch.randn(2, 7, 5))
