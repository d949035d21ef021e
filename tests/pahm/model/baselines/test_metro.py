"""METRO's transformer, as published and with the pixel-aligned mapping."""

import pytest
import torch
from small_networks import build, images, variant_config

from pahm.hand.topology import HandTopology
from pahm.model import build_network
from pahm.model.baselines.metro import EncoderBlock, hide_queries


@pytest.fixture(scope="module")
def topology():
    return HandTopology.load()


def test_metro_predicts_as_published(topology):
    decoder = build(topology, "metro").decoder
    up = (topology.hierarchy.up[0] @ topology.hierarchy.up[1]).toarray()
    fresh = build_network(variant_config("metro"), topology).decoder.upsample
    assert torch.allclose(fresh.weight, torch.as_tensor(up, dtype=torch.float32))
    assert [block.embed.out_features for block in decoder.blocks] == [32, 16, 8]
    assert [block.reduce.out_features for block in decoder.blocks] == [16, 8, 3]
    assert decoder.template.shape == (21 + 195, 3)
    # The joints of the template are those that the regressor finds on the finest mesh, up to its coarsening.
    fine = topology.hierarchy.vertices[0]
    root = topology.joint_regressor[9] @ fine
    joints = torch.as_tensor((topology.joint_regressor @ fine - root) / 0.2, dtype=torch.float32)
    assert (decoder.template[:21] - joints).abs().max() < 0.02


def test_its_camera_places_the_result_and_moves_no_vertex(topology):
    network = build(topology, "metro").eval()
    with torch.no_grad():
        before = network(images())
        network.decoder.lift[-1].bias += 0.5
        after = network(images())
    assert torch.equal(before.meshes[-1], after.meshes[-1])
    assert (before.camera - after.camera).abs().min() > 1e-3


def test_masked_vertex_modelling_hides_up_to_about_three_in_ten_queries_and_only_in_training(topology):
    queries = torch.randn(400, 216, 4)
    hidden = (hide_queries(queries, training=True) == 0.01).all(-1).float().mean(1)
    assert hidden.max() < 0.45 and 0.12 < hidden.mean() < 0.18 and hidden.min() < 0.02
    assert torch.equal(hide_queries(queries, training=False), queries)
    for variant in ("metro", "metro-aligned"):
        # Dropout would move the meshes in training, too.
        network = build(topology, variant).eval()
        with torch.no_grad():
            shown = network(images()).meshes[-1]
            network.decoder.training = True
            assert not torch.equal(network(images()).meshes[-1], shown)


def test_encoder_block_tells_queries_apart_and_joins_them():
    block = EncoderBlock(6, 8, 4, queries=5, layers=1, heads=2).eval()
    x = torch.randn(1, 1, 6).repeat(1, 5, 1).requires_grad_()
    out = block(x)
    assert out.shape == (1, 5, 4) and not torch.allclose(out[0, 0], out[0, 1])
    (gradient,) = torch.autograd.grad(out[0, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()
    one, two = EncoderBlock(6, 8, 4, queries=5, layers=2, heads=2).encoder.layers
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert first.dim() == 1 or not torch.equal(first, second), name
    with pytest.raises(ValueError, match="8 channels cannot be split over 3 heads"):
        EncoderBlock(6, 8, 4, 5, 1, 3)
