"""The layers that replace PyTorch's while a CPU trains."""

import copy

import pytest
import torch
from small_run import CONFIG
from timm.layers import BatchNormAct2d
from torch import nn

from pahm.model.build import build_network
from pahm.train.layers import use_training_layers
from pahm_ops import _library


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    values = {"model.backbone": "tf_efficientnet_lite0", "model.image_size": 64}
    plain = build_network(CONFIG.override(values)).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    use_training_layers(ours)
    return plain, ours


def test_names_and_values_of_the_state_stay(networks):
    plain, ours = networks
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in ours.named_parameters()]


def test_every_layer_that_can_be_is_replaced(networks):
    kinds = (nn.BatchNorm2d, BatchNormAct2d)
    assert not [name for name, module in networks[1].named_modules() if type(module) in kinds]
    left = [m for m in networks[1].modules() if isinstance(m, nn.Conv2d) and type(m) is nn.Conv2d]
    assert all(conv.kernel_size != (1, 1) and conv.groups == 1 for conv in left)


@pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled")
def test_a_step_agrees_with_pytorchs_layers_in_float64(networks):
    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(4, channels, 64 // s, 64 // s) for channels, s in _maps(networks[0])]
    plain, ours = (copy.deepcopy(network).train() for network in networks)
    exact = copy.deepcopy(plain).double()
    errors, found = [], []
    for network in (exact, plain, ours):
        dtype = next(network.parameters()).dtype
        maps = network.extractor.pyramid(images.to(dtype))
        sum((m * w.to(dtype)).sum() for m, w in zip(maps, weights, strict=True)).backward()
        grads = [p.grad.double() for p in network.extractor.parameters() if p.grad is not None]
        running = [b.double() for n, b in network.extractor.named_buffers() if "running" in n]
        found.append([*(m.detach().double() for m in maps), *grads, *running])
    for values in found[1:]:
        distances = [(a - b).norm() / (b.norm() + 1e-9) for a, b in zip(values, found[0], strict=True)]
        errors.append(torch.stack(distances).median().item())
    assert errors[1] < 2 * errors[0] + 1e-6
    counters = [b for n, b in ours.named_buffers() if n.endswith("num_batches_tracked")]
    assert 1 in map(int, counters)


def _maps(network):
    return list(zip(network.config.feature_channels, (32, 16, 8, 4), strict=True))


def test_an_evaluation_has_the_same_bits(networks):
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    plain, ours = (copy.deepcopy(network).eval() for network in networks)
    with torch.no_grad():
        assert torch.equal(plain(images).meshes[-1], ours(images).meshes[-1])


def test_other_memory_formats_and_types_take_pytorchs_way(networks):
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain, ours = (copy.deepcopy(network).double().train() for network in networks)
    a, b = (network.extractor.pyramid(images)[-1] for network in (plain, ours))
    assert torch.equal(a, b)
