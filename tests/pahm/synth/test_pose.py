"""Sampled poses stay within anatomy, do not collide, and serve any right hand with MANO's bones."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from pahm.hand import HandModel
from pahm.hand.articulation import FLEXION_LIMITS, THUMB_LIMITS, Articulation
from pahm.hand.joints import FINGERS
from pahm.synth.pose import POSTURES, sample_pose, sample_rotation, sample_shape

COUNT = 600
LONG = ("index", "middle", "ring", "pinky")


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return HandModel.load(dtype=torch.float64)


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    return sample_pose(np.random.default_rng(11), COUNT)


@pytest.fixture(scope="module")
def points(hand, poses) -> dict[str, np.ndarray]:
    """Joints (COUNT, 4, 3) of each finger, out to the tip, by following the bones one pose at a time."""
    rest, tips = hand.bones().numpy(), hand.template.numpy()[list(hand.tips)]
    found = {finger: np.zeros((COUNT, 4, 3)) for finger in FINGERS}
    for i, pose in enumerate(poses):
        for f, (finger, bones) in enumerate(FINGERS.items()):
            turn, here, before = Rotation.identity(), rest[0], rest[0]
            for k, bone in enumerate(bones):
                here = here + turn.apply(rest[bone] - before)
                found[finger][i, k] = here
                before, turn = rest[bone], turn * Rotation.from_rotvec(pose[bone])
            found[finger][i, 3] = here + turn.apply(tips[f] - before)
    return found


def frame(hand: HandModel) -> np.ndarray:
    """Rows: along the middle metacarpal, out of the palm, towards the thumb."""
    bones = hand.bones().numpy()
    along = bones[4] - bones[0]
    palm = np.cross(bones[1] - bones[7], along)
    palm /= np.linalg.norm(palm)
    along = along - palm * (along @ palm)
    along /= np.linalg.norm(along)
    return np.stack([along, palm, np.cross(along, palm)])


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_shape_dtype_and_still_wrist(poses):
    assert poses.shape == (COUNT, 16, 3) and poses.dtype == np.float64
    assert np.isfinite(poses).all() and not poses[:, 0].any()
    assert np.linalg.norm(poses, axis=2).max() < np.pi


def test_same_seed_same_poses(poses):
    np.testing.assert_array_equal(sample_pose(np.random.default_rng(11), COUNT), poses)
    other = sample_pose(np.random.default_rng(12), COUNT)
    assert np.abs(other - poses).max() > 0.5
    ends = np.random.default_rng(11), np.random.default_rng(11)
    sample_pose(ends[0], 7)
    sample_pose(ends[1], 7, HandModel.load())
    assert ends[0].random() == ends[1].random(), "what is drawn does not hang on collisions or on the hand"


@pytest.mark.parametrize("finger", LONG)
def test_long_fingers_bend_within_limits_and_towards_the_palm(hand, points, finger):
    axes = frame(hand)
    bones = unit(np.diff(points[finger], axis=1)) @ axes.T  # along, palmward, radial
    mcp = np.degrees(np.arctan2(bones[:, 0, 1], bones[:, 0, 0]))
    assert mcp.min() > FLEXION_LIMITS[0, 0] - 3 and mcp.max() < FLEXION_LIMITS[0, 1] + 3
    assert mcp.min() < 5 and mcp.max() > 70, "both straight and bent knuckles occur"
    for k, (low, high) in ((1, FLEXION_LIMITS[1]), (2, FLEXION_LIMITS[2])):
        cross = np.cross(bones[:, k - 1], bones[:, k])
        bend = np.degrees(np.arctan2(np.linalg.norm(cross, axis=1), (bones[:, k - 1] * bones[:, k]).sum(1)))
        bend *= np.sign(cross @ np.array([0.0, 0.0, 1.0]))
        # Rest skeletons do not lie wholly in the plane of bending.
        assert bend.min() > low - 8 and bend.max() < high + 4
        assert bend.max() > 0.7 * high


@pytest.mark.parametrize("finger", LONG)
def test_straight_fingers_spread_within_limits(hand, points, finger):
    bones = unit(np.diff(points[finger], axis=1)) @ frame(hand).T
    straight = bones[:, 0, 0] > 0.9
    side = np.degrees(np.arctan2(bones[straight, 0, 2], bones[straight, 0, 0]))
    assert np.ptp(side) < 32 and np.ptp(side) > 5


def test_thumb_stays_within_limits(hand, points):
    bones = unit(np.diff(points["thumb"], axis=1)) @ frame(hand).T
    palmar = np.degrees(np.arcsin(bones[:, 0, 1]))
    radial = np.degrees(np.arctan2(bones[:, 0, 2], bones[:, 0, 0]))
    for angle, (low, high) in ((radial, THUMB_LIMITS[0]), (palmar, THUMB_LIMITS[1])):
        assert low - 0.5 < angle.min() and angle.max() < high + 0.5
        assert np.ptp(angle) > 25
    for k in (1, 2):
        bend = np.degrees(np.arccos(np.clip((bones[:, k - 1] * bones[:, k]).sum(1), -1, 1)))
        assert bend.max() < THUMB_LIMITS[2 + k, 1] + 8


def test_opposed_thumb_meets_the_index_finger(hand):
    """In the pinch the tips nearly touch; in the open hand they are far apart."""
    body = Articulation(hand)

    def gap(name: str) -> float:
        posture = POSTURES[name]
        flexion = np.stack([posture.mcp, posture.pip, 0.62 * np.array(posture.pip)], -1)[None]
        pose = body.pose(flexion, np.zeros((1, 4)), np.array(posture.thumb)[None])
        joints = hand(torch.from_numpy(pose)).joints[0]
        return float((joints[4] - joints[8]).norm())

    assert gap("pinch") < 0.03 < 0.08 < gap("open")


def test_fingers_move_together_but_not_in_step(points, hand):
    bones = {finger: unit(np.diff(points[finger], axis=1)) for finger in LONG}
    curl = np.stack([np.arccos(np.clip((b[:, 0] * b[:, 1]).sum(1), -1, 1)) for b in bones.values()])
    together = np.corrcoef(curl)
    neighbours = together[[0, 1, 2], [1, 2, 3]]
    assert (neighbours > 0.3).all() and (neighbours < 0.97).all()
    assert (together[0, 3] < neighbours).all(), "index and little finger are the least alike"
    assert ((curl < np.radians(25)).mean(1) > 0.1).all() and ((curl > np.radians(70)).mean(1) > 0.1).all()


def test_fingers_do_not_run_through_each_other(hand, poses, points):
    """No skin of a finger's outer two phalanges comes near the axis of another finger's."""
    owner = hand.skinning_weights.argmax(1).numpy()
    vertices = hand(torch.from_numpy(poses[:200])).vertices.numpy()
    deep = 0
    for finger, (_, second, third) in FINGERS.items():
        skin = vertices[:, np.isin(owner, (second, third))]
        for other in FINGERS:
            if other == finger:
                continue
            for k in (1, 2):
                start, end = points[other][:200, k], points[other][:200, k + 1]
                along = (end - start)[:, None]
                t = ((skin - start[:, None]) * along).sum(-1, keepdims=True) / (along**2).sum(
                    -1, keepdims=True
                )
                nearest = start[:, None] + np.clip(t, 0.0, 0.8) * along
                deep += (np.linalg.norm(skin - nearest, axis=-1).min(1) < 0.0015).sum()
    assert deep <= 4, f"{deep} of 200 poses have a finger's skin on the axis of another"


def test_a_knot_is_untangled(hand):
    body = Articulation(hand)
    crossed = body.pose(
        np.array([[[45.0, 10.0, 5.0]] * 4]), np.array([[-60.0, 40.0, 0, 0]]), np.array([[40.0, 20, 0, 0, 0]])
    )
    assert body.collisions(crossed)[1].all()
    thumb, fingers = body.collisions(sample_pose(np.random.default_rng(5), 2000, hand))
    assert thumb.mean() < 0.01 and fingers.mean() < 0.01


def rebuilt(hand: HandModel, template: torch.Tensor) -> HandModel:
    return HandModel(
        template=template.numpy(),
        faces=hand.faces.numpy(),
        skinning_weights=hand.skinning_weights.numpy(),
        shape_basis=hand.shape_basis.numpy(),
        bone_regressor=hand.bone_regressor.numpy(),
        tips=hand.tips,
        dtype=torch.float64,
    )


def test_a_hand_in_another_frame_takes_the_same_postures(hand):
    turn = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()
    moved = rebuilt(hand, hand.template @ torch.from_numpy(turn.T) + 0.2)
    pose = torch.from_numpy(sample_pose(np.random.default_rng(3), 20, hand))
    other = torch.from_numpy(sample_pose(np.random.default_rng(3), 20, moved))
    expected = hand(pose).vertices @ torch.from_numpy(turn.T) + 0.2
    assert torch.allclose(moved(other).vertices, expected, atol=1e-9)


def test_a_hand_with_another_rest_pose_takes_the_same_postures(hand):
    """Angles are absolute: a hand whose template is flat is posed as one whose template is relaxed."""
    body = Articulation(hand)
    flat = body.pose(np.zeros((1, 4, 3)), np.zeros((1, 4)), np.array([[45.0, 20.0, 0.0, 5.0, 5.0]]))
    other = rebuilt(hand, hand(torch.from_numpy(flat)).vertices[0])
    pose = torch.from_numpy(sample_pose(np.random.default_rng(4), 100, hand))
    again = torch.from_numpy(sample_pose(np.random.default_rng(4), 100, other))
    gaps = (hand(pose).joints - other(again).joints).norm(dim=2)
    assert gaps.mean() < 0.004 and gaps.quantile(0.95) < 0.015


def test_rotations_are_uniform():
    turns = Rotation.from_rotvec(sample_rotation(np.random.default_rng(0), 20000)).as_matrix()
    assert np.abs(turns.mean(0)).max() < 0.02
    angles = Rotation.from_matrix(turns).magnitude()
    # Haar measure: the angle's density is (1 - cos t) / pi.
    share = np.array([(angles < t).mean() for t in (0.5, 1.0, 2.0, 3.0)])
    expected = [(t - np.sin(t)) / np.pi for t in (0.5, 1.0, 2.0, 3.0)]
    np.testing.assert_allclose(share, expected, atol=0.012)


def test_shapes_are_clipped_normal():
    shapes = sample_shape(np.random.default_rng(0), 5000)
    assert shapes.shape == (5000, 10) and shapes.dtype == np.float64
    assert np.abs(shapes).max() == 2.5 and np.abs(shapes.std(0) - 0.99).max() < 0.05


def test_empty_and_bad_counts():
    rng = np.random.default_rng(0)
    assert sample_pose(rng, 0).shape == (0, 16, 3) and sample_rotation(rng, 0).shape == (0, 3)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        sample_pose(rng, -1)
    with pytest.raises(TypeError, match=r"rng must be a numpy.random.Generator, got int"):
        sample_pose(0, 1)
