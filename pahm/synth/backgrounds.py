"""Backgrounds of synthetic hands: procedural pictures, or crops of the user's own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pahm.data.open_image import read_image

Float = NDArray[np.float32]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

SKIN = np.array(
    [
        (240, 205, 185), (232, 188, 162), (219, 168, 136), (200, 146, 112),
        (176, 120, 86), (146, 94, 66), (112, 70, 50), (80, 50, 38), (58, 38, 32),
    ],
    np.float32,
) / 255  # fmt: skip
"""Skin tones from light to dark, sRGB in [0, 1]."""

_WOOD = np.array([(205, 170, 125), (160, 110, 70), (110, 72, 45), (222, 196, 160)], np.float32) / 255


def list_images(folder: Path) -> list[Path]:
    """List the image files in `folder` and its subfolders, recognised by suffix, in sorted order.

    Raises FileNotFoundError if the folder does not exist, ValueError if it has no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"backgrounds: {folder} is not a folder")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not found:
        raise ValueError(
            f"backgrounds: {folder} has no image; expected files ending in {', '.join(SUFFIXES)}"
        )
    return sorted(found)


def crop_background(rng: np.random.Generator, path: Path, size: int) -> Float:
    """A random square of the image at `path`, possibly mirrored, as (size, size, 3) sRGB in [0, 1]."""
    image = read_image(path)
    side = max(1, int(min(image.size) * rng.uniform(0.5, 1)))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2)
    pixels: Float = np.asarray(image, np.float32) / np.float32(255)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def next_background(rng: np.random.Generator, paths: list[Path], size: int) -> tuple[Float, tuple[str, ...]]:
    """Crop a random path, or the next readable one; also return a sentence for each unreadable path.

    Raises ValueError if none can be read.
    """
    first, sentences = int(rng.integers(len(paths))), list[str]()
    for step in range(len(paths)):
        try:
            return crop_background(rng, paths[(first + step) % len(paths)], size), tuple(sentences)
        except (ValueError, FileNotFoundError) as error:
            sentences.append(str(error))
    raise ValueError(f"backgrounds: none of {len(paths)} can be read: {sentences[0]}")


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Float:
    """Uniform noise on a grid of `cells`, interpolated to (size, size); values are about 0 to 1."""
    grid = rng.random((cells + 1, cells + 1), dtype=np.float32)
    filtering = Image.Resampling.BICUBIC if cells < size // 4 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(grid).resize((size, size), filtering))


def _octaves(rng: np.random.Generator, size: int) -> Float:
    """Fractal noise (size, size) stretched to 0 to 1."""
    first, roughness = int(rng.integers(1, 6)), rng.uniform(0.4, 0.8)
    total = np.zeros((size, size), np.float32)
    for octave in range(int(rng.integers(2, 6))):
        total += np.float32(roughness**octave) * smooth_noise(rng, size, first * 2**octave)
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def palette(rng: np.random.Generator, count: int) -> Float:
    """`count` matching colours (count, 3): vivid, muted, grey, wood or skin."""
    kind = rng.choice(5, p=(0.25, 0.35, 0.15, 0.13, 0.12))
    if kind <= 2:
        spread = (0.9, 0.35, 0.05)[kind]
        base = rng.uniform(0.05, 0.95, 3)
        grey = rng.uniform(0.05, 0.95, (count, 1))
        colours = grey + spread * (rng.uniform(0, 1, (count, 3)) - 0.5) + 0.3 * spread * (base - 0.5)
    else:
        table = _WOOD if kind == 3 else SKIN
        colours = table[rng.integers(len(table), size=count)] * rng.uniform(0.6, 1.15, (count, 1))
        colours += rng.normal(0, 0.04, (count, 3))
    return np.clip(colours, 0, 1).astype(np.float32)


def _ramp(value: Float, colours: Float) -> Float:
    """Colours (H, W, 3) for values (H, W) in [0, 1], interpolated along the palette."""
    stops = np.linspace(0, 1, len(colours), dtype=np.float32)
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, channel) for channel in colours.T], axis=1)
    return np.asarray(table, np.float32)[(np.clip(value, 0, 1) * 255).astype(np.uint8)]


def _grid(rng: np.random.Generator, size: int) -> tuple[Float, Float]:
    """Image coordinates from about -1 to 1, rotated by a random angle."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return axis * cosine + axis[:, None] * sine, axis[:, None] * cosine - axis * sine


def _pattern(rng: np.random.Generator, size: int) -> Float:
    """Stripes, checks, dots, wood grain or a gradient: (size, size) in [0, 1]."""
    u, v = _grid(rng, size)
    frequency = rng.uniform(4, 30)
    match int(rng.integers(5)):
        case 0:
            wave = np.sin(frequency * u)
        case 1:
            wave = np.sin(frequency * u) * np.sin(frequency * v)
        case 2:
            wave = np.cos(frequency * u) + np.cos(frequency * v) - np.float32(rng.uniform(0.5, 1.6))
        case 3:
            wave = np.sin(frequency * (u + np.float32(rng.uniform(0.1, 0.6)) * smooth_noise(rng, size, 5)))
        case _:
            return np.clip(0.5 + u * np.float32(rng.uniform(0.3, 0.7)) + 0 * v, 0, 1)
    sharpness = np.float32(rng.choice((0.5, 1.0, 8.0)))
    return np.clip(0.5 + sharpness * wave * 0.5, 0, 1)


def _layer(rng: np.random.Generator, size: int) -> Float:
    value = _octaves(rng, size) if rng.random() < 0.5 else _pattern(rng, size)
    return _ramp(value, palette(rng, int(rng.integers(2, 5))))


def _draw_shapes(rng: np.random.Generator, image: Image.Image) -> None:
    """Paint clutter: polygons, ellipses, boxes and thick lines."""
    size = image.width
    draw = ImageDraw.Draw(image)
    count = int(rng.integers(1, 14))
    colours = (palette(rng, count) * 255).astype(int)
    largest = rng.uniform(0.1, 0.6) * size
    for colour in colours:
        fill = tuple(colour.tolist())
        x, y = rng.uniform(0, size, 2)
        width, height = rng.uniform(0.2, 1, 2) * largest
        kind = int(rng.integers(4))
        if kind == 0:
            draw.ellipse((x - width, y - height, x + width, y + height), fill)
        elif kind == 1:
            draw.rectangle((x - width, y - height, x + width, y + height), fill)
        elif kind == 2:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
            draw.polygon([(x + width * np.cos(a), y + height * np.sin(a)) for a in angles], fill)
        else:
            end = tuple(rng.uniform(0, size, 2).tolist())
            draw.line([(x, y), end], fill, width=int(rng.uniform(0.01, 0.12) * size) + 1)


def procedural_background(rng: np.random.Generator, size: int) -> Float:
    """A random picture (size, size, 3), sRGB in [0, 1]: noise, patterns, surfaces and clutter."""
    pixels = _layer(rng, size)
    if rng.random() < 0.35:  # two surfaces, such as a table in front of a wall
        u, _ = _grid(rng, size)
        pixels = np.where((u < np.float32(rng.uniform(-0.6, 0.6)))[..., None], _layer(rng, size), pixels)
    image = Image.fromarray((pixels * 255).astype(np.uint8))
    if rng.random() < 0.6:
        _draw_shapes(rng, image)
    if rng.random() < 0.5:
        image = image.reduce(2).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.5)))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32) / np.float32(255)
    if rng.random() < 0.5:  # uneven light and surface grain
        strength = np.float32(rng.uniform(0.1, 0.6))
        shade = 1 + strength * (smooth_noise(rng, size, int(rng.choice((2, 3, 60, 110)))) - 0.5)
        pixels = np.clip(pixels * shade[..., None], 0, 1)
    return pixels
