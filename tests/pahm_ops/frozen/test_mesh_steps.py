"""Steps on vertices and features of a frozen module."""

import math

import pytest
import torch
from frozen_modules import Through, compare, units
from torch import nn
from torch.nn import functional as F

from pahm_ops import MeshTransform, SpiralTable, mesh_pool, spiral_conv, vertex_sample

VERTICES = 23


@pytest.mark.parametrize("channels", [1, 3, 8, 16, 17, 37, 64])
def test_layer_norms(channels, isa):
    for shape in ((2, 7, channels), (5, channels)):
        module, x = Through(lambda norm, x: norm(x), nn.LayerNorm(channels, 1e-3)), 3 + torch.randn(shape)
        assert units(module, x) == ["norm"]
        compare(module, x)
    for norm in (
        nn.LayerNorm((7, channels)),
        nn.LayerNorm(channels, elementwise_affine=False),
        nn.LayerNorm(channels, bias=False),
    ):
        compare(Through(lambda norm, x: norm(x), norm), torch.randn(2, 7, channels))


@pytest.mark.parametrize("inputs", [1, 3, 17, 64])
@pytest.mark.parametrize("outputs", [1, 3, 8, 16, 17, 33, 70])
def test_linear_layers(inputs, outputs, isa):
    for shape, bias in (((1,), True), ((5,), False), ((2, 29), True)):
        module = Through(lambda layer, x: F.gelu(layer(x)), nn.Linear(inputs, outputs, bias))
        x = torch.randn(*shape, inputs)
        assert units(module, x) == ["product"]
        compare(module, x)


def test_linear_layers_on_other_ranks_run_in_pytorch():
    for shape in ((7,), (2, 3, 4, 7), (1, 2, 1, 3, 7)):
        compare(Through(lambda layer, x: layer(x), nn.Linear(7, 5)), torch.randn(shape))


def test_a_vertex_network_of_norms_sums_and_linear_layers(isa):
    def block(norm, up, down, x):
        return x + down(F.gelu(up(norm(x))))

    module = Through(block, nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24))
    x = torch.randn(3, VERTICES, 24)
    assert units(module, x) == ["norm", "product", "product"]
    compare(module, x)


class Attention(nn.Module):
    """As `pahm.model.network.SelfAttention` and timm's vision transformers have it."""

    def __init__(self, heads, each, scale=None, dtype=torch.float32):
        super().__init__()
        width = heads * each
        self.heads, self.scale, self.dtype = heads, scale, dtype
        self.packed, self.project = nn.Linear(width, 3 * width).to(dtype), nn.Linear(width, width).to(dtype)
        self.eval()

    def forward(self, x):
        batch, vertices, width = x.shape
        packed = self.packed(x.to(self.packed.weight.dtype))
        packed = packed.reshape(batch, vertices, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.project(out.transpose(1, 2).reshape(batch, vertices, width))


@pytest.mark.parametrize("each", [5, 16, 24, 40])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_attention(each, scale, isa):
    for batch, vertices, heads in ((1, 1, 1), (2, 23, 3), (1, 98, 2), (3, 33, 1)):
        module, x = Attention(heads, each, scale), 3 * torch.randn(batch, vertices, heads * each)
        assert units(module, x) == ["product", "attention", "product"]
        compare(module, x, tolerance=2e-5)


def test_attention_with_large_scores(isa):
    compare(Attention(2, 16, 30.0), 10 * torch.randn(1, 21, 32), tolerance=2e-4)


def test_attention_in_float64_runs_in_pytorch():
    module, x = Attention(2, 8, dtype=torch.float64), torch.randn(2, 9, 16)
    assert "attention" not in units(module, x)
    compare(module, x)


def test_attention_of_other_forms_runs_in_pytorch():
    def forward(layer, x):
        packed = layer(x).reshape(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k, v = packed.unbind(0)
        attend = F.scaled_dot_product_attention
        mask = torch.ones(9, 9, dtype=torch.bool).tril()
        return attend(q, k, v, is_causal=True), attend(k, q, v), attend(q, k, v, attn_mask=mask), packed

    compare(Through(forward, nn.Linear(16, 48)), torch.randn(2, 9, 16))


def test_scores_of_queries_that_something_else_reads():
    def forward(layer, x):
        q, k, v = layer(x).reshape(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 16), q

    compare(Through(forward, nn.Linear(16, 48)), torch.randn(2, 9, 16))


@pytest.mark.parametrize("activation", [None, "relu", "elu", "gelu"])
@pytest.mark.parametrize("channels, outputs", [(3, 3), (16, 32), (17, 9)])
def test_spiral_convolutions(channels, outputs, activation, isa):
    for rows, length, bias in ((VERTICES, 9, True), (11, 4, False), (40, 1, True)):
        table = SpiralTable.prepare(torch.randint(VERTICES, (rows, length)), VERTICES)
        weight = 0.2 * torch.randn(outputs, length * channels)
        offset = torch.randn(outputs) if bias else None

        class Spiral(nn.Module):
            def __init__(self, table=table, weight=weight, offset=offset):
                super().__init__()
                self.table = table
                self.register_buffer("weight", weight)
                self.register_buffer("offset", offset)

            def forward(self, x):
                return spiral_conv(x, self.table, self.weight, self.offset, activation=activation)

        x = torch.randn(2, VERTICES, channels)
        assert units(Spiral().eval(), x) == ["product"]
        compare(Spiral().eval(), x)


def test_what_follows_a_spiral_convolution():
    table = SpiralTable.prepare(torch.randint(VERTICES, (VERTICES, 5)), VERTICES)
    weight = 0.2 * torch.randn(8, 40)

    def forward(norm, batch_norm, x):
        def conv(x, activation=None):
            return spiral_conv(x, table, weight.to(x.dtype), activation=activation)

        return (
            x + conv(norm(x), "elu"),
            F.relu(conv(x) + x),
            F.relu(conv(x, "elu")),
            batch_norm(conv(x)),
            conv(torch.cat([x[..., :3], x[..., 3:]], -1)),
        )

    compare(Through(forward, nn.LayerNorm(8), nn.BatchNorm1d(VERTICES)), torch.randn(2, VERTICES, 8))


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 64])
def test_mesh_pools(channels, isa):
    matrix = torch.randn(40, VERTICES) * (torch.rand(40, VERTICES) < 0.1)
    matrix[3] = 0
    transform = MeshTransform.prepare(matrix.to_sparse())
    module, x = Through(lambda x: mesh_pool(x, transform)), torch.randn(3, VERTICES, channels)
    assert units(module, x) == ["sparse_product"]
    compare(module, x)


def maps(batch, *widths):
    return [torch.randn(batch, width, 3 + 2 * i, 9 - 2 * i) for i, width in enumerate(widths)]


@pytest.mark.parametrize("mode", ["zeros", "border"])
@pytest.mark.parametrize("align", [False, True])
def test_samples(mode, align, isa):
    def forward(*inputs):
        *features, vertices, camera = inputs
        options = {"align_corners": align, "padding_mode": mode}
        return (
            vertex_sample(features, vertices, camera, **options),
            vertex_sample(features[0], vertices[..., :2], **options),
        )

    for batch, vertices, widths in ((1, 1, (1,)), (3, 23, (16, 17, 3)), (2, 70, (64, 8))):
        camera = torch.randn(batch, 3)
        inputs = (*maps(batch, *widths), torch.randn(batch, vertices, 3), camera)
        assert units(Through(forward), *inputs).count("sample") == 2
        compare(Through(forward), *inputs, tolerance=2e-5)


@pytest.mark.parametrize("mode", ["zeros", "border"])
def test_vertices_that_are_not_finite_have_no_features(mode, isa):
    def forward(features, vertices, camera):
        return vertex_sample([features], vertices, camera, padding_mode=mode)

    vertices, camera = torch.rand(3, 6, 3) - 0.5, torch.tensor([[0.5, 0, 0], [1, 0, 0], [math.nan, 0, 0]])
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        vertices[0, i, i] = value
    vertices[1, 0, 0] = 3e38
    vertices[1, 1, 1] = 1e12
    inputs = (torch.randn(3, 5, 7, 6), vertices, camera)
    compare(Through(forward), *inputs, tolerance=2e-5)


def test_samples_with_other_cameras_run_in_pytorch():
    K = torch.tensor([[[20.0, 0, 16], [0, 20, 12], [0, 0, 1]]])

    def forward(features, vertices):
        perspective = vertex_sample([features], vertices, K.to(vertices.dtype), image_size=(24, 32))
        return perspective, vertex_sample([features], vertices, torch.ones(1, 3, dtype=vertices.dtype))

    vertices = torch.rand(1, 6, 3) + torch.tensor([0, 0, 2.0])
    compare(Through(forward), torch.randn(1, 5, 7, 6), vertices, tolerance=2e-5)


@pytest.mark.parametrize("channels", [1, 8, 21])
def test_soft_argmax_of_a_map(channels, isa):
    places = torch.randn(2, 30)

    def forward(x):
        return (x.flatten(2).softmax(-1)[:, :, None] * places.to(x.dtype)).sum(-1)

    x = 9 * torch.randn(3, channels, 6, 5)
    assert units(Through(forward), x) == ["soft_argmax"]
    compare(Through(forward), x)


def test_a_softmax_that_something_else_reads_stays_in_pytorch():
    places = torch.randn(2, 30)

    def forward(x):
        mass = x.flatten(2).softmax(-1)
        return (mass[:, :, None] * places.to(x.dtype)).sum(-1), mass

    assert "soft_argmax" not in units(Through(forward), torch.randn(1, 4, 6, 5))
    compare(Through(forward), torch.randn(1, 4, 6, 5))


def test_means_of_maps(isa):
    module = Through(lambda conv, x: conv(x).mean(dim=(2, 3)), nn.Conv2d(3, 13, 3))
    assert units(module, torch.randn(2, 3, 9, 7))[-1] == "sparse_product"
    compare(module, torch.randn(2, 3, 9, 7))
    compare(Through(lambda x: (x.mean(dim=1), x.mean(dim=(2, 3), keepdim=True))), torch.randn(2, 3, 4, 5))
