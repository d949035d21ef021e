import numpy as np
import pytest
import torch
from known_hand import SIZE, picture
from PIL import Image, ImageOps

from pahm.data.augment import CropTransform, crop_matrix, normalise, warp
from pahm.data.crop import Request, hand_box, load_image, read_crop


def test_a_whole_image_is_cropped_as_those_of_the_training_are():
    image = picture(size=(90, 70))
    seen = CropTransform(SIZE, share=0.8)({"image": image, "K": np.eye(3), "index": 0})
    x, y, side, _ = hand_box(image.size, None, 0.8)
    assert (x, y, side) == pytest.approx((9, -1, 72))
    crop = normalise(warp(image, crop_matrix((x, y, side, side), SIZE), SIZE))
    torch.testing.assert_close(crop, seen["image"], atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("bbox", [None, (52.0, 7.5, 30.0, 25.0)])
def test_a_left_hands_crop_is_that_of_the_flipped_image(bbox):
    image, K = picture(size=(91, 70)), np.array([[120.0, 0.7, 27.3], [0, 118.0, 41.9], [0, 0, 1]])
    flipped_bbox = None if bbox is None else (91 - bbox[0] - bbox[2], *bbox[1:])
    flipped_K = np.array([[120.0, -0.7, 90 - 27.3], [0, 118.0, 41.9], [0, 0, 1]])
    left = read_crop(Request(image, bbox, K, left=True), SIZE, 1.0)
    right = read_crop(Request(ImageOps.mirror(image), flipped_bbox, flipped_K), SIZE, 1.0)
    assert np.abs(np.asarray(left.pixels, int) - np.asarray(right.pixels, int)).max() <= 1
    np.testing.assert_allclose(left.seen_K, right.seen_K, atol=1e-9)
    assert np.array_equal(left.image, image) and np.array_equal(left.K, K)
    # Its matrix goes from the image that was given to the crop.
    at = left.matrix @ [90 - 5.0, 8.0, 1.0]
    np.testing.assert_allclose(at, right.matrix @ [5.0, 8.0, 1.0], atol=1e-9)
