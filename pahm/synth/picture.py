"""One synthetic picture of a hand: skin, light, background, objects and camera defects."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pahm.data.freihand import Split
from pahm.synth.backgrounds import next_background, procedural_background
from pahm.synth.props import hand_and_forearm, join, occluder
from pahm.synth.render import Light, Rendering, render_mesh
from pahm.synth.sampling import Annotation, generators, sample_annotation, shipped_hand
from pahm.synth.skin import skin_colours, skin_tone

Float = NDArray[np.float32]

_OCCLUDED = 0.25  # share of the pictures with an object
_NOISE_SIDE = 512


class Picture(NamedTuple):
    """A picture ready to be written to disk."""

    image: Image.Image
    """RGB, `size` x `size`."""
    mask: Image.Image
    """L, 255 where a pixel's centre shows the hand itself, not the forearm or an object."""
    quality: int
    """JPEG quality of the image."""
    unreadable: tuple[str, ...] = ()
    """A sentence for each background that was chosen but cannot be read."""


def sample_light(rng: np.random.Generator) -> Light:
    """A warm to cool key light from the camera's side of the hand, and a softer ambient light."""
    direction = rng.normal(0, 1, 3)
    direction[2] = -abs(direction[2]) - 0.15
    direction[1] -= 0.4  # more often from above
    warmth = rng.normal(0, 0.08)
    tint = np.array((1 + warmth, 1, 1 - warmth))
    ambient = rng.uniform(0.25, 0.65)
    x, y, z = direction / np.linalg.norm(direction)
    key = tint * (1.05 - ambient) * rng.uniform(0.9, 1.3)
    fill = np.array((1 - warmth / 2, 1, 1 + warmth / 2)) * ambient
    return Light(
        direction=(float(x), float(y), float(z)),
        colour=(float(key[0]), float(key[1]), float(key[2])),
        ambient=(float(fill[0]), float(fill[1]), float(fill[2])),
        wrap=rng.uniform(0.1, 0.45),
        specular=rng.uniform(0, 0.12),
        shininess=rng.uniform(6, 30),
        shadow=rng.uniform(0.3, 0.9),
        occlusion_rays=18,
    )


@cache
def _noise() -> Float:
    """A fixed field of standard normal noise. Each picture uses a random part of it."""
    return np.random.default_rng(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), np.float32)


def _noise_patch(rng: np.random.Generator, size: int) -> Float:
    field = _noise()
    if size > _NOISE_SIDE:
        return rng.standard_normal((size, size, 3), np.float32)
    top, left = rng.integers(0, _NOISE_SIDE - size + 1, 2)
    patch = field[top : top + size, left : left + size]
    flip = int(rng.integers(4))
    return patch[:: 1 - 2 * (flip & 1), :: 1 - (flip & 2)]


def _compose(rng: np.random.Generator, rendering: Rendering, background: Float) -> Float:
    """Expose the rendering so that skin is neither too dark nor burnt out; paste it on the background."""
    covered = rendering.alpha > 0
    alpha = rendering.alpha[covered][:, None]
    radiance = rendering.rgb[covered]
    bright = max(float((radiance.mean(axis=1)).mean()), 1e-3)
    exposure = np.clip(
        0.4 * (bright / 0.4) ** rng.uniform(0.4, 0.75) / bright * rng.uniform(0.8, 1.2), 0.5, 4
    )
    shown = np.clip(radiance / alpha * np.float32(exposure), 0, 1) ** np.float32(1 / 2.2)
    pixels = background.copy()
    pixels[covered] += alpha * (shown - pixels[covered])
    return pixels


def _degrade(rng: np.random.Generator, pixels: Float) -> Image.Image:
    """Add a camera's defects: blur, lost resolution, noise, gain, gamma and colour cast."""
    size = len(pixels)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
    blur = rng.random()
    if blur < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0) * size / 224))
    elif blur < 0.6:
        small = max(1, int(size * rng.uniform(0.55, 0.9)))
        image = image.resize((small, small), Image.Resampling.BILINEAR)
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    level = np.arange(256) / 255
    gain = rng.normal(1, 0.05, 3) * rng.uniform(0.88, 1.1)
    curve = np.clip(gain[:, None] * level ** rng.uniform(0.85, 1.2) + rng.normal(0, 0.01, (3, 1)), 0, 1)
    image = image.point((curve * 255 + 0.5).astype(int).ravel().tolist())
    sigma = np.float32(255 * rng.uniform(0, 0.03) * (rng.random() < 0.8))
    if sigma == 0:
        return image
    patch = _noise_patch(rng, size)
    noisy = np.asarray(image) + sigma * (0.6 * patch + 0.6 * patch[..., :1])
    return Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))


def draw(
    seed: int,
    split: Split,
    index: int,
    size: int = 224,
    backgrounds: list[Path] | None = None,
    annotation: Annotation | None = None,
) -> Picture:
    """Draw picture `index` of `split` for the data set of `seed`, `size` pixels wide and high.

    `backgrounds` are image files to crop backgrounds from; None draws procedural ones. Pass `annotation` to
    avoid sampling it again. The annotations depend on neither. An unreadable background is replaced by the
    next one. Raises what `sample_annotation` raises, and ValueError if no background can be read.
    """
    _, rng = generators(seed, split, index)
    if annotation is None:
        annotation = sample_annotation(seed, split, index, size)
    hand_faces = len(shipped_hand().faces)
    parts = [hand_and_forearm(rng, annotation, skin_colours(rng, skin_tone(rng)))]
    thing = occluder(rng, annotation, size) if rng.random() < _OCCLUDED else None
    vertices, faces, colours = join(parts if thing is None else [*parts, thing])
    rendering = render_mesh(
        vertices, faces, annotation.K, (size, size), colours=colours, light=sample_light(rng)
    )
    if backgrounds:
        background, unreadable = next_background(rng, backgrounds, size)
    else:
        unreadable = ()
        background = procedural_background(rng, size)
    image = _degrade(rng, _compose(rng, rendering, background))
    seen = rendering.mask & (rendering.faces < hand_faces)
    mask = Image.fromarray(seen.astype(np.uint8) * np.uint8(255))
    return Picture(image, mask, int(rng.integers(70, 96)), unreadable)
