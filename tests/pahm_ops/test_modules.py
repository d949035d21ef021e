"""Modules that other people's tools hold: pruning, LoRA, ensembles, the meta device, counts of operations."""

import copy
import pickle
import sys

import pytest
import torch
import trimesh
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from pahm.config import preset
from pahm.infer.predictor import Predictor
from pahm.model import build_network, load_checkpoint
from pahm_ops import MeshPool, SpiralConv, mesh_pool, spiral_conv, vertex_sample
from pahm_ops.mesh import MeshHierarchy, spiral_indices

MESH = trimesh.creation.icosphere(1)
TABLE = torch.from_numpy(spiral_indices(MESH.faces, 7))
LEVELS = MeshHierarchy.build(MESH.vertices, MESH.faces, sizes=(42, 20))


def gathered(conv: SpiralConv, x: torch.Tensor) -> torch.Tensor:
    """SpiralNet++'s SpiralConv."""
    out = conv.layer(x[:, conv.indices.reshape(-1)].reshape(len(x), len(TABLE), -1))
    return out if conv.activation is None else nn.functional.elu(out)


class Adapted(nn.Module):
    """As LoRA puts it in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low, self.high = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.high(self.low(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(make):
    def change(conv):
        conv.layer = make(conv.layer)

    return change


def patched(conv):
    forward = conv.layer.forward
    conv.layer.forward = lambda x: 3 * forward(x)


CHANGES = {
    "nothing": lambda conv: None,
    "pruning": lambda conv: prune.l1_unstructured(conv.layer, "weight", 0.5),
    "weight norm": lambda conv: nn.utils.weight_norm(conv.layer),
    "spectral norm": lambda conv: nn.utils.spectral_norm(conv.layer),
    "parametrised weight norm": lambda conv: parametrizations.weight_norm(conv.layer),
    "parametrised spectral norm": lambda conv: parametrizations.spectral_norm(conv.layer),
    "LoRA": replaced(Adapted),
    "subclass": replaced(lambda layer: Doubled(layer.in_features, layer.out_features)),
    "forward of its own": patched,
    "forward hook": lambda conv: conv.layer.register_forward_hook(lambda m, a, out: 2 * out),
    "forward pre-hook": lambda conv: conv.layer.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
    "backward hook": lambda conv: conv.layer.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
}


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("activation", [None, "elu"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_is_done_to_the_layer_counts(change, activation):
    ours = SpiralConv(4, 4, TABLE, activation=activation)
    theirs = copy.deepcopy(ours)
    x = torch.randn(2, 42, 4, requires_grad=True)
    results = []
    for conv, forward in ((ours, SpiralConv.forward), (theirs, gathered)):
        torch.manual_seed(1)
        change(conv)
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = forward(conv, x).square().mean()
            (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
            optimizer.step()
        results.append((forward(conv, x), grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_plain_layer_is_fused_and_others_are_called(monkeypatch):
    fused = []
    module = sys.modules["pahm_ops.spiral_conv"]
    monkeypatch.setattr(module, "spiral_conv", lambda *a: fused.append(1) or spiral_conv(*a))
    conv = SpiralConv(4, 4, TABLE)
    x = torch.randn(42, 4)
    plain = conv(x)
    assert fused == [1]
    handle = conv.layer.register_forward_hook(lambda m, a, out: None)
    torch.testing.assert_close(conv(x), plain, atol=1e-5, rtol=1e-5)
    assert fused == [1]
    handle.remove()
    conv(x)
    prune.l1_unstructured(conv.layer, "weight", 0.5)
    conv(x)
    assert fused == [1, 1]
    prune.remove(conv.layer, "weight")
    conv(x)
    assert fused == [1, 1, 1]
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(conv), {nn.Linear})
    torch.testing.assert_close(quantised(x), conv(x), atol=0.1, rtol=0.1)
    assert fused == [1, 1, 1, 1]


def network() -> nn.Sequential:
    return nn.Sequential(SpiralConv(4, 4, TABLE), nn.ELU(), MeshPool(LEVELS.down[0]))


def test_an_ensemble_is_vmapped_over_a_copy_on_the_meta_device():
    networks = [network() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(networks)
    base = copy.deepcopy(networks[0]).to("meta")
    x = torch.randn(2, 42, 4)

    def call(parameters, buffers):
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    expected = torch.stack([net(x) for net in networks])
    torch.testing.assert_close(torch.vmap(call)(parameters, buffers), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["built there", "moved there", "emptied"])
def test_constants_come_back_after_to_empty(how):
    source = network()
    with torch.device("meta" if how == "built there" else "cpu"):
        net = network()
    if how == "moved there":
        net.to("meta")
        assert all(buffer.is_meta for buffer in net.buffers())
    net.to_empty(device="cpu")
    net.load_state_dict(source.state_dict())
    x = torch.randn(2, 42, 4)
    assert torch.equal(net(x), source(x))
    assert set(net.state_dict()) == {"0.layer.weight", "0.layer.bias"}


def test_a_table_that_never_had_values_is_refused():
    conv = SpiralConv(4, 4, TABLE.to("meta"))
    conv.to_empty(device="cpu")
    with pytest.raises(ValueError, match="indices must be on x's device cpu, got meta"):
        conv(torch.randn(42, 4))


def test_the_networks_constants_come_back_too():
    source = load_checkpoint()
    net = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    net.load_state_dict(source.state_dict())
    for (name, a), (_, b) in zip(net.named_buffers(), source.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_pools_are_cast_copied_and_pickled_with_their_tensors():
    pool = MeshPool(LEVELS.up[0])
    x = torch.randn(20, 3, dtype=torch.float64)
    expected = pool(x)
    for other in (
        copy.deepcopy(pool).half(),
        pickle.loads(pickle.dumps(pool)),
        pool._replicate_for_data_parallel(),
    ):
        assert torch.equal(other(x), expected)
        assert other.transform.forward[2].dtype == torch.float64
    changed = pool.to("meta").to("meta").to_empty(device="cpu")
    assert torch.equal(changed(x), expected) and changed is pool


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors_of_inference_mode_and_with_other_data(layout):
    dense = torch.rand(4, 3)
    sparse = {"coo": torch.Tensor.to_sparse_coo, "csr": torch.Tensor.to_sparse_csr}[layout]
    x = torch.randn(1, 3, 2)
    with torch.inference_mode():
        torch.testing.assert_close(mesh_pool(x, sparse(dense)), dense @ x)
        matrix = sparse(dense)
    torch.testing.assert_close(mesh_pool(x, matrix), dense @ x)
    matrix = sparse(dense)
    mesh_pool(x, matrix)
    for other in (2 * dense, torch.rand(4, 3)):
        matrix.data = sparse(other)
        torch.testing.assert_close(mesh_pool(x, matrix), matrix.to_dense() @ x)  # CSR ignores .data


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_checkpoints_are_float32_on_the_cpu_whatever_the_defaults(default):
    expected = load_checkpoint().state_dict()
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        found = load_checkpoint()
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert {b.device.type for b in found.buffers()} == {"cpu"}


@pytest.mark.parametrize(("dtype", "millimetres"), [("float64", 1e-3), ("float16", 1), ("bfloat16", 10)])
def test_predictors_feed_a_network_in_its_own_dtype(dtype, millimetres):
    picture = (torch.rand(96, 96, 3) * 255).byte().numpy()
    expected = Predictor(load_checkpoint(), "cpu").predict(picture).relative_meshes[-1]
    other = Predictor(load_checkpoint().to(getattr(torch, dtype)), "cpu").predict(picture).relative_meshes[-1]
    assert abs(other - expected).max() * 1e3 < millimetres


@pytest.mark.parametrize("decoder", ["gcn", "metro"])
def test_networks_of_every_dtype_run(decoder):
    changes = {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": 64}
    changes |= {"model.decoder": decoder, "model.transformer_channels": [32, 32, 32]}
    config = preset("tiny").override(changes)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        net = build_network(config).eval().to(dtype)
        with torch.no_grad():
            assert net(torch.randn(1, 3, 64, 64, dtype=dtype)).meshes[-1].isfinite().all()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert build_network(config).eval()(torch.randn(1, 3, 64, 64)).meshes[-1].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_operations_are_counted_as_those_of_the_products():
    def count(function, *arguments):
        with FlopCounterMode(display=False) as counter:
            function(*arguments).sum().backward()
        return counter.get_total_flops()

    conv = SpiralConv(4, 5, TABLE)
    x = torch.randn(2, 42, 4, requires_grad=True)
    assert count(conv, x) == count(lambda x: gathered(conv, x), x) == 3 * 2 * 2 * 42 * 28 * 5
    pool = MeshPool(LEVELS.up[0])
    entries = pool.transform.forward[1].numel()
    assert count(pool, torch.randn(2, 20, 4, requires_grad=True)) == 2 * 2 * 2 * entries * 4
    maps = [torch.randn(2, c, 8, 8, requires_grad=c == 3) for c in (3, 5)]
    points = torch.zeros(2, 7, 2)
    assert count(vertex_sample, maps, points) == 8 * 2 * 7 * (8 + 3)
    assert count(vertex_sample, maps, points.requires_grad_()) == 8 * 2 * 7 * (8 + 3 + 8)
