import numpy as np
import pytest
from PIL import Image
from resting_hand import K, hue_share, resting_hand

from pahm.infer.drawing import PREDICTED, mesh_cutout, mesh_picture, overlay


def test_overlay_covers_the_hand_and_nothing_else():
    hand = resting_hand()
    drawn = np.asarray(overlay(hand.image, hand.vertices, hand.faces, K), int)
    changed = np.abs(drawn - 120).max(-1) > 3
    pixels = hand.vertices_2d.round().astype(int)
    assert changed[pixels[:, 1], pixels[:, 0]].mean() > 0.9
    low, high = pixels.min(0) - 1, pixels.max(0) + 1
    changed[low[1] : high[1] + 1, low[0] : high[0] + 1] = False
    assert not changed.any()


def test_overlay_opacity():
    hand = resting_hand()
    arguments = (hand.image, hand.vertices, hand.faces, K)
    none, half, full = (np.asarray(overlay(*arguments, opacity=value), float) for value in (0, 0.5, 1))
    assert (none == 120).all()
    np.testing.assert_allclose(half, (none + full) / 2, atol=1.01)
    with pytest.raises(ValueError, match=r"opacity: expected a number from 0 to 1, got 1.5"):
        overlay(*arguments, opacity=1.5)


def test_overlay_of_a_large_image_lies_where_that_of_a_small_one_does():
    hand = resting_hand()
    small = overlay(hand.image, hand.vertices, hand.faces, K)
    factor = 16
    large_K = K.copy()
    large_K[:2] *= factor
    large_K[:2, 2] += (factor - 1) / 2
    large_image = hand.image.resize((128 * factor, 128 * factor))
    large = overlay(large_image, hand.vertices, hand.faces, large_K)
    assert large.size == (2048, 2048)
    difference = np.asarray(large.resize((128, 128), Image.Resampling.BOX), float) - np.asarray(small, float)
    assert np.abs(difference).mean() < 1.0


def test_flat_shading_shows_the_facets():
    hand = resting_hand()
    arguments = (hand.meshes[0], hand.level_faces[0], K, (128, 128))
    smooth, flat = (np.asarray(mesh_picture(*arguments, flat=flat)) for flat in (False, True))
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) < len(np.unique(smooth.reshape(-1, 3), axis=0))
    assert (flat[0, 0] == 255).all() and hue_share(flat, PREDICTED) > 0.02


def test_cutout_is_the_picture_without_its_paper():
    hand = resting_hand()
    arguments = (hand.vertices, hand.faces, K, (128, 128))
    cutout = mesh_cutout(*arguments)
    cover = np.asarray(cutout.getchannel("A"))
    pixels = hand.vertices_2d.round().astype(int)
    assert cutout.mode == "RGBA" and (cover[pixels[:, 1], pixels[:, 0]] > 0).mean() > 0.95
    assert cover[0].max() == 0 and 0.02 < (cover == 255).mean() < 0.5
    paper = Image.new("RGBA", (128, 128), "white")
    paper.alpha_composite(cutout)
    difference = np.asarray(paper.convert("RGB"), int) - np.asarray(mesh_picture(*arguments), int)
    assert np.abs(difference).max() <= 2
