"""The networks, frozen: the same meshes."""

import pytest
import torch
from small_networks import build, images
from torch.utils._pytree import tree_leaves

from pahm.ablation.tables import VARIANTS
from pahm.config import preset
from pahm.hand.topology import HandTopology
from pahm.model import build_network, load_checkpoint
from pahm_ops import backends
from pahm_ops.frozen import freeze

pytestmark = pytest.mark.skipif(
    backends()["spiral_conv"]["cpu"] == "reference", reason="no compiled kernels here"
)
METRES = 1e-5


@pytest.fixture(scope="module")
def topology():
    return HandTopology.load()


def assert_same(network, pictures):
    frozen = freeze(network)
    for given in (pictures, pictures.flip(-1)):
        with torch.no_grad():
            expected = network(given)
        found = frozen(given)
        assert type(found) is type(expected)
        for ours, theirs in zip(found.meshes, expected.meshes, strict=True):
            assert float((ours - theirs).abs().max()) < METRES
        for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["repeat", "aligned-attention", "refine-once", "metro-aligned", "gcn-stacked"]
)
def test_small_networks_of_the_tables(name, topology):
    assert_same(build(topology, name).eval(), images())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_all_networks_of_the_tables(name, topology):
    assert_same(build(topology, name).eval(), images())


def test_the_shipped_network(isa):
    network = load_checkpoint().eval()
    size = preset("tiny").model.image_size
    for count in (1, 3):
        assert_same(network, torch.randn(count, 3, size, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "table4_gcn", "table4_metro", "hrnet_w64"])
def test_presets(name, topology):
    config = preset(name).override({"model.pretrained": False})
    size = config.model.image_size
    network = build_network(config, topology).eval()
    assert_same(network, torch.randn(1, 3, size, size))
