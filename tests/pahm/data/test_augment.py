import math

import numpy as np
import pytest
import torch
from PIL import Image

from pahm.config import AugmentConfig
from pahm.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropTransform,
    colour_matrix,
    crop_matrix,
    normalise,
    warp,
)

GEOMETRY_ONLY = AugmentConfig(
    rotation=90, translation=0.1, scale=0.3, brightness=0, contrast=0, saturation=0, hue=0
)


def spot_image(points, size=(224, 224), sigma=2.5):
    """White Gaussian spots on black at the pixels `points`."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    picture = np.zeros((size[1], size[0]))
    for u, v in points:
        picture = np.maximum(picture, np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * sigma**2)))
    return Image.fromarray((255 * picture).round().astype(np.uint8))


def centroid(picture):
    """Centre of mass (u, v) of an array (H, W)."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    total = picture.sum()
    return np.array([(columns * picture).sum() / total, (rows * picture).sum() / total])


def sample_with_spot(point, size=(224, 224)):
    """A sample whose joint 9 projects on the only bright spot of the image."""
    rng = np.random.default_rng(3)
    intrinsics = np.array([[480.0, 0, 110.3], [0, 470.0, 113.9], [0, 0, 1]], np.float32)
    joints = rng.normal(0, 0.02, (21, 3)).astype(np.float32) + np.float32([0, 0, 0.7])
    joints[9] = 0.7 * np.linalg.solve(intrinsics, np.array([*point, 1.0]))
    return {
        "image": spot_image([point], size).convert("RGB"),
        "mask": spot_image([point], size, sigma=12),
        "K": intrinsics,
        "joints": joints,
        "vertices": np.tile(joints[9], (778, 1)),
        "scale": np.float32(0.03),
        "index": 7,
        "name": "spot",
    }


def brightness_map(image):
    """Undo the normalisation and return the red channel (S, S), as an array."""
    return (image[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]).numpy()


@pytest.mark.parametrize("size", [96, 128, 224, 300])
@pytest.mark.parametrize("seed", range(4))
def test_augmented_labels_project_on_the_same_image_content(size, seed):
    point = (100.4, 121.7)
    result = CropTransform(size, GEOMETRY_ONLY, seed)(sample_with_spot(point))
    picture = brightness_map(result["image"])
    expected = result["joints_2d"][9].numpy()
    row, column = (round(float(value)) for value in (expected[1], expected[0]))
    reach = max(4, size // 20)
    assert reach < min(row, column) and max(row, column) < size - reach
    window = picture[row - reach : row + reach + 1, column - reach : column + reach + 1]
    window = np.maximum(window - 0.02, 0)
    assert window.max() > 0.5
    np.testing.assert_allclose(
        centroid(window) + np.array([column - reach, row - reach]), expected, atol=0.02 + 0.001 * size
    )
    np.testing.assert_allclose(centroid(result["mask"][0].numpy()), expected, atol=0.6)
    projected = result["vertices"][0].double() @ result["K"].double().T
    np.testing.assert_allclose(projected[:2] / projected[2], expected, atol=1e-3)


def test_rotation_keeps_depth_and_distances_and_turns_the_labels():
    sample = sample_with_spot((112, 112))
    angle = math.radians(90) * np.random.default_rng((3, 2, 7)).uniform(-1, 1, 8)[0]
    result = CropTransform(128, AugmentConfig(90, 0, 0, 0, 0, 0, 0), seed=3)(sample, 2)
    x, y, z = sample["joints"].astype(np.float64).T
    cos, sin = math.cos(angle), math.sin(angle)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y, z])
    np.testing.assert_allclose(result["joints"].numpy(), turned.T, atol=1e-6)
    # K' X' = A K X with the crop matrix of the same angle, by hand.
    matrix = crop_matrix((0, 0, 224, 224), 128, rotation=angle)
    pixels = sample["joints"].astype(np.float64) @ (matrix @ sample["K"]).T
    np.testing.assert_allclose(result["joints_2d"].numpy(), pixels[:, :2] / pixels[:, 2:], atol=1e-3)


def test_quarter_turns_are_exact_on_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    box = (0, 0, 64, 64)
    np.testing.assert_array_equal(np.asarray(warp(image, crop_matrix(box, 64), 64)), pixels)
    clockwise = warp(image, crop_matrix(box, 64, rotation=math.pi / 2), 64)
    np.testing.assert_array_equal(np.asarray(clockwise), np.rot90(pixels, -1))
    mirrored = warp(image, crop_matrix(box, 64, mirror=True), 64)
    np.testing.assert_array_equal(np.asarray(mirrored), pixels[:, ::-1])


def test_evaluation_resizes_the_whole_image_by_the_half_pixel_rule():
    sample = sample_with_spot((112, 112))
    result = CropTransform(112)(sample)
    scale = 112 / 224
    expected = sample["K"].copy()
    expected[:2] *= scale
    expected[:2, 2] += 0.5 * scale - 0.5
    np.testing.assert_allclose(result["K"].numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(result["joints"].numpy(), sample["joints"])
    assert result["image"].shape == (3, 112, 112) and result["mask"].shape == (1, 112, 112)
    assert result["index"] == 7 and result["scale"] == pytest.approx(0.03)
    first, second = CropTransform(112)(sample), CropTransform(112)(sample)
    assert torch.equal(first["image"], second["image"])


def test_a_share_shows_the_middle_of_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    sample = {"image": Image.fromarray(pixels), "K": np.eye(3), "index": 0}
    result = CropTransform(64, share=0.8)(sample)
    assert torch.equal(result["image"], normalise(Image.fromarray(pixels[8:72, 8:72])))
    np.testing.assert_allclose(result["K"], [[1, 0, -8], [0, 1, -8], [0, 0, 1]])
    with pytest.raises(ValueError, match="share: expected a positive, finite fraction, got 0"):
        CropTransform(64, share=0)


def test_shrinking_does_not_alias():
    checker = np.indices((224, 224)).sum(0) % 2 * 255
    image = Image.fromarray(np.stack([checker] * 3, -1).astype(np.uint8))
    small = np.asarray(warp(image, crop_matrix((0, 0, 224, 224), 64, rotation=0.3), 64), float)[16:48, 16:48]
    assert abs(small.mean() - 127.5) < 3 and small.std() < 12


def test_outside_of_the_image_is_neutral():
    image = Image.new("RGB", (50, 50), (255, 255, 255))
    matrix = crop_matrix((-50, -50, 150, 150), 60)
    tensor = normalise(warp(image, matrix, 60))
    assert tensor[:, :15].abs().max() < 0.02
    assert np.asarray(warp(Image.new("L", (50, 50), 255), matrix, 60))[:15].max() == 0


def test_a_crop_is_a_function_of_seed_epoch_and_index():
    sample = sample_with_spot((112, 112))
    first = CropTransform(64, AugmentConfig(), seed=5)(sample, 1)
    torch.rand(3)
    again = CropTransform(64, AugmentConfig(), seed=5)(sample, 1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    others = [
        CropTransform(64, AugmentConfig(), seed=6)(sample, 1),
        CropTransform(64, AugmentConfig(), seed=5)(sample, 2),
        CropTransform(64, AugmentConfig(), seed=5)({**sample, "index": 8}, 1),
    ]
    for other in others:
        assert not torch.equal(first["K"], other["K"])
        assert not torch.equal(first["image"], other["image"])


def test_augmentation_stays_in_its_ranges():
    sample = sample_with_spot((112, 112))
    sample["K"] = np.array([[480.0, 0, 111.5], [0, 480.0, 111.5], [0, 0, 1]], np.float32)
    config = AugmentConfig(rotation=30, translation=0.1, scale=0.25)
    transform = CropTransform(224, config)
    focal, shift, angle = [], [], []
    for epoch in range(200):
        result = transform(sample, epoch)
        focal.append(result["K"][0, 0].item() / 480)
        shift.append(((result["K"][:2, 2] - 111.5) / 224).numpy())
        before, after = sample["joints"][9] - sample["joints"][0], result["joints"][9] - result["joints"][0]
        turn = math.atan2(after[1], after[0]) - math.atan2(before[1], before[0])
        angle.append(math.degrees((turn + math.pi) % (2 * math.pi) - math.pi))
    assert 0.75 <= min(focal) < 0.8 and 1.2 < max(focal) <= 1.25
    assert -30.01 <= min(angle) < -25 and 25 < max(angle) <= 30.01
    assert np.abs(np.linalg.norm(shift, axis=1)).max() <= 0.1 * math.sqrt(2) + 1e-6
    assert np.abs(shift).max() > 0.08


def test_colour_matrix_changes_one_thing_at_a_time():
    rgb = torch.rand(3, 500, generator=torch.Generator().manual_seed(0))
    luma = torch.tensor([0.299, 0.587, 0.114])

    def apply(*arguments):
        matrix = colour_matrix(*arguments)
        return matrix[:, :3] @ rgb + matrix[:, 3:]

    torch.testing.assert_close(apply(0.4, 1, 1, 1, 0), rgb)
    torch.testing.assert_close(apply(0.4, 1.3, 1, 1, 0), 1.3 * rgb)
    torch.testing.assert_close(apply(0.4, 1, 1.5, 1, 0), 0.4 + 1.5 * (rgb - 0.4))
    torch.testing.assert_close(apply(0.4, 1.3, 1.5, 1, 0), 1.3 * (0.4 + 1.5 * (rgb - 0.4)))
    torch.testing.assert_close(apply(0.4, 1, 1, 0, 0), (luma @ rgb).expand(3, -1))
    turned = apply(0.4, 1, 1, 1, 0.7)
    torch.testing.assert_close(luma @ turned, luma @ rgb, atol=1e-4, rtol=0)
    assert (turned - rgb).abs().max() > 0.1
    torch.testing.assert_close(apply(0.4, 1, 1, 1, 2 * math.pi), rgb, atol=1e-5, rtol=0)


def test_colour_is_clamped_before_normalising():
    image = Image.new("RGB", (8, 8), (200, 100, 10))
    bright = normalise(image, colour_matrix(0.4, 3.0, 1, 1, 0))
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(bright[:2, 0, 0], expected[:2])


def test_labels_that_are_absent_stay_absent():
    sample = sample_with_spot((112, 112))
    for key in ("joints", "vertices", "mask"):
        del sample[key]
    assert set(CropTransform(64)(sample)) == {"image", "K", "index", "scale"}


@pytest.mark.parametrize(
    "arguments", [{"rotation": -1}, {"scale": 1.0}, {"hue": math.nan}, {"translation": 2.0}]
)
def test_bad_ranges_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AugmentConfig(**arguments)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="size: expected at least 8 pixels, got 4"):
        CropTransform(4)
    with pytest.raises(ValueError, match="box: expected a square"):
        crop_matrix((0, 0, 10, 20), 64)


def test_a_crop_that_shrinks_is_that_of_the_whole_image_reduced():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for _ in range(40):
        side, size = rng.uniform(60, 900), int(rng.integers(8, 64))
        box = (*rng.uniform(-300, 400, 2), side, side)
        matrix = crop_matrix(box, size, rotation=rng.uniform(-3, 3), mirror=bool(rng.integers(2)))
        shrink = side / size
        if shrink <= 1.2:
            continue
        width, height = (math.ceil(length / shrink) for length in image.size)
        reduced = image.resize((width, height), Image.Resampling.HAMMING)
        ratio = np.array([width / 400, height / 300])
        to_reduced = np.array(
            [[ratio[0], 0, ratio[0] / 2 - 0.5], [0, ratio[1], ratio[1] / 2 - 0.5], [0, 0, 1]]
        )
        # The same crop of the reduced image, which shrinks no more.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        inverse = half @ to_reduced @ np.linalg.inv(matrix) @ np.linalg.inv(half)
        expected = reduced.transform(
            (size, size),
            Image.Transform.AFFINE,
            inverse[:2].round(9).ravel().tolist(),
            Image.Resampling.BILINEAR,
            fillcolor=tuple(round(255 * value) for value in IMAGENET_MEAN),
        )
        difference = np.asarray(warp(image, matrix, size), int) - np.asarray(expected, int)
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
