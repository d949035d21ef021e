"""What a `Hand` knows of itself: its overlay, its files, its confidence."""

import numpy as np
import pytest
from known_hand import SIZE, KnownNetwork, known_hand, picture
from PIL import Image
from resting_hand import K, resting_hand

from pahm.data.augment import crop_matrix
from pahm.data.crop import Request, read_crop
from pahm.infer.predictor import Predictor
from pahm.infer.reconstruct import reconstruct
from pahm.model import load_checkpoint
from pahm.model.network import Cues, Prediction
from pahm.synth.picture import draw
from pahm.synth.render import trace


def covered(hand, side):
    """Which pixels of the crop the mesh covers."""
    return trace(hand.vertices, hand.faces, crop_matrix(hand.box, side) @ K, (side, side))[1] >= 0


def test_overlay_shows_the_mesh_over_the_image():
    hand = resting_hand()
    drawn = hand.overlay()
    changed = np.abs(np.asarray(drawn, int) - 120).max(-1) > 3
    assert drawn.size == (128, 128) and (changed & covered(hand, 128)).sum() > 0.95 * changed.sum()
    assert hand.image.getcolors(1) == [(128 * 128, (120, 120, 120))], "the image itself stays as it was"


def test_files_are_named_after_the_image(tmp_path):
    names = ["_overlay.png", ".obj", ".json"]
    paths = resting_hand().save(tmp_path)
    assert paths == [tmp_path / f"hand{name}" for name in names]
    paths = resting_hand(source="/photos/me.jpg").save(tmp_path / "new" / "folder")
    assert paths == [tmp_path / "new" / "folder" / f"me{name}" for name in names]
    assert resting_hand().save(tmp_path, "other", ("ply",)) == [tmp_path / "other.ply"]
    assert all(path.stat().st_size for path in tmp_path.rglob("*.*"))


@pytest.mark.parametrize("box", [(0.0, 0.0, 128.0, 128.0), (40.0, 30.0, 70.0, 70.0)])
def test_confidence_is_how_well_the_mesh_fills_the_silhouette(box):
    mesh = covered(resting_hand(box=box), 56).astype(np.float32)
    assert 0.02 < mesh.mean() < 0.9
    cases = {1.0: mesh, 0.25: mesh / 4, 0.0: 1 - mesh}
    for expected, silhouette in cases.items():
        assert resting_hand(box=box, silhouette=silhouette).confidence == pytest.approx(expected)
    everywhere = resting_hand(box=box, silhouette=np.ones_like(mesh)).confidence
    assert everywhere == pytest.approx(mesh.mean())


def test_confidence_without_a_silhouette_or_a_place():
    assert resting_hand().confidence is None
    behind = [mesh - [0, 0, 1] for mesh in resting_hand().meshes]
    assert resting_hand(meshes=behind, silhouette=np.ones((56, 56), np.float32)).confidence == 0


class Outlines(KnownNetwork):
    """Sees a hand in the left quarter of each crop."""

    def forward(self, images):
        meshes, camera, _, _ = super().forward(images)
        logits = images.new_full((len(images), 1, 16, 16), -20)
        logits[..., :4] = 20
        return Prediction(meshes, camera, [Cues(images.new_zeros(len(images), 21, 16, 16), logits)], [])


def test_the_silhouette_of_a_left_hand_is_that_of_the_image():
    crops = [read_crop(Request(picture(), left=left), SIZE, 1.0) for left in (False, True)]
    right, left = reconstruct(Outlines(known_hand(), [8.0, 0, 0]), crops)
    np.testing.assert_allclose(right.silhouette.mean(0), [1] * 4 + [0] * 12, atol=1e-6)
    np.testing.assert_allclose(left.silhouette.mean(0), [0] * 12 + [1] * 4, atol=1e-6)


def test_confidence_of_the_shipped_network_tells_hands_from_noise():
    rng = np.random.default_rng(0)
    hands = [draw(0, "evaluation", index).image for index in range(6)]
    noise = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(3)]
    noise += [
        np.asarray(Image.fromarray(n[:7, :7]).resize((224, 224), Image.Resampling.BICUBIC)) for n in noise
    ]
    found = [hand.confidence for hand in Predictor(load_checkpoint(), "cpu").predict_many([*hands, *noise])]
    assert min(found[:6]) > 0.5 > max(found[6:])
