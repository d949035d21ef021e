"""The feature mappings of the baselines."""

import torch
from small_networks import build, images

from pahm.hand.topology import HandTopology
from pahm.model.baselines.mappings import GlobalMLP, GlobalRepeat, NoSkip

MAPS = [torch.randn(2, 5, 3, 3), torch.randn(2, 4, 6, 6)]
MEAN = MAPS[0].mean(dim=(2, 3))
VERTICES, CAMERA = torch.zeros(2, 7, 3), torch.zeros(2, 3)


def test_the_global_feature_is_repeated_for_each_vertex():
    assert torch.equal(GlobalRepeat(5)(MAPS, VERTICES, CAMERA), MEAN[:, None].repeat(1, 7, 1))


def test_the_mlp_gives_each_vertex_its_group_of_outputs():
    mlp = GlobalMLP(5, 7, 4)
    out = mlp(MAPS, VERTICES, CAMERA)
    assert out.shape == (2, 7, 4) and mlp.channels == 4
    assert torch.allclose(out[:, 3], mlp.layers(MEAN)[:, 12:16])


def test_a_level_without_a_skip_connection_has_no_image_features():
    assert NoSkip()(MAPS, VERTICES, CAMERA).shape == (2, 7, 0) and NoSkip().channels == 0
    network = build(HandTopology.load(), "skips-m4").eval()
    own = [level.merge.in_features for level in network.decoder.levels]
    # Features of the level before and coordinates; M4 also has the 128 channels of Q_32.
    assert own == [128 + 96 + 3, 96 + 3, 64 + 3, 48 + 3]
    assert network(images()).meshes[-1].isfinite().all()
