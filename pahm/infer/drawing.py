"""A mesh drawn over an image, on white and on nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from pahm.synth.render import Light, Scene, render_mesh

Colour = tuple[float, float, float]

PREDICTED: Colour = (0.28, 0.52, 0.85)
TRUE: Colour = (0.42, 0.68, 0.30)
BASELINE: Colour = (0.64, 0.24, 0.62)  # none of the three looks like skin
_PAPER = (255, 255, 255)
_STUDIO = Light(
    direction=(-0.5, -0.7, -0.9), colour=(0.8, 0.8, 0.8), ambient=(0.25, 0.25, 0.25), occlusion_rays=32
)
_LARGEST = 1280  # pixels; a larger image's overlay is rendered at this size and enlarged


def overlay(
    image: Image.Image,
    vertices: npt.ArrayLike,
    faces: npt.ArrayLike,
    K: npt.ArrayLike,
    *,
    opacity: float = 0.8,
    colour: Colour = PREDICTED,
    scene: Scene | None = None,
) -> Image.Image:
    """Draw a mesh over an image.

    image: PIL, converted to RGB. vertices: (N, 3), metres, camera space, in front of the camera. faces:
    (F, 3). K: (3, 3), pixels of the image. opacity: of the mesh, 0 to 1. colour: linear RGB. scene: of the
    mesh, if there is one already. Returns an RGB image of the same size. Raises ValueError for an opacity out
    of range, and as `render_mesh`.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 to 1, got {opacity!r}")
    base = image.convert("RGB")
    scale = min(1.0, _LARGEST / max(base.size))
    width, height = (max(1, round(side * scale)) for side in base.size)
    box = np.diag([width / base.width, height / base.height, 1.0])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    camera = np.linalg.inv(half) @ box @ half @ np.asarray(K, np.float64)
    shaded, alpha = _shade(vertices, faces, camera, (height, width), colour, scene)
    cover = Image.fromarray((255 * opacity * alpha).round().astype(np.uint8)).resize(base.size)
    base.paste(Image.fromarray(shaded).resize(base.size), mask=cover)
    return base


def mesh_picture(
    vertices: npt.ArrayLike,
    faces: npt.ArrayLike,
    K: npt.ArrayLike,
    size: tuple[int, int],
    *,
    flat: bool = False,
    colour: Colour = PREDICTED,
) -> Image.Image:
    """A shaded mesh on white, an RGB image of `size` (width, height); arguments as `mesh_cutout`."""
    cutout = mesh_cutout(vertices, faces, K, size, flat=flat, colour=colour)
    picture = Image.new("RGB", size, _PAPER)
    picture.paste(cutout, mask=cutout.getchannel("A"))
    return picture


def mesh_cutout(
    vertices: npt.ArrayLike,
    faces: npt.ArrayLike,
    K: npt.ArrayLike,
    size: tuple[int, int],
    *,
    flat: bool = False,
    colour: Colour = PREDICTED,
) -> Image.Image:
    """A shaded mesh on nothing, an RGBA image of `size` (width, height).

    vertices (N, 3), metres, camera space; faces (F, 3); K (3, 3), pixels. flat: shade each triangle evenly,
    which shows how coarse the mesh is. colour: linear RGB. Raises as `render_mesh`.
    """
    if flat:
        corners = np.asarray(vertices, np.float64)[np.asarray(faces)]
        vertices, faces = corners.reshape(-1, 3), np.arange(corners.size // 3).reshape(-1, 3)
    shaded, alpha = _shade(vertices, faces, K, (size[1], size[0]), colour)
    picture = Image.fromarray(shaded)
    picture.putalpha(Image.fromarray((255 * alpha).round().astype(np.uint8)))
    return picture


def _shade(
    vertices: npt.ArrayLike,
    faces: npt.ArrayLike,
    K: npt.ArrayLike,
    size: tuple[int, int],
    colour: Colour,
    scene: Scene | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Colours (H, W, 3), for the screen and not dimmed by partial cover, and cover (H, W) of a mesh."""
    rendering = render_mesh(vertices, faces, K, size, colours=colour, light=_STUDIO, scene=scene)
    linear = rendering.rgb / np.maximum(rendering.alpha, 1e-6)[..., None]
    return (255 * linear.clip(0, 1) ** (1 / 2.2)).round().astype(np.uint8), rendering.alpha
