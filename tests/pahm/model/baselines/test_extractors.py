"""Stacked hourglasses."""

import torch
from small_networks import build, images

from pahm.hand.topology import HandTopology
from pahm.model.network import expected_position


def test_the_second_hourglass_reads_the_cues_of_the_first():
    network = build(HandTopology.load(), "gcn-stacked").eval()
    with torch.no_grad():
        maps, joints_2d, (first, second) = network.extractor(images())
        assert [tuple(m.shape[1:]) for m in maps] == [(128, 2, 2), (96, 4, 4), (64, 8, 8), (48, 16, 16)]
        assert not torch.allclose(first.pose_logits, second.pose_logits)
        assert torch.equal(joints_2d, expected_position(second.pose_logits))
        for head in (network.extractor.pose_head, network.extractor.silhouette_head):
            before = network.extractor(images()).cues[1].pose_logits
            head[-1].bias.add_(2.0)
            assert not torch.allclose(network.extractor(images()).cues[1].pose_logits, before)
