"""Decodes images from files, bytes and memory, in one place for the whole package."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Pillow's own limit, above which it warns."""
LONGEST_SIDE = 65_535
MOST_BYTES = 1 << 30
_ORIENTATION = 0x112  # EXIF


def read_image(path: str | os.PathLike[str], mode: str = "RGB", *, upright: bool = False) -> Image.Image:
    """Decode the image file at `path` into a PIL image of the given mode ("RGB" or "L").

    Args:
        upright: rotate the image according to its EXIF tag. Unreadable EXIF data is ignored.

    An animation gives its first frame. 16 bits per channel become 8. Raises FileNotFoundError, or ValueError
    naming the file if it is not a complete image of at most `MOST_PIXELS` pixels, or holds numbers of unknown
    brightness.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISREG((status := os.stat(path)).st_mode):
            raise ValueError(f"image: {name} is not a readable image (it is not a file)")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"image: {name} is not a readable image (it has {status.st_size} bytes)")
        content = Path(path).read_bytes()  # one read; Pillow itself makes about thirty
    except FileNotFoundError:
        raise FileNotFoundError(f"image: {name} does not exist") from None
    except OSError as error:
        raise ValueError(f"image: {name} is not a readable image ({error})") from error
    return decode_image(content, f"image: {name}", mode, upright=upright)


def decode_image(content: bytes, name: str, mode: str = "RGB", *, upright: bool = False) -> Image.Image:
    """Decode an image file's bytes as `read_image` does. ValueError's message starts with `name`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return convert_image(image, name, mode, upright=upright)
    except UnidentifiedImageError as error:  # its text has the buffer's address, which varies
        raise ValueError(f"{name} is not a readable image (its format is not known)") from error
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is not a readable image (it has more than {MOST_PIXELS} pixels)") from error
    except Exception as error:  # each Pillow reader has its own exceptions for damaged files
        raise ValueError(f"{name} is not a readable image ({_words(error)})") from error


class ImageError(ValueError):
    """An image was opened but cannot be used; the message names it."""


def convert_image(image: Image.Image, name: str, mode: str = "RGB", *, upright: bool = False) -> Image.Image:
    """Convert an opened image to `mode` as `read_image` does. ImageError's message starts with `name`."""
    check_size(*image.size, name)
    try:
        image.load()
        converted = _eight_bits(image, name).convert(mode)
    except ImageError:
        raise
    except Exception as error:  # as in `decode_image`
        raise ImageError(f"{name} is not a readable image ({_words(error)})") from error
    return _turned(image, converted) if upright else converted


def check_size(width: int, height: int, name: str) -> None:
    """Raise ImageError, whose message starts with `name`, for an image without pixels or with too many."""
    if width == 0 or height == 0:
        raise ImageError(f"{name} is not a readable image (it has {width} x {height} pixels)")
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        raise ImageError(
            f"{name} has {width} x {height} pixels, expected at most {LONGEST_SIDE} a side and {MOST_PIXELS}"
        )


def _turned(image: Image.Image, converted: Image.Image) -> Image.Image:
    """Rotate `converted` according to the EXIF tag of `image`."""
    tag = Image.Exif()
    try:
        tag[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # invalid EXIF data; viewers show such an image unrotated
        return converted
    converted.info["exif"] = tag.tobytes()
    return ImageOps.exif_transpose(converted)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """An image with 8 bits per channel. `convert` does not know the scale of other types."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image, np.float64)
        return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 1:
            return Image.fromarray((255 * values).round().astype(np.uint8))
        raise ImageError(f"{name} has values from {low:g} to {high:g}, expected a float image's from 0 to 1")
    if image.mode == "I":
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        raise ImageError(f"{name} has 32-bit values from {low} to {high}, expected 8 or 16 bits a channel")
    return image


def _words(error: Exception) -> str:
    """The message of an error from Pillow, with the error's type if it looks like a programming error."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, (OSError, ValueError, SyntaxError)) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")
