"""Refinements of the full mesh."""

import torch
from small_networks import build, images

from pahm.hand.topology import HandTopology


def test_refinements_start_from_the_mesh_of_a_decoder_that_sees_the_image_at_m4_only():
    topology = HandTopology.load()
    rough, refined = build(topology, "skips-m4").eval(), build(topology, "refine-three-times").eval()
    missing = refined.load_state_dict(rough.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("decoder.refine.") for name in missing)
    with torch.no_grad():
        a, b = rough(images()), refined(images())
    for x, y in zip(a.meshes, b.meshes, strict=False):
        assert torch.equal(x, y)
    steps = [(y - x).abs().max().item() for x, y in zip(b.meshes[3:], b.meshes[4:], strict=False)]
    assert len(steps) == 3 and min(steps) > 1e-6
