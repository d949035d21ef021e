"""Crops of hand images: geometry and colour, and their effect on the intrinsics and the 3D labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pahm.config import AugmentConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)


def _tensor(values: object) -> Tensor:
    """A float32 tensor on the CPU, whatever torch's defaults are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


_MEAN, _DEVIATION = (_tensor(values)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_TO_GREY = np.tile(_RGB_TO_YIQ[0], (3, 1))
_TO_CORNER = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
_TO_CENTRE = np.array([[1.0, 0.0, -0.5], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])
_MAX_SHRINK = 1.2  # input pixels per output pixel; above this, bilinear sampling alone would alias

Matrix = npt.NDArray[np.float64]


def crop_matrix(box: Sequence[float], size: int, *, rotation: float = 0.0, mirror: bool = False) -> Matrix:
    """The matrix (3, 3) that maps pixels of an image to pixels of a square crop of it.

    box: `(x, y, width, height)` of the square region in pixels, measured from the outer corner of the
    top-left pixel as image libraries do: `(0, 0, W, H)` is the whole image. Width equals height. size: the
    crop's side in pixels. rotation: radians about the box's centre, x towards y (clockwise on the screen).
    mirror: flip left and right afterwards. The matrix acts on homogeneous pixels `(u, v, 1)`. Input and
    output are measured from the centre of the top-left pixel: u' = s (u - x + 0.5) - 0.5.
    """
    x, y, width, height = (float(value) for value in box)
    scale = size / width
    if not math.isclose(width, height, rel_tol=1e-6):
        raise ValueError(f"box: expected a square, got width {width} and height {height}")
    cos, sin = scale * math.cos(rotation), scale * math.sin(rotation)
    # The box's centre maps to the crop's centre, both in pixel-centre coordinates.
    u, v, centre = x + width / 2 - 0.5, y + height / 2 - 0.5, (size - 1) / 2
    matrix = np.array(
        [[cos, -sin, centre - cos * u + sin * v], [sin, cos, centre - sin * u - cos * v], [0.0, 0.0, 1.0]]
    )
    if mirror:
        matrix = np.array([[-1.0, 0.0, size - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ matrix
    return matrix


def warp(image: Image.Image, matrix: Matrix, size: int) -> Image.Image:
    """Resample a PIL image ("RGB" or "L") into a `size` x `size` crop.

    matrix: (3, 3), affine, image pixels to crop pixels, as from `crop_matrix`. Sampling is bilinear. If the
    crop shrinks the image, the image is first reduced with an antialiasing filter. Outside the image, an RGB
    crop has ImageNet's mean colour (zero once normalised) and an L crop has 0.
    """
    inverse = _TO_CORNER @ np.linalg.inv(matrix) @ _TO_CENTRE  # Pillow measures from pixel corners
    shrink = math.sqrt(abs(inverse[0, 0] * inverse[1, 1] - inverse[0, 1] * inverse[1, 0]))
    if shrink > _MAX_SHRINK:
        image, inverse = _reduce(image, inverse, size, shrink)
    # Rounding errors of a few 1e-16 would put the border pixels of an exact copy outside the image.
    coefficients = inverse[:2].round(9).ravel().tolist()
    fill = _FILL if image.mode == "RGB" else 0
    return image.transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=fill
    )


def _reduce(image: Image.Image, inverse: Matrix, size: int, shrink: float) -> tuple[Image.Image, Matrix]:
    """An image `shrink` times smaller, or the small part of it that a crop sees, and `inverse` for it.

    inverse: (3, 3), pixels of the crop to pixels of the image, both from the corner of the top-left pixel.
    """
    # Hamming's filter is as cheap as the bilinear one, and sharper.
    reduced = [max(1, math.ceil(side / shrink)) for side in image.size]
    ratio = np.array([reduced[0] / image.width, reduced[1] / image.height, 1.0])
    inverse = ratio[:, None] * inverse
    seen = inverse[:2, :2] @ (np.array([[0, size, 0, size], [0, 0, size, size]])) + inverse[:2, 2:]
    # Bilinear sampling looks at the neighbours of what is seen. An image that is not seen gives one pixel.
    first = np.clip(np.floor(seen.min(1)) - 1, 0, np.subtract(reduced, 1)).astype(int)
    last = np.clip(np.ceil(seen.max(1)) + 1, first + 1, reduced).astype(int)
    if 2 * np.prod(last - first) > np.prod(reduced):  # little to gain, and Pillow rounds the edges of a box
        return image.resize((reduced[0], reduced[1]), Image.Resampling.HAMMING), inverse
    box = (*(first / ratio[:2]).tolist(), *np.minimum(last / ratio[:2], image.size).tolist())
    inverse[:2, 2] -= first
    return image.resize(tuple((last - first).tolist()), Image.Resampling.HAMMING, box), inverse


def colour_matrix(mean: float, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Affine map (3, 4) of RGB in [0, 1] that changes brightness, contrast, saturation and hue at once.

    mean: the image's mean luminance, which contrast leaves unchanged. brightness, contrast, saturation:
    factors, 1 for no change. hue: radians, a rotation about the grey axis of YIQ. All four are affine, so
    their product needs one pass over the pixels, a fifth of the time of torchvision's four functions.
    """
    cos, sin = math.cos(hue), math.sin(hue)
    turn = np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    linear = _YIQ_TO_RGB @ turn @ _RGB_TO_YIQ
    linear = saturation * linear + (1 - saturation) * (_TO_GREY @ linear)
    offset = np.full((3, 1), (1 - contrast) * mean * brightness)
    return torch.from_numpy(np.hstack([contrast * brightness * linear, offset]).astype(np.float32))


def normalise(image: Image.Image, colour: Tensor | None = None) -> Tensor:
    """Turn an RGB image into a float32 tensor (3, H, W) normalised with ImageNet's mean and deviation.

    colour: optional (3, 4) map from `colour_matrix`. Its result is clamped to [0, 1] before normalising.
    """
    if colour is None:
        return normalise_all([image])[0]
    pixels = torch.from_numpy(np.array(image)).reshape(-1, 3).t().to(torch.float32).div_(255.0)
    pixels = torch.addmm(colour[:, 3:], colour[:, :3], pixels).clamp_(0.0, 1.0)
    return pixels.sub_(_MEAN).div_(_DEVIATION).reshape(3, image.height, image.width)


def normalise_all(images: Sequence[Image.Image]) -> Tensor:
    """Turn RGB images of one size into a float32 tensor (B, 3, H, W) in channels_last, as `normalise`."""
    # In numpy: after a loop of PyTorch its idle threads keep a core busy that the network needs.
    pixels = np.stack([np.asarray(image) for image in images])
    factors, offsets = _of_rows(pixels.shape[2])
    rows = pixels.reshape(*pixels.shape[:2], -1) * factors
    rows += offsets
    return torch.from_numpy(rows.reshape(pixels.shape)).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _of_rows(width: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """By what to multiply each byte of a row of RGB pixels, and what to add to it, to normalise it.

    A broadcast over 3 channels has a short innermost loop; one over a row has a long one.
    """
    mean, deviation = (np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return np.tile(1 / (255 * deviation), width), np.tile(-mean / deviation, width)


class CropTransform:
    """Turns a sample of `FreiHand` into the tensors for training a network.

    size: the crop's side S in pixels. augment: ranges of the random changes, or None for the square about the
    image's centre. seed: the random changes of a sample depend only on the seed, the epoch of the call and
    the sample's index, not on the process or the order of calls. share: the square's side as a fraction of
    the image's longer side (`ModelConfig.crop`); 1 shows the whole image.

    Call it with a sample (and an epoch, 0 by default). It returns a dict: `image` (3, S, S) float32, ImageNet
    normalised; `mask` (1, S, S) float32, 0 or 1; `K` (3, 3) float32, maps the camera space of the labels to
    crop pixels; `joints` (21, 3) and `vertices` (778, 3) float32, metres in the camera space after the
    in-plane rotation; `joints_2d` (21, 2) float32, pixels of the crop; `scale` () float32, metres; `index` ()
    int64. Keys missing from the sample are missing here. A maps image pixels to crop pixels and rotates the
    image by R_z. Then X' = R_z X and K' = A K R_z^T, so K' X' ~ A K X holds exactly.

    Raises ValueError for a size below 8 pixels or a share that is not positive and finite.
    """

    def __init__(
        self, size: int, augment: AugmentConfig | None = None, seed: int = 0, share: float = 1.0
    ) -> None:
        if size < 8:
            raise ValueError(f"size: expected at least 8 pixels, got {size}")
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"share: expected a positive, finite fraction, got {share}")
        self.size = size
        self.share = share
        self.augment = augment
        self.seed = seed

    def __call__(self, sample: dict[str, Any], epoch: int = 0) -> dict[str, Tensor]:
        image: Image.Image = sample["image"]
        width, height = image.size
        side, centre_x, centre_y = self.share * max(width, height), width / 2, height / 2
        angle, colour = 0.0, None
        draws: list[float] = []
        if self.augment is not None:
            config = self.augment
            generator = np.random.default_rng((self.seed, epoch, int(sample["index"])))
            draws = generator.uniform(-1, 1, 8).tolist()
            angle = math.radians(config.rotation) * draws[0]
            side /= 1 + config.scale * draws[1]
            centre_x += config.translation * side * draws[2]
            centre_y += config.translation * side * draws[3]
        box = (centre_x - side / 2, centre_y - side / 2, side, side)
        matrix = crop_matrix(box, self.size, rotation=angle)
        crop = warp(image, matrix, self.size)
        if self.augment is not None:
            luminance = float(np.asarray(crop.convert("L").reduce(4)).mean()) / 255
            colour = colour_matrix(
                luminance,
                1 + config.brightness * draws[4],
                1 + config.contrast * draws[5],
                1 + config.saturation * draws[6],
                math.radians(config.hue) * draws[7],
            )
        cos, sin = math.cos(angle), math.sin(angle)
        rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        intrinsics = matrix @ np.asarray(sample["K"], np.float64) @ rotation.T
        result = {
            "image": normalise(crop, colour),
            "K": torch.from_numpy(intrinsics.astype(np.float32)),
            "index": torch.tensor(sample["index"], device="cpu"),
        }
        if "mask" in sample:
            mask = np.array(warp(sample["mask"], matrix, self.size)) > 127
            result["mask"] = torch.from_numpy(mask).to(torch.float32)[None]
        if "scale" in sample:
            result["scale"] = _tensor(float(sample["scale"]))
        for key in ("joints", "vertices"):
            if key in sample:
                points = np.asarray(sample[key], np.float64) @ rotation.T
                result[key] = torch.from_numpy(points.astype(np.float32))
                if key == "joints":
                    projected = points @ intrinsics.T
                    result["joints_2d"] = torch.from_numpy(
                        (projected[:, :2] / projected[:, 2:]).astype(np.float32)
                    )
        return result
