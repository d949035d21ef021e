"""The paper's network: shapes, alignment of features and vertices, gradients."""

import dataclasses

import numpy as np
import pytest
import torch

from pahm.config import ModelConfig, preset
from pahm.hand.topology import HandTopology
from pahm.model import HandNet
from pahm.model.backbone import create_backbone
from pahm.model.network import Extractor, Fusion, MeshConv, PixelAligned, SelfAttention, expected_position

SIZES = (98, 195, 389, 778)
TINY = preset("tiny").override({"model.pretrained": False})


@pytest.fixture(scope="module")
def topology():
    return HandTopology.load()


@pytest.fixture
def network(topology):
    torch.manual_seed(0)
    return HandNet(TINY.model, topology).eval()


def images(count, size=TINY.model.image_size):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_prediction_has_the_papers_four_meshes(network):
    with torch.no_grad():
        prediction = network(images(2))
    assert [tuple(mesh.shape) for mesh in prediction.meshes] == [(2, n, 3) for n in SIZES]
    assert prediction.camera.shape == (2, 3) and (prediction.camera[:, 0] > 0).all()
    (cues,) = prediction.cues
    assert cues.pose_logits.shape == (2, 21, 24, 24)
    assert cues.silhouette_logits.shape == (2, 1, 24, 24)
    assert network.faces.shape == (1538, 3)
    assert network.joints(prediction.meshes[-1]).shape == (2, 21, 3)


def test_an_untrained_network_predicts_a_hand_of_the_right_size(network, topology):
    with torch.no_grad():
        finest = network(images(1)).meshes[-1][0]
    template = topology.hierarchy.vertices[0]
    root = topology.joint_regressor[TINY.model.root_joint] @ template
    assert np.abs(finest.numpy() - (template - root)).mean() < 0.02


def test_every_parameter_gets_a_gradient(topology):
    network = HandNet(TINY.model, topology)
    with torch.no_grad():  # some backbones start residual branches at zero, and their gradients with them
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    prediction = network(images(2))
    loss = sum(mesh.square().sum() for mesh in prediction.meshes) + prediction.camera.square().sum()
    (loss + sum(logits.square().sum() for logits in prediction.cues[0])).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_images_are_reconstructed_apart_from_each_other(network):
    batch = images(3)
    with torch.no_grad():
        together, alone = network(batch).meshes[-1], network(batch[1:2]).meshes[-1]
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[:1], alone, atol=1e-4)


def test_mapping_reads_the_pixel_under_the_vertex():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    # Centre of pixel (x=2, y=1) in normalised coordinates, and a vertex far outside, clamped to the corner.
    points = torch.tensor([[[0.25, -0.25, 9.0], [99.0, 99.0, 0.0]]])
    camera = torch.tensor([[2.0, 0.0, 0.0]])
    others = torch.full((1, 1, 2, 2), 99.0)
    sampled = PixelAligned([1], 1)([others, features, others], points / 2, camera)
    assert sampled[0, :, 0].tolist() == [6.0, 15.0]
    both = PixelAligned([1, 2], 2)([others, features, others], points / 2, camera)
    assert both[0].tolist() == [[6.0, 99.0], [15.0, 99.0]]


def test_attention_and_spirals_move_information_between_vertices():
    spirals = torch.arange(6)[:, None].repeat(1, 3)  # each vertex sees only itself
    x = torch.randn(1, 6, 8, requires_grad=True)
    local = MeshConv(8, spirals, heads=0)(x)[0, 0].sum()
    (gradient,) = torch.autograd.grad(local, x)
    assert (gradient[0, 1:] == 0).all() and (gradient[0, 0] != 0).any()
    mixed = MeshConv(8, spirals, heads=2)(x)[0, 0].sum()
    (gradient,) = torch.autograd.grad(mixed, x)
    assert (gradient[0, 1:] != 0).any()


def test_self_attention_is_pytorchs_own_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 7, 12)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-6)
    with pytest.raises(ValueError, match="12 channels cannot be split over 5 heads"):
        SelfAttention(12, 5)


def test_fusion_is_a_pointwise_function_of_both_maps():
    fusion = Fusion(2, 3, 4).eval()
    a, b = torch.randn(1, 2, 5, 5), torch.randn(1, 3, 5, 5)
    before = fusion(a, b)
    for changed in [(a + torch.eye(5), b), (a, b + torch.eye(5))]:
        difference = (fusion(*changed) - before).abs().sum(1)[0]
        assert (difference[~torch.eye(5, dtype=torch.bool)] == 0).all() and difference.trace() > 0


def test_paper_scale_hourglass_has_the_papers_maps():
    with torch.device("meta"):
        channels = ModelConfig().feature_channels
        extractor = Extractor(create_backbone("resnet18"), [64, 128, 256, 512], channels)
        maps, joints_2d, ((pose, silhouette),) = extractor(torch.empty(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 7, 7), (256, 14, 14), (128, 28, 28), (64, 56, 56)]
    assert joints_2d.shape == (1, 21, 2)
    assert pose.shape == (1, 21, 56, 56) and silhouette.shape == (1, 1, 56, 56)


def test_images_of_another_size_are_refused(network):
    with pytest.raises(ValueError, match=r"expected \(B, 3, 96, 96\), got \(1, 3, 224, 224\)"):
        network(images(1, 224))


def test_the_network_compiles_to_one_graph(topology):
    config = dataclasses.replace(TINY.model, backbone="test_resnet", image_size=64)
    network = HandNet(config, topology).eval()
    x = images(1, 64)
    with torch.no_grad():
        eager = network(x)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(eager.meshes[-1], compiled.meshes[-1], atol=1e-5)


def test_joints_keep_their_place_under_autocast() -> None:
    logits = 5 * torch.randn(2, 21, 24, 24)
    expected = expected_position(logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expected_position(logits), expected)
