from __future__ import annotations

import numpy as np

from pahm.synth.picture import draw
from pahm.synth.props import MAX_COVER, boundary_loop, occluder
from pahm.synth.render import trace
from pahm.synth.sampling import sample_annotation, shipped_hand


def test_the_mask_is_the_visible_hand():
    faces = shipped_hand().faces.numpy()
    equal, shares = 0, []
    for index in range(24):
        annotation = sample_annotation(2, "training", index)
        picture = draw(2, "training", index, annotation=annotation)
        mask = np.asarray(picture.mask) > 127
        silhouette = trace(annotation.vertices, faces, annotation.K, (224, 224))[1] >= 0
        assert (
            picture.image.size == (224, 224) and picture.image.mode == "RGB" and 70 <= picture.quality <= 95
        )
        assert not (mask & ~silhouette).any()
        shares.append(mask.sum() / silhouette.sum())
        equal += np.array_equal(mask, silhouette)
    assert min(shares) > 1 - MAX_COVER - 0.15
    assert equal > 6 and np.median(shares) > 0.97


def test_hands_can_be_told_from_their_background():
    contrast = []
    for index in range(12):
        picture = draw(2, "training", index)
        pixels, mask = np.asarray(picture.image, float), np.asarray(picture.mask) > 127
        assert 40 < pixels[mask].mean() < 235
        contrast.append(np.linalg.norm(pixels[mask].mean(axis=0) - pixels[~mask].mean(axis=0)))
    assert np.median(contrast) > 25


def test_occluders_cover_a_bounded_part():
    faces, found = shipped_hand().faces.numpy(), 0
    for index in range(25):
        annotation = sample_annotation(6, "training", index)
        part = occluder(np.random.default_rng(index), annotation, 224)
        if part is None:
            continue
        found += 1
        hand = trace(annotation.vertices, faces, annotation.K, (224, 224))[0]
        hidden = trace(part.vertices, part.faces, annotation.K, (224, 224))[0] < hand
        assert hidden[np.isfinite(hand)].mean() <= MAX_COVER + 0.03
    assert found > 15


def test_the_boundary_loop_is_the_wrist():
    loop = boundary_loop(shipped_hand().faces.numpy())
    assert len(loop) == len(set(loop.tolist())) == 16
    rest, wrist = (
        shipped_hand().template.numpy(),
        (shipped_hand().joint_regressor @ shipped_hand().template)[0],
    )
    assert np.linalg.norm(rest[loop] - wrist.numpy(), axis=1).max() < 0.04
