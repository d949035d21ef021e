"""Steps on maps of a frozen module: convolutions, normalisations, activations, pools and upsampling."""

import pytest
import torch
from frozen_modules import Through, compare, units
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "hardtanh in place": lambda x: F.hardtanh(x, 0, 6, inplace=True),
    "silu in place": lambda x: F.silu(x, inplace=True),
}


def maps(batch, channels, height, width):
    return 2 * torch.randn(batch, channels, height, width)


@pytest.mark.parametrize("channels", [1, 3, 5, 8, 17, 64])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_convolutions_of_each_kernel_and_width(kernel, channels, isa):
    for stride, padding, batch in ((1, kernel // 2, 1), (2, kernel // 2, 2), (1, 0, 5), (2, (1, 0), 1)):
        if kernel == 1 and padding == (1, 0):
            padding = 0
        conv = nn.Conv2d(channels, 19, kernel, stride, padding, bias=batch != 2)
        module, x = Through(lambda conv, x: conv(x), conv), maps(batch, channels, 11, 9)
        assert set(units(module, x)) <= {"product", "pad"}
        compare(module, x)


@pytest.mark.parametrize("columns", [1, 8, 9, 16, 17, 31, 33, 64])
def test_convolutions_of_each_number_of_outputs(columns, isa):
    for rows in ((1, 1), (3, 5), (9, 7)):
        module = Through(
            lambda a, b, x: (a(x), b(x)), nn.Conv2d(16, columns, 1), nn.Conv2d(16, columns, 3, 1, 1)
        )
        compare(module, maps(2, 16, *rows))


@pytest.mark.parametrize("channels", [3, 16])
def test_dilated_and_oblong_convolutions(channels):
    for options in (
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": 3, "dilation": (1, 3)},
        {"kernel_size": (1, 5), "padding": (0, 2)},
        {"kernel_size": (5, 1), "stride": (2, 1)},
        {"kernel_size": (3, 2), "padding": (2, 1)},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (11, 13)},
    ):
        module, x = (
            Through(lambda conv, x: conv(x), nn.Conv2d(channels, 6, **options)),
            maps(2, channels, 11, 13),
        )
        assert set(units(module, x)) <= {"product", "pad"}
        compare(module, x)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("pads", [(0, 1, 0, 1), (1, 2), (2, 0, 1, 2), (1, 1, 1, 1)])
def test_padding_before_a_convolution_belongs_to_it(pads, channels):
    def forward(conv, x):
        return conv(F.pad(x, pads))

    for options in ({"stride": 2}, {"padding": 1}, {"groups": channels}, {"dilation": 2}):
        module, x = Through(forward, nn.Conv2d(channels, channels, 3, **options)), maps(2, channels, 10, 9)
        assert "aten.pad.default" not in units(module, x)
        compare(module, x)


def test_padding_that_no_kernel_reads_runs_in_pytorch():
    def forward(conv, x):
        return conv(F.pad(x, (2, 2, 2, 2)))

    x = maps(1, 4, 9, 9)
    for options in (
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": 3, "groups": 4, "dilation": 2},
        {"kernel_size": 2, "groups": 4},
    ):
        module = Through(forward, nn.Conv2d(4, 8 if options["groups"] == 2 else 4, **options))
        assert units(module, x)[0] == "aten.pad.default"
        compare(module, x)
    for mode, value in (("reflect", None), ("constant", 1.0)):
        module = Through(
            lambda conv, x, m=mode, v=value: conv(F.pad(x, (1, 1, 1, 1), m, v)), nn.Conv2d(4, 8, 3)
        )
        assert "aten.pad.default" in units(module, x)
        compare(module, x)
    module = Through(lambda conv, x: conv(F.pad(x, (-1, 1, 0, 0))), nn.Conv2d(4, 8, 3))
    compare(module, x)
    module = Through(lambda conv, x: (lambda y: (conv(y), y))(F.pad(x, (1, 1, 1, 1))), nn.Conv2d(4, 8, 3))
    compare(module, x)


@pytest.mark.parametrize("channels", [1, 3, 17, 64, 130])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_convolutions(kernel, channels, isa):
    for stride, padding, batch in (
        (1, kernel // 2, 1),
        (2, kernel // 2, 2),
        ((2, 1), 0, 1),
        (1, kernel - 1, 1),
    ):
        conv = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=batch == 1)
        module, x = Through(lambda conv, x: conv(x), conv), maps(batch, channels, 9, 11)
        assert channels == 1 or units(module, x) == ["depthwise"]
        compare(module, x)


def test_grouped_and_unbatched_convolutions_run_in_pytorch():
    module, x = Through(lambda conv, x: conv(x), nn.Conv2d(6, 12, 3, groups=3)), maps(2, 6, 7, 7)
    assert units(module, x) == ["aten.conv2d.default"]
    compare(module, x)
    module = Through(lambda conv, x: conv(x), nn.Conv2d(6, 12, 3, groups=6))
    assert units(module, x) == ["aten.conv2d.default"]
    compare(module, x)
    module = Through(lambda conv, x: conv(x), nn.Conv2d(6, 12, 3))
    assert units(module, x[0]) == ["aten.conv2d.default"]
    compare(module, x[0])


def test_a_convolution_by_a_weight_that_is_an_input():
    def forward(x, weight):
        return F.conv2d(torch.cat([x, x], 1), weight), F.conv2d(F.pad(x, (1, 1, 1, 1)), weight[:, :4])

    compare(Through(forward), maps(2, 4, 7, 6), torch.randn(5, 8, 3, 3))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 16])
def test_normalisations_fold_into_the_convolution_before_them(groups, affine):
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=affine)
    module = Through(
        lambda conv, norm, x: F.relu(norm(conv(x))), conv, nn.BatchNorm2d(16, 1e-3, affine=affine)
    )
    x = maps(2, 16, 6, 7)
    assert len(units(module, x)) == 1
    compare(module, x)


def test_normalisations_alone_and_where_they_cannot_fold():
    x = maps(2, 5, 6, 7)
    module = Through(lambda norm, x: F.silu(norm(x)), nn.BatchNorm2d(5))
    assert units(module, x) == ["depthwise"]
    compare(module, x)
    # The convolution is read by something else, or the activation comes first.
    both = Through(
        lambda conv, norm, x: (conv(x) + norm(conv(x)), norm(F.relu(conv(x)))),
        nn.Conv2d(5, 5, 3),
        nn.BatchNorm2d(5),
    )
    compare(both, x)
    twice = Through(
        lambda conv, a, b, x: b(a(conv(x))), nn.Conv2d(5, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    )
    compare(twice, x)


def test_normalisations_of_features_and_vertices_run_in_pytorch():
    for shape, norm in (((6, 5), nn.BatchNorm1d(7)), ((2, 6, 5), nn.BatchNorm1d(6))):
        module, x = (
            Through(lambda linear, norm, x: norm(linear(x)), nn.Linear(5, 7), norm),
            torch.randn(shape),
        )
        assert units(module, x) == ["product", "aten.batch_norm.default"]
        compare(module, x)
    compare(Through(lambda norm, x: norm(x), nn.BatchNorm1d(7)), torch.randn(3, 7))
    compare(Through(lambda norm, x: norm(x), nn.BatchNorm3d(2)), torch.randn(1, 2, 3, 4, 5))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_after_a_convolution_and_alone(name, isa):
    act = ACTIVATIONS[name]
    x = maps(2, 5, 6, 7)
    folded = Through(lambda conv, x: act(conv(x)), nn.Conv2d(5, 9, 3))
    assert set(units(folded, x)) <= {"product", "pad"}
    compare(folded, x)
    compare(Through(lambda conv, x: act(conv(x)), nn.Conv2d(5, 5, 3, groups=5)), x)
    compare(
        Through(lambda conv, x: (lambda y: (y.sigmoid(), act(y.clone() + y)))(conv(x)), nn.Conv2d(5, 9, 3)), x
    )
    compare(Through(lambda conv, pool, x: act(pool(conv(x))), nn.Conv2d(5, 9, 1), nn.MaxPool2d(2)), x)


def test_activations_of_other_limits_run_in_pytorch():
    def forward(conv, x):
        y = conv(x)
        return F.hardtanh(y), F.hardtanh(y, 0, 1), F.gelu(y, approximate="tanh"), F.leaky_relu(y), F.elu(y)

    compare(Through(forward, nn.Conv2d(5, 9, 3)), maps(2, 5, 6, 7))


@pytest.mark.parametrize("channels", [1, 3, 17, 64])
def test_max_pools(channels, isa):
    x = maps(2, channels, 9, 12)
    x[0, :, 4, 5] = torch.nan
    for options in ((2,), (3, 2, 1), (3, 1, 1), ((2, 3), (1, 2)), (5, 3, (2, 0))):
        module = Through(lambda pool, x: pool(x), nn.MaxPool2d(*options))
        assert units(module, x) == ["max_pool"]
        compare(module, x, tolerance=0)
    compare(Through(lambda pool, x: pool(x), nn.MaxPool2d(3, 2, ceil_mode=True)), x, tolerance=0)
    compare(Through(lambda pool, x: pool(x), nn.MaxPool2d(3, dilation=2)), x, tolerance=0)


@pytest.mark.parametrize("channels", [1, 3, 17, 64])
def test_upsampling(channels, isa):
    x = maps(2, channels, 5, 6)
    for size in ((10, 12), (5, 6), (7, 17), (3, 2), (1, 1)):
        module = Through(lambda x, size=size: F.interpolate(x, size, mode="bilinear"))
        assert units(module, x) == ["upsample"]
        compare(module, x)
    for options in ({"scale_factor": 2}, {"size": (9, 9), "align_corners": True}):
        compare(Through(lambda x, o=options: F.interpolate(x, mode="bilinear", **o)), x)
