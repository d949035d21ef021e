import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image, ImageOps
from scipy.spatial.transform import Rotation
from torch import nn

from pahm.hand import HandModel
from pahm.hand.topology import HandTopology
from pahm.predict import (
    Predictor,
    assumed_intrinsics,
    hand_box,
    load_image,
    ray_rotation,
    read_intrinsics,
    solve_translation,
    write,
)

SIZE = 64
TOPOLOGY = HandTopology.load()


def known_hand():
    """A bent right hand relative to its root joint, (778, 3) float64 metres."""
    hand = HandModel.load().double()
    pose = torch.zeros(1, 16, 3, dtype=torch.float64)
    pose[0, 1:] = 0.25 * torch.randn(15, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pose[0, 0] = torch.tensor([0.4, -0.9, 1.3])
    output = hand(pose)
    return (output.vertices[0] - output.joints[0, 9]).detach().numpy()


class KnownNetwork(nn.Module):
    """Returns a given mesh and camera; with `look` > 0 both also follow the brightness of the crop."""

    def __init__(self, mesh, camera, look=0.0):
        super().__init__()
        self.config = SimpleNamespace(image_size=SIZE, root_joint=9)
        self.topology = TOPOLOGY
        self.register_buffer("joint_regressor", torch.tensor(TOPOLOGY.joint_regressor, dtype=torch.float32))
        self.register_buffer("mesh", torch.tensor(mesh))
        self.register_buffer("camera", torch.tensor(camera, dtype=torch.float64))
        self.look = look
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        ramp = torch.linspace(-1, 1, SIZE)
        across, down = (images.mean(1) * ramp).mean(), (images.mean(1) * ramp[:, None]).mean()
        mesh, camera = self.mesh[None], self.camera[None].clone()
        mesh = mesh * (1 + self.look * torch.stack([across, down, across - down]))
        camera[0, 1] += 0.1 * self.look * across
        levels = [mesh[:, TOPOLOGY.hierarchy.selection(level)] for level in (3, 2, 1, 0)]
        return SimpleNamespace(meshes=levels, camera=camera)


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
def test_a_hand_far_away_is_found_in_camera_space(root, tolerance):
    K = np.array([[3000.0, 0, 1000.0], [0, 2950.0, 700.0], [0, 0, 1]])
    mesh = known_hand()
    truth = mesh + np.array(root)
    pixels = truth @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    low, high = pixels.min(0), pixels.max(0)
    bbox = [*(low + 0.5), *(high - low)]  # from pixel centres to the image's corner
    x, y, side, _ = hand_box((2000, 1400), bbox)
    crop = SIZE / side * (pixels - np.array([x, y]) + 0.5) - 0.5
    ray = np.linalg.solve(K, np.array([x + side / 2 - 0.5, y + side / 2 - 0.5, 1]))
    ray /= np.linalg.norm(ray)
    axis = np.cross([0, 0, 1], ray)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * math.acos(ray[2])).as_matrix()
    relative = mesh @ turn  # as a camera that looks at the crop's centre sees it
    network = KnownNetwork(relative, fit_weak_camera(relative, crop))
    image = Image.new("RGB", (2000, 1400))
    prediction = Predictor(network, "cpu").predict(image, bbox=bbox, intrinsics=K)

    assert not prediction.intrinsics_assumed
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


def test_translation_is_exact_for_perspective_projections():
    rng = np.random.default_rng(0)
    K = np.array([[500.0, 3.0, 110], [0, 480.0, 115], [0, 0, 1]])
    points, truth = rng.normal(0, 0.05, (50, 3)), np.array([0.1, -0.05, 0.6])
    pixels = (points + truth) @ K.T
    np.testing.assert_allclose(solve_translation(points, pixels[:, :2] / pixels[:, 2:], K), truth, atol=1e-9)


def test_ray_rotation_is_a_rotation_onto_the_ray():
    K = assumed_intrinsics(640, 480)
    turn = ray_rotation(K, np.array([620.0, 40.0]))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1)
    pixel = K @ turn @ np.array([0, 0, 1])
    np.testing.assert_allclose(pixel[:2] / pixel[2], [620, 40])
    np.testing.assert_allclose(ray_rotation(K, K[:2, 2]), np.eye(3), atol=1e-12)


def picture(seed=0, size=(90, 70)):
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("bbox", [None, (20.0, 10.5, 30.0, 25.0)])
def test_a_left_hand_is_the_mirror_of_a_right_one(bbox):
    image = picture()
    K = np.array([[120.0, 0.7, 41.0], [0, 118.0, 36.0], [0, 0, 1]])
    mirrored_K = np.array([[120.0, -0.7, 89 - 41.0], [0, 118.0, 36.0], [0, 0, 1]])
    mirrored_bbox = None if bbox is None else (90 - bbox[0] - bbox[2], *bbox[1:])
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0.01, -0.02], look=0.5), "cpu")
    right = predictor.predict(image, bbox=bbox, intrinsics=K)
    left = predictor.predict(ImageOps.mirror(image), bbox=mirrored_bbox, intrinsics=mirrored_K, left=True)
    sign = np.array([-1.0, 1.0, 1.0])
    np.testing.assert_allclose(left.vertices, right.vertices * sign, atol=1e-4)
    np.testing.assert_allclose(left.joints, right.joints * sign, atol=1e-4)
    for ours, theirs in zip(left.relative_meshes, right.relative_meshes, strict=True):
        np.testing.assert_allclose(ours, theirs * sign, atol=1e-4)
    np.testing.assert_allclose(left.vertices_2d[:, 0], 89 - right.vertices_2d[:, 0], atol=1e-4)
    np.testing.assert_allclose(left.vertices_2d[:, 1], right.vertices_2d[:, 1], atol=1e-4)
    np.testing.assert_allclose(left.joints_2d[:, 0], 89 - right.joints_2d[:, 0], atol=1e-4)
    np.testing.assert_allclose(left.weak_camera, right.weak_camera * [1, -1, 1], atol=1e-4)
    assert np.asarray(left.image).tolist() == np.asarray(ImageOps.mirror(image)).tolist()
    assert left.left and not right.left
    for result in (left, right):
        volume = trimesh.Trimesh(result.vertices, result.faces, process=False)
        volume.fill_holes()
        assert volume.volume > 5e-5  # positive: faces point outward
    # The weak camera belongs to the image that was given, not to its mirror.
    box, mesh = left.box, left.relative_meshes[-1]
    crop = left.weak_camera[0] * (mesh[:, :2] + left.weak_camera[1:])
    u = ((crop[:, 0] + 1) / 2) * box[2] + box[0] - 0.5
    np.testing.assert_allclose(u, left.vertices_2d[:, 0], atol=1e-4)


def test_the_network_sees_the_whole_image_or_the_enlarged_box():
    network = KnownNetwork(known_hand(), [8.0, 0, 0])
    predictor = Predictor(network, "cpu")
    white = np.zeros((100, 100, 3), np.uint8)
    white[40:60, 50:62] = 255
    whole = predictor.predict(white)
    boxed = predictor.predict(white, bbox=(50, 40, 12, 20))
    assert whole.box == (0, 0, 100, 100)
    np.testing.assert_allclose(boxed.box, (56 - 50 / 3, 50 - 50 / 3, 100 / 3, 100 / 3))
    shares = [(images[0, 1] > 1).float().mean().item() for images in network.seen]
    assert shares[0] == pytest.approx(0.2 * 0.12, rel=0.1)
    assert shares[1] == pytest.approx(0.6 * 0.36, rel=0.1)


def test_unknown_intrinsics_are_assumed_and_said_so():
    prediction = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu").predict(picture())
    assert prediction.intrinsics_assumed
    focal = math.hypot(90, 70)
    np.testing.assert_allclose(prediction.K, [[focal, 0, 44.5], [0, focal, 34.5], [0, 0, 1]])
    assert prediction.vertices[:, 2].min() > 0


def test_files_of_every_kind_of_image(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    rotated = Image.Exif()
    rotated[0x112] = 6
    image.save(tmp_path / "b.jpg", exif=rotated, quality=95)
    loaded, source = load_image(tmp_path / "a.png")
    assert np.array_equal(loaded, image) and source == str(tmp_path / "a.png")
    turned, _ = load_image(str(tmp_path / "b.jpg"))
    assert turned.size == (70, 90)
    assert np.abs(np.asarray(turned, int) - np.rot90(np.asarray(image, int), -1)).mean() < 6
    assert load_image(np.asarray(image))[1] is None
    assert load_image(np.zeros((5, 6), np.uint8))[0].size == (6, 5)
    assert load_image(image.convert("L"))[0].mode == "RGB"


def test_written_files_hold_the_prediction(tmp_path):
    picture().save(tmp_path / "hand.png")
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu")
    prediction = predictor.predict(tmp_path / "hand.png", left=True)
    paths = write(prediction, tmp_path / "out", "hand")
    names = ["hand.glb", "hand.json", "hand.ply", "hand_overlay.png"]
    assert sorted(path.name for path in paths) == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names

    mesh = trimesh.load(tmp_path / "out" / "hand.ply", process=False)
    np.testing.assert_allclose(mesh.vertices, prediction.vertices, atol=1e-6)
    np.testing.assert_array_equal(mesh.faces, prediction.faces)
    scene = trimesh.load(tmp_path / "out" / "hand.glb", process=False)
    (shape,) = scene.geometry.values()
    np.testing.assert_allclose(shape.vertices, prediction.vertices * [1, -1, -1], atol=1e-6)
    np.testing.assert_array_equal(shape.faces, prediction.faces)

    with Image.open(tmp_path / "out" / "hand_overlay.png") as drawn:
        changed = np.abs(np.asarray(drawn, int) - np.asarray(prediction.image, int)).max(2) > 8
    on_hand = prediction.vertices_2d.round().astype(int)
    inside = (on_hand >= 0).all(1) & (on_hand < (90, 70)).all(1)
    hit = changed[on_hand[inside, 1], on_hand[inside, 0]]
    assert changed.shape == (70, 90) and hit.mean() > 0.6 and changed.mean() < 0.9

    record = json.loads((tmp_path / "out" / "hand.json").read_text())
    shapes = {"vertices": (778, 3), "joints": (21, 3), "vertices_2d": (778, 2), "joints_2d": (21, 2)}
    shapes |= {"faces": (1538, 3), "K": (3, 3), "weak_perspective": (3,), "crop_box": (4,)}
    assert set(record) == {*shapes, "image", "image_size", "left", "intrinsics_assumed"}
    for key, shape in shapes.items():
        assert np.shape(record[key]) == shape
    np.testing.assert_allclose(record["vertices"], prediction.vertices, atol=1e-7)
    assert record["intrinsics_assumed"] is True and record["left"] is True
    assert record["image"] == str(tmp_path / "hand.png") and record["image_size"] == [90, 70]


def test_images_of_the_same_name_do_not_overwrite_each_other(tmp_path):
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu")
    out = tmp_path / "out"
    written = []
    for _ in range(2):  # the second time over, every image finds its own files again
        for name in ("a/hand.png", "b/hand.png", "a/hand.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            picture().save(tmp_path / name)
            written.append([path.name for path in write(predictor.predict(tmp_path / name), out, "hand")])
    assert written[:3] == written[3:]
    assert len({name for names in written for name in names}) == 12
    records = [json.loads((out / names[-1]).read_text())["image"] for names in written[:3]]
    assert records == [str(tmp_path / name) for name in ("a/hand.png", "b/hand.png", "a/hand.jpg")]
    (out / "other.json").write_text("not ours")
    assert write(predictor.predict(picture()), out, "other")[-1].name == "other-2.json"
    assert (out / "other.json").read_text() == "not ours"


@pytest.mark.parametrize("text", ['{"K": [[50,0,9],[0,60,8],[0,0,1]]}', "[[50,0,9],[0,60,8],[0,0,1]]"])
def test_intrinsics_files(tmp_path, text):
    path = tmp_path / "K.json"
    for content in (text, f"[{text}]" if text.startswith("[") else text):
        path.write_text(content)
        np.testing.assert_array_equal(read_intrinsics(path), [[50, 0, 9], [0, 60, 8], [0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "K.json: Expecting value"),
        ('{"focal": 3}', 'K.json: intrinsics: expected a key "K"'),
        ("[[1, 2], [3, 4]]", r"expected shape \(3, 3\), got \(2, 2\)"),
        ('[[1, 2, "x"]]', "expected 3 x 3 numbers"),
        ("[[-50,0,9],[0,60,8],[0,0,1]]", "positive fx and fy"),
        ("[[50,0,9],[0,60,8],[0,0,2]]", r"\[0, 0, 1\]"),
        ("[[50,0,NaN],[0,60,8],[0,0,1]]", "expected finite"),
    ],
)
def test_bad_intrinsics_are_named(tmp_path, text, message):
    path = tmp_path / "K.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_intrinsics(path)
    with pytest.raises(FileNotFoundError, match=r"intrinsics: .*none.json does not exist"):
        read_intrinsics(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ((1, 2, 3), "bbox: expected four finite numbers"),
        ((1, 2, math.nan, 3), "bbox: expected four finite numbers"),
        ((10, 10, 0, 5), "bbox: expected a positive width and height, got 0 x 5"),
        ((10, 10, 5, -5), "bbox: expected a positive width and height, got 5 x -5"),
        ((90, 10, 5, 5), "bbox: 90 10 5 5 lies outside the image of 90 x 70 pixels"),
        ((10, -9, 5, 5), "lies outside the image"),
    ],
)
def test_bad_boxes_are_named(bbox, message):
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu")
    with pytest.raises(ValueError, match=message):
        predictor.predict(picture(), bbox=bbox)


def test_bad_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text.png is not a readable image"):
        load_image(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"none.png does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"is not a readable image"):
        load_image(tmp_path)
    with pytest.raises(TypeError, match="image: expected an array of uint8, got float64"):
        load_image(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"image: expected an array \(H, W, 3\)"):
        load_image(np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(TypeError, match="image: expected a path, a PIL image or a numpy array, got int"):
        load_image(3)


def test_outputs_that_are_no_hand_are_refused():
    broken = KnownNetwork(known_hand() * np.nan, [8.0, 0, 0])
    with pytest.raises(FloatingPointError, match="image: the network's output is not finite"):
        Predictor(broken, "cpu").predict(picture())
    behind = KnownNetwork(known_hand(), [-8.0, 0, 0])
    with pytest.raises(FloatingPointError, match="no hand that fits in front of the camera"):
        Predictor(behind, "cpu").predict(picture())


def test_bad_arguments_are_named(tmp_path):
    network = KnownNetwork(known_hand(), [8.0, 0, 0])
    with pytest.raises(ValueError, match="device: expected a device of torch, got 'nothing'"):
        Predictor(network, "nothing")
    prediction = Predictor(network, "cpu").predict(picture())
    for stem in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="stem: expected a plain file name"):
            write(prediction, tmp_path, stem)
    with pytest.raises(ValueError, match=r"intrinsics: expected shape \(3, 3\), got \(3,\)"):
        Predictor(network, "cpu").predict(picture(), intrinsics=[1, 2, 3])
