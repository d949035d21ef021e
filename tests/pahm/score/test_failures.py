"""The reasons of failures, on meshes for which they are known."""

import math

import numpy as np
import pytest
import trimesh
from PIL import Image

from pahm.score.failures import LIMITS, NONE, Reasons, dominant, find_reasons
from pahm.synth.render import trace

K = np.array([[400.0, 0, 63.5], [0, 400.0, 63.5], [0, 0, 1]])
SPHERE = trimesh.creation.icosphere(4, 0.05)


def sample_of(vertices, mask=None, size=(128, 128)):
    sample = {"image": Image.new("RGB", size), "K": K, "vertices": vertices.astype(np.float32), "index": 3}
    return sample if mask is None else sample | {"mask": Image.fromarray(mask)}


def sphere(x=0.0, z=1.0, scale=1.0):
    return SPHERE.vertices * scale + [x, 0, z]


def test_occlusion_is_what_the_mask_lacks_of_the_silhouette():
    vertices = sphere()
    silhouette = trace(vertices, SPHERE.faces, K, (128, 128))[1] >= 0
    mask = np.full((128, 128), 255, np.uint8)
    assert find_reasons(sample_of(vertices, mask), SPHERE.faces).occlusion == 0
    mask[:, :64] = 0
    expected = silhouette[:, :64].sum() / silhouette.sum()
    found = find_reasons(sample_of(vertices, mask), SPHERE.faces).occlusion
    assert found == pytest.approx(expected) == pytest.approx(0.5, abs=0.03)
    assert math.isnan(find_reasons(sample_of(vertices), SPHERE.faces).occlusion)


def test_out_of_frame_counts_vertices_beyond_the_outer_edges():
    vertices = sphere()
    at_the_edge = sphere(x=64 / 400)  # the image's right edge is 64 pixels from its centre
    shares = [find_reasons(sample_of(v), SPHERE.faces).out_of_frame for v in (vertices, at_the_edge)]
    assert shares[0] == 0 and shares[1] == pytest.approx(0.5, abs=0.05)
    gone = find_reasons(sample_of(sphere(x=1.0), np.zeros((128, 128), np.uint8)), SPHERE.faces)
    assert gone.out_of_frame == 1 and math.isnan(gone.occlusion)
    wide = find_reasons(sample_of(at_the_edge, size=(256, 128)), SPHERE.faces)
    assert wide.out_of_frame == 0


def test_out_of_frame_counts_vertices_beyond_what_the_network_sees():
    inside_the_image = sphere(x=32 / 400)  # half of the image's side ends 32 pixels from its centre
    shares = [
        find_reasons(sample_of(inside_the_image), SPHERE.faces, share).out_of_frame for share in (1.0, 0.5)
    ]
    assert shares[0] == 0 and shares[1] == pytest.approx(0.5, abs=0.05)
    # The sphere's centre is at pixel 63.5, and the square of half the longer side begins at 64 of 256.
    for size, expected in (((256, 128), 0.5), ((128, 256), 0.5), ((128, 160), 0.0), ((128, 128), 0.0)):
        found = find_reasons(sample_of(sphere(), size=size), SPHERE.faces, 0.5).out_of_frame
        assert found == pytest.approx(expected, abs=0.05)
    beyond = find_reasons(sample_of(sphere(x=64 / 400)), SPHERE.faces, 2.0)
    assert beyond.out_of_frame == pytest.approx(0.5, abs=0.05), "there is no hand beyond the image"


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf])
def test_a_share_that_shows_nothing_is_refused(share):
    with pytest.raises(ValueError, match=rf"share: expected a positive, finite fraction, got {share}"):
        find_reasons(sample_of(sphere()), SPHERE.faces, share)


def test_self_occlusion_of_spheres():
    # From a distance d a sphere of radius r shows the cap (1 - r / d) / 2 of its area.
    alone = find_reasons(sample_of(sphere()), SPHERE.faces).self_occlusion
    assert alone == pytest.approx(1 - (1 - 0.05) / 2, abs=0.03)
    both = np.concatenate([sphere(), sphere(z=1.5, scale=0.5)])
    faces = np.concatenate([SPHERE.faces, SPHERE.faces + len(SPHERE.vertices)])
    assert find_reasons(sample_of(both), faces).self_occlusion == pytest.approx((1 + alone) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("shares", "name"),
    [
        ((0.0, 0.0, 0.5), NONE),
        ((0.09, 0.04, 0.59), NONE),
        ((LIMITS["occlusion"].named, 0.0, 0.5), "occlusion"),
        ((0.0, LIMITS["out of frame"].named, 0.5), "out of frame"),
        ((0.0, 0.0, 0.61), "self-occlusion"),
        ((0.15, 0.0, 0.7), "self-occlusion"),
        ((0.3, 0.0, 0.7), "occlusion"),
        ((0.3, 0.2, 0.7), "out of frame"),
        ((math.nan, 0.0, 0.4), NONE),
        ((math.nan, 0.2, 0.4), "out of frame"),
    ],
)
def test_dominant_is_the_furthest_beyond_what_is_usual(shares, name):
    assert dominant(Reasons(*shares)) == name


def test_a_mask_of_another_size_is_named():
    sample = sample_of(sphere(), np.zeros((64, 32), np.uint8))
    with pytest.raises(ValueError, match=r"mask: that of image 3 has 32 x 64 pixels, expected 128 x 128"):
        find_reasons(sample, SPHERE.faces)
