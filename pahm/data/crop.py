"""Reads images of hands and crops them for a network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pahm.data.augment import crop_matrix, warp
from pahm.data.camera import Array, assumed_intrinsics, check_intrinsics
from pahm.data.open_image import check_size, convert_image, read_image
from pahm.hand.left import checked_left
from pahm.text_files import shown

Box = tuple[float, float, float, float]
ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]

SMALLEST_BOX = 2  # pixels
LARGEST_BOX = 10  # times the image's longer side
HAND_SHARE = 0.6  # the hand's box spans about this fraction of a training image's side


class Request(NamedTuple):
    """An image to reconstruct a hand in; the arguments of `pahm.infer.predictor.Predictor.predict`."""

    image: ImageSource
    bbox: npt.ArrayLike | None = None
    intrinsics: npt.ArrayLike | None = None
    left: bool = False
    place: str = "image"
    """What to call an image that is not a file."""
    bone: float | None = None
    """Length in metres of the bone between joints 9 and 10, if known. It sets the hand's size."""
    upright: bool = True
    """Rotate the image according to its EXIF tag. Annotations of data sets refer to the stored pixels."""

    @property
    def name(self) -> str:
        """The image's name in error messages: its path as given, or `place`."""
        return os.fspath(self.image) if isinstance(self.image, (str, os.PathLike)) else self.place


class Crop(NamedTuple):
    """A request prepared for the network. The network sees right hands, so a left hand's crop is mirrored."""

    request: Request
    image: Image.Image
    """The whole image, RGB, not mirrored."""
    source: str | None
    """Absolute path of the image, if it was a file."""
    box: Box
    """The square crop in `image`."""
    K: Array
    """`(3, 3)` intrinsics of `image`."""
    pixels: Image.Image
    """The crop as the network sees it."""
    matrix: Array
    """`(3, 3)`, maps pixels of `image` to pixels of `pixels`."""

    @property
    def seen_K(self) -> Array:
        """`(3, 3)` intrinsics of the camera that sees, in `pixels`, what the network reconstructs: the hand,
        or the mirror image of a left hand.
        """
        x = -1.0 if self.request.left else 1.0
        return np.asarray(self.matrix @ self.K @ np.diag([x, 1.0, 1.0]))


def read_crop(request: Request, size: int, share: float) -> Crop | Exception:
    """Crop a request's image to `size` x `size` pixels, or return an error that names the image.

    share: the fraction of the training images' sides that the network sees, `ModelConfig.crop`.
    """
    try:
        request = request._replace(left=checked_left(request.left))
        image, source = load_image(request.image, request.upright)
        box = hand_box(image.size, request.bbox, share)
        if request.intrinsics is None:
            K = assumed_intrinsics(*image.size)
        else:
            K = check_intrinsics(request.intrinsics)
    except (FileNotFoundError, TypeError, ValueError) as error:
        return _named(error, request.name)
    matrix = crop_matrix(box, size, mirror=request.left)
    return Crop(request, image, source, box, K, warp(image, matrix, size), matrix)


def _named(error: Exception, name: str) -> Exception:
    """The error, with a message that starts with the image's name."""
    if str(error).startswith((f"{name}: ", f"image: {name} ")):
        return error
    kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
    named = kind(f"{name}: {error}")
    named.__cause__ = error
    return named


def load_image(image: ImageSource, upright: bool = True) -> tuple[Image.Image, str | None]:
    """Load an RGB image; also return its absolute path if it came from a file.

    upright: rotate the image according to its EXIF tag.

    Raises FileNotFoundError or ValueError as `pahm.data.open_image.read_image`, and TypeError or ValueError
    for an array of a wrong dtype or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, upright=upright), str(Path(image).resolve())
    if isinstance(image, Image.Image):
        return convert_image(image, "image", upright=upright), None
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a path, a PIL image or a numpy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected an array of uint8, got {image.dtype}")
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
        raise ValueError(f"image: expected an array (H, W, 3) or (H, W), got shape {image.shape}")
    height, width = image.shape[:2]
    check_size(width, height, "image")
    if image.ndim == 2:
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB"), None
    return Image.frombytes("RGB", (width, height), np.ascontiguousarray(image)), None


def hand_box(size: tuple[int, int], bbox: npt.ArrayLike | None, share: float = 1.0) -> Box:
    """The square crop (x, y, side, side) for a hand's box in an image of `size` (width, height).

    Without a box, the crop is centred in the image with `share` of its longer side, as in training.

    Raises ValueError for a box that is not four finite numbers with a positive size, is outside the image,
    or is far too small or too large to hold a hand.
    """
    width, height = size
    if bbox is None:
        side = share * max(width, height)
        return ((width - side) / 2, (height - side) / 2, side, side)
    try:
        values = np.asarray(bbox, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"bbox: expected four finite numbers X Y W H, got {shown(bbox)}") from error
    if values.shape not in ((4,), (1, 4)) or not np.isfinite(values).all():
        raise ValueError(f"bbox: expected four finite numbers X Y W H, got {shown(values.tolist())}")
    x, y, w, h = values.ravel().tolist()
    if w <= 0 or h <= 0:
        raise ValueError(f"bbox: expected a positive width and height, got {w:g} x {h:g}")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ValueError(f"bbox: {x:g} {y:g} {w:g} {h:g} lies outside the image of {width} x {height} pixels")
    if not SMALLEST_BOX <= max(w, h) <= LARGEST_BOX * max(width, height):
        raise ValueError(
            f"bbox: expected a longer side from {SMALLEST_BOX} pixels to {LARGEST_BOX} times the image's, "
            f"got {w:g} x {h:g} in {width} x {height} pixels"
        )
    side = share * max(w, h) / HAND_SHARE
    return (x + (w - side) / 2, y + (h - side) / 2, side, side)
