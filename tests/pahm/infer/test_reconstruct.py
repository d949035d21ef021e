"""The road from a crop to a hand in camera space."""

import math

import numpy as np
import pytest
import torch
import trimesh
from known_hand import SIZE, TOPOLOGY, KnownNetwork, enclosed, known_hand, picture
from PIL import Image, ImageOps
from scipy.spatial.transform import Rotation

from pahm.data.crop import Request, hand_box, read_crop
from pahm.infer.predictor import Predictor
from pahm.infer.reconstruct import reconstruct, see


def fit_weak_camera(mesh, crop_pixels):
    """The [s, tx, ty] that best sees `mesh` at `crop_pixels`, by least squares."""
    target = (2 * crop_pixels + 1) / SIZE - 1
    count = len(mesh)
    left = np.zeros((2 * count, 3))
    left[:count, 0], left[count:, 0] = mesh[:, 0], mesh[:, 1]
    left[:count, 1] = left[count:, 2] = 1
    s, a, b = np.linalg.lstsq(left, np.concatenate([target[:, 0], target[:, 1]]), rcond=None)[0]
    return [s, a / s, b / s]


@pytest.mark.parametrize(
    ("root", "tolerance"), [((0.01, -0.02, 5.0), 0.005), ((0.9, -0.5, 5.0), 0.01), ((-1.2, 0.6, 4.0), 0.01)]
)
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_hand_far_away_is_found_in_camera_space(root, tolerance, share):
    K = np.array([[3000.0, 0, 1000.0], [0, 2950.0, 700.0], [0, 0, 1]])
    mesh = known_hand()
    truth = mesh + np.array(root)
    pixels = truth @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    low, high = pixels.min(0), pixels.max(0)
    bbox = [*(low + 0.5), *(high - low)]  # from pixel centres to the image's corner
    x, y, side, _ = hand_box((2000, 1400), bbox, share)
    crop = SIZE / side * (pixels - np.array([x, y]) + 0.5) - 0.5
    ray = np.linalg.solve(K, np.array([x + side / 2 - 0.5, y + side / 2 - 0.5, 1]))
    ray /= np.linalg.norm(ray)
    axis = np.cross([0, 0, 1], ray)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * math.acos(ray[2])).as_matrix()
    relative = mesh @ turn  # as a camera that looks at the crop's centre sees it
    network = KnownNetwork(relative, fit_weak_camera(relative, crop))
    network.config.crop = share
    image = Image.new("RGB", (2000, 1400))
    prediction = Predictor(network, "cpu").predict(image, bbox=bbox, intrinsics=K)

    assert not prediction.intrinsics_assumed
    assert side == pytest.approx(share / 0.6 * (high - low).max())
    assert prediction.box == pytest.approx((x, y, side, side))
    np.testing.assert_array_equal(prediction.K, K)
    np.testing.assert_allclose(prediction.joints[9], root, rtol=tolerance, atol=0.002)
    np.testing.assert_allclose(prediction.vertices - prediction.joints[9], mesh, atol=1e-6)
    np.testing.assert_allclose(prediction.joints, TOPOLOGY.joint_regressor @ prediction.vertices, atol=1e-6)
    reprojected = prediction.vertices @ K.T
    reprojected = reprojected[:, :2] / reprojected[:, 2:]
    span = (high - low).max()
    assert np.abs(reprojected - pixels).max() < 0.02 * span
    assert np.abs(prediction.vertices_2d - pixels).max() < 0.03 * span
    np.testing.assert_allclose(
        prediction.joints_2d, TOPOLOGY.joint_regressor @ prediction.vertices_2d, atol=0.01
    )
    for level, points in zip((3, 2, 1, 0), prediction.meshes, strict=True):
        np.testing.assert_array_equal(points, prediction.vertices[TOPOLOGY.hierarchy.selection(level)])


MIRROR = np.array([-1.0, 1.0, 1.0])


def mirrored_pair(width, bbox, skew):
    """A right hand, and its picture flipped and taken for a left one's; the camera's axis is off-centre."""
    image = picture(size=(width, 70))
    K = np.array([[120.0, skew, 27.3], [0, 118.0, 41.9], [0, 0, 1]])
    mirrored_K = np.array([[120.0, -skew, width - 1 - 27.3], [0, 118.0, 41.9], [0, 0, 1]])
    mirrored_bbox = None if bbox is None else (width - bbox[0] - bbox[2], *bbox[1:])
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0.01, -0.02], look=0.5), "cpu")
    right = predictor.predict(image, bbox=bbox, intrinsics=K)
    left = predictor.predict(ImageOps.mirror(image), bbox=mirrored_bbox, intrinsics=mirrored_K, left=True)
    return right, left


@pytest.mark.parametrize("width", [90, 91])
@pytest.mark.parametrize("skew", [0.0, 0.7])
@pytest.mark.parametrize("bbox", [None, (52.0, 7.5, 30.0, 25.0), (-4.0, 30.0, 21.0, 33.5)])
def test_a_left_hand_is_the_mirror_of_a_right_one(bbox, skew, width):
    right, left = mirrored_pair(width, bbox, skew)
    assert np.ptp(right.vertices, axis=0).max() > 0.1 and abs(right.vertices[:, 0].mean()) > 1e-3
    np.testing.assert_allclose(left.vertices, right.vertices * MIRROR, atol=1e-4)
    np.testing.assert_allclose(left.joints, right.joints * MIRROR, atol=1e-4)
    for ours, theirs in zip(left.meshes, right.meshes, strict=True):
        np.testing.assert_allclose(ours, theirs * MIRROR, atol=1e-4)
    for ours, theirs in zip(left.relative_meshes, right.relative_meshes, strict=True):
        np.testing.assert_allclose(ours, theirs * MIRROR, atol=1e-4)
    np.testing.assert_allclose(left.vertices_2d[:, 0], width - 1 - right.vertices_2d[:, 0], atol=1e-4)
    np.testing.assert_allclose(left.vertices_2d[:, 1], right.vertices_2d[:, 1], atol=1e-4)
    np.testing.assert_allclose(left.joints_2d[:, 0], width - 1 - right.joints_2d[:, 0], atol=1e-4)
    np.testing.assert_allclose(left.weak_camera, right.weak_camera * [1, -1, 1], atol=1e-4)
    assert np.array_equal(left.image, ImageOps.mirror(right.image)) and left.left and not right.left
    # The weak camera belongs to the image that was given, not to its mirror.
    box, mesh = left.box, left.relative_meshes[-1]
    crop = left.weak_camera[0] * (mesh[:, :2] + left.weak_camera[1:])
    u = ((crop[:, 0] + 1) / 2) * box[2] + box[0] - 0.5
    np.testing.assert_allclose(u, left.vertices_2d[:, 0], atol=1e-4)


def test_normals_of_a_left_hand_are_those_of_the_right_one_mirrored():
    right, left = mirrored_pair(91, (52.0, 7.5, 30.0, 25.0), 0.0)
    for level in range(4):
        normals = [
            trimesh.Trimesh(hand.meshes[level], hand.level_faces[level], process=False).face_normals
            for hand in (right, left)
        ]
        np.testing.assert_allclose(normals[1], normals[0] * MIRROR, atol=2e-3)
    for hand in (right, left):
        assert enclosed(hand.vertices, hand.faces) > 5e-5


def test_a_network_may_have_more_meshes_on_its_way():
    class Refines(KnownNetwork):
        def forward(self, images):
            output = super().forward(images)
            output.meshes.extend([output.meshes[-1], output.meshes[-1] * 1.01])
            return output

    prediction = Predictor(Refines(known_hand(), [8.0, 0, 0]), "cpu").predict(picture(), left=True)
    assert [len(mesh) for mesh in prediction.meshes] == [98, 195, 389, 778, 778, 778]
    assert prediction.vertices is prediction.meshes[-1]
    for mesh, faces in zip(prediction.meshes, prediction.level_faces, strict=True):
        assert faces.max() == len(mesh) - 1


def test_an_output_that_is_no_hand_spoils_no_other_of_its_batch():
    class Fails(KnownNetwork):
        def forward(self, images):
            output = super().forward(images)
            dark = images.amax((1, 2, 3)) < 0
            output.meshes[-1][dark] = np.nan
            return output

    dark = Image.new("RGB", (80, 80))
    predictor = Predictor(Fails(known_hand(), [8.0, 0, 0]), "cpu")
    results = list(predictor.attempt_many([picture(), dark, picture(1)]))
    assert [isinstance(result, Exception) for result in results] == [False, True, False]
    assert str(results[1]) == "images[1]: the network's output is not finite"


def test_a_batch_gives_what_each_crop_gives_alone():
    network = KnownNetwork(known_hand(), [8.0, 0.01, -0.02], look=0.5)
    requests = [
        Request(picture(0), (5.0, 4.0, 30.0, 20.0)),
        Request(picture(1, (120, 60)), left=True, bone=0.03),
        Request(picture(2), None, [[200.0, 0, -60], [0, 200, 35], [0, 0, 1]]),
    ]
    crops = [read_crop(request, SIZE, 1.0) for request in requests]
    together, alone = reconstruct(network, crops), [reconstruct(network, [crop])[0] for crop in crops]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.vertices, other.vertices, atol=1e-9)
        np.testing.assert_allclose(one.vertices_2d, other.vertices_2d, atol=1e-6)
    assert np.linalg.norm(together[1].joints[9] - together[1].joints[10]) == pytest.approx(0.03)
    assert reconstruct(network, []) == []


def test_joints_keep_their_precision_under_autocast():
    network = KnownNetwork(known_hand().astype(np.float32), [8.0, 0, 0])
    K = torch.diag(torch.tensor([90.0, 90, 1]))[None]
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    expected = see(network, pixels, K).joints
    with torch.autocast("cpu", torch.bfloat16):
        found = see(network, pixels, K).joints
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
