import math

import numpy as np
import pytest
from known_hand import KnownNetwork, known_hand, picture

from pahm.data.camera import assumed_intrinsics
from pahm.infer.predictor import Predictor, pick_device


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

    width, height = pictures(1)[0].size
    monkeypatch.setattr("pahm.infer.reconstruct.MOST_PIXELS", width * height // 2)
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
