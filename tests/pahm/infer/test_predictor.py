import math

import numpy as np
import pytest
import torch
import trimesh
from known_hand import SIZE, TOPOLOGY, KnownNetwork, enclosed, known_hand, picture
from PIL import Image, ImageOps
from scipy.spatial.transform import Rotation

from pahm.data.augment import CropTransform, crop_matrix, normalise, warp
from pahm.data.camera import assumed_intrinsics, ray_rotation, read_intrinsics, solve_translation
from pahm.data.crop import hand_box, load_image
from pahm.infer.predictor import Predictor, pick_device


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


def test_a_whole_image_is_cropped_as_those_of_the_training_are():
    image = picture(size=(90, 70))
    seen = CropTransform(SIZE, share=0.8)({"image": image, "K": np.eye(3), "index": 0})
    x, y, side, _ = hand_box(image.size, None, 0.8)
    assert (x, y, side) == pytest.approx((9, -1, 72))
    crop = normalise(warp(image, crop_matrix((x, y, side, side), SIZE), SIZE))
    torch.testing.assert_close(crop, seen["image"], atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("text", ['{"K": [[50,0,9],[0,60,8],[0,0,1]]}', "[[50,0,9],[0,60,8],[0,0,1]]"])
def test_intrinsics_files(tmp_path, text):
    path = tmp_path / "K.json"
    for content in (text, f"[{text}]" if text.startswith("[") else text):
        path.write_text(content)
        np.testing.assert_array_equal(read_intrinsics(path), [[50, 0, 9], [0, 60, 8], [0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "K.json is not JSON that can be read: Expecting value"),
        ('{"focal": 3}', 'K.json: intrinsics: expected a key "K"'),
        ("[[1, 2], [3, 4]]", r"expected shape \(3, 3\), got \(2, 2\)"),
        ('[[1, 2, "x"]]', "expected 3 x 3 numbers"),
        (f"[[{'9' * 400},0,9],[0,60,8],[0,0,1]]", "expected 3 x 3 numbers"),
        ("[[-50,0,9],[0,60,8],[0,0,1]]", "positive fx and fy"),
        ("[[50,0,9],[0,60,8],[0,0,2]]", r"\[0, 0, 1\]"),
        ("[[50,0,NaN],[0,60,8],[0,0,1]]", "NaN is not a finite number"),
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


def test_bad_arguments_are_named():
    network = KnownNetwork(known_hand(), [8.0, 0, 0])
    with pytest.raises(ValueError, match="device: expected a device of torch, got 'nothing'"):
        Predictor(network, "nothing")
    with pytest.raises(ValueError, match=r"intrinsics: expected shape \(3, 3\), got \(3,\)"):
        Predictor(network, "cpu").predict(picture(), intrinsics=[1, 2, 3])


@pytest.mark.parametrize("device", ["cuda:99", "meta", "xla:99", "hpu"])
def test_a_device_that_does_not_work_here_is_named_in_one_line(device):
    with pytest.raises(ValueError, match=f"device: expected a device of torch, got '{device}' ") as caught:
        pick_device(device)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def pictures(count):
    return [picture(seed, (60 + 7 * seed, 50 + 3 * seed)) for seed in range(count)]


def same(one, other):
    np.testing.assert_allclose(one.vertices, other.vertices, atol=1e-6)
    np.testing.assert_allclose(one.vertices_2d, other.vertices_2d, atol=1e-4)
    np.testing.assert_array_equal(one.K, other.K)
    np.testing.assert_array_equal(one.faces, other.faces)
    assert (one.box, one.left, one.source) == (other.box, other.left, other.source)
    assert np.array_equal(one.image, other.image) and one.intrinsics_assumed == other.intrinsics_assumed


def test_many_images_give_what_each_gives_alone():
    network = KnownNetwork(known_hand(), [8.0, 0.01, -0.02], look=0.5)
    predictor = Predictor(network, "cpu")
    images = pictures(7)
    images[5] = np.asarray(images[5])
    boxes = [None, *((5.0 + i, 4.0, 30.0, 20.0 + i) for i in range(6))]
    cameras = [None if i % 3 == 0 else assumed_intrinsics(90 + i, 70) for i in range(7)]
    sides = [i % 2 == 1 for i in range(7)]
    alone = [
        predictor.predict(image, bbox=box, intrinsics=K, left=left)
        for image, box, K, left in zip(images, boxes, cameras, sides, strict=True)
    ]
    network.seen.clear()
    together = list(
        predictor.predict_many(images, bboxes=boxes, intrinsics=cameras, left=sides, batch_size=3)
    )
    assert [len(batch) for batch in network.seen] == [3, 3, 1]
    assert len({tuple(prediction.vertices[0]) for prediction in together}) == 7
    for one, other in zip(together, alone, strict=True):
        same(one, other)
    for one in predictor.predict_many(iter(images), intrinsics=cameras[1], left=True):
        assert one.left and not one.intrinsics_assumed
        np.testing.assert_array_equal(one.K, cameras[1])
    assert list(predictor.predict_many([])) == []


def test_images_are_read_no_further_ahead_than_a_batch():
    taken = []

    def stream():
        for image in pictures(9):
            taken.append(image)
            yield image

    results = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu").predict_many(stream(), batch_size=2)
    counts = [len(taken) for _ in results]
    assert counts == [4, 4, 6, 6, 8, 8, 9, 9, 9]


def test_of_large_images_fewer_are_held(monkeypatch):
    taken = []

    def stream():
        for image in pictures(5):
            taken.append(image)
            yield image

    monkeypatch.setattr("pahm.infer.reconstruct.MOST_PIXELS", pictures(1)[0].width * pictures(1)[0].height // 2)
    results = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu").predict_many(stream(), batch_size=2)
    assert [len(taken) for _ in results] == [3, 3, 4, 5, 5]


def test_a_bad_image_is_named_at_its_turn_and_the_rest_goes_on(tmp_path):
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0], look=0.5), "cpu")
    (tmp_path / "b").write_text("not an image")
    good = pictures(4)
    images = [good[0], tmp_path / "b", good[1], np.zeros((3, 3)), good[2], good[3]]
    boxes = [None, None, None, None, (500, 0, 3, 3), None]
    cameras = [None, None, None, None, None, np.zeros((2, 2))]
    messages = {
        1: f"image: {tmp_path / 'b'} is not a readable image",
        3: "images[3]: image: expected an array of uint8, got float64",
        4: "images[4]: bbox: 500 0 3 3 lies outside",
        5: "images[5]: intrinsics: expected shape (3, 3), got (2, 2)",
    }
    for size in (1, 2, 8):
        results = list(predictor.attempt_many(images, bboxes=boxes, intrinsics=cameras, batch_size=size))
        assert len(results) == 6
        for i, result in enumerate(results):
            if i in messages:
                assert isinstance(result, Exception) and str(result).startswith(messages[i])
        same(results[0], predictor.predict(good[0]))
        same(results[2], predictor.predict(good[1]))
    assert isinstance(results[3], TypeError)
    good[0].save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: bbox: 500 0 3 3 lies outside"):
        predictor.predict(tmp_path / "a.png", bbox=(500, 0, 3, 3))

    finished = []
    with pytest.raises(ValueError, match=r"b is not a readable image"):
        finished.extend(predictor.predict_many(iter(images)))
    assert len(finished) == 1


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


def test_bad_arguments_of_many_are_named():
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu")
    images = pictures(3)
    with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got 0"):
        predictor.predict_many(images, batch_size=0)
    with pytest.raises(TypeError, match="images: expected several images, got one str"):
        predictor.predict_many("hand.png")
    with pytest.raises(ValueError, match="bboxes: expected one for each of images, got 2"):
        list(predictor.predict_many(images, bboxes=[None] * 2))
    with pytest.raises(ValueError, match="left: expected one for each of the 3 images, got more"):
        list(predictor.predict_many(images, left=[True] * 4))
    with pytest.raises(ValueError, match="intrinsics: expected one for each of images, got 2"):
        list(predictor.predict_many(images, intrinsics=np.stack([np.eye(3)] * 2)))


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
