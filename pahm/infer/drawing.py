"""Pictures of reconstructed hands: overlays and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pahm.data.augment import crop_matrix, warp
from pahm.hand.topology import level_name
from pahm.synth.render import Light, render_mesh

if TYPE_CHECKING:
    from pahm.infer.predictor import HandPrediction

Array = npt.NDArray[np.float64]
Colour = tuple[float, float, float]

PREDICTED: Colour = (0.28, 0.52, 0.85)
TRUE: Colour = (0.42, 0.68, 0.30)
BASELINE: Colour = (0.64, 0.24, 0.62)  # unlike skin, as the other two
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
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
) -> Image.Image:
    """Draw a mesh over an image.

    image: PIL, converted to RGB. vertices: (N, 3), metres, camera space, in front of the camera. faces:
    (F, 3). K: (3, 3), pixels of the image. opacity: of the mesh, 0 to 1. colour: linear RGB. Returns an RGB
    image of the same size. Raises ValueError for an opacity out of range, and as `render_mesh`.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 to 1, got {opacity!r}")
    base = image.convert("RGB")
    scale = min(1.0, _LARGEST / max(base.size))
    width, height = (max(1, round(side * scale)) for side in base.size)
    box = np.diag([width / base.width, height / base.height, 1.0])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    camera = np.linalg.inv(half) @ box @ half @ np.asarray(K, np.float64)
    shaded, alpha = _shade(vertices, faces, camera, (height, width), colour)
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
    vertices: npt.ArrayLike, faces: npt.ArrayLike, K: npt.ArrayLike, size: tuple[int, int], colour: Colour
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Colours (H, W, 3), for the screen and not dimmed by partial cover, and cover (H, W) of a mesh."""
    rendering = render_mesh(vertices, faces, K, size, colours=colour, light=_STUDIO)
    linear = rendering.rgb / np.maximum(rendering.alpha, 1e-6)[..., None]
    return (255 * linear.clip(0, 1) ** (1 / 2.2)).round().astype(np.uint8), rendering.alpha


@dataclass(frozen=True)
class SheetRow:
    """One hand of a contact sheet."""

    prediction: HandPrediction
    truth: Array | None = None
    """`(778, 3)` true vertices in the camera space of `prediction.K`, where known."""
    label: str = ""
    """A line or two beside the row, such as a score."""


def contact_sheet(rows: Sequence[SheetRow], cell: int = 160) -> Image.Image:
    """A table of pictures, one row a hand: image, overlay, meshes M4, M3, M2, M1, ground truth, side views.

    The columns of the ground truth are there where any row has one. All pictures of a row show the crop that
    the network saw; the side views show the hand from its left. cell: side of a picture in pixels.
    Raises ValueError for no rows or cells below 32 pixels.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    if cell < 32:
        raise ValueError(f"cell: expected at least 32 pixels, got {cell}")
    with_truth = any(row.truth is not None for row in rows)
    titles = ["image", "overlay"]
    titles += [level_name(len(mesh)) for mesh in rows[0].prediction.meshes]
    titles += ["ground truth"] if with_truth else []
    titles += ["M1, side"]
    titles += ["truth, side"] if with_truth else []
    font = ImageFont.load_default(max(11, cell // 10))
    margin = max([0, *(_text_size(row.label, font)[0] + 12 for row in rows if row.label)])
    gap, header = 4, _text_size("M1", font)[1] + 14
    sheet = Image.new(
        "RGB", (margin + len(titles) * (cell + gap) + gap, header + len(rows) * (cell + gap)), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    lefts = [margin + gap + column * (cell + gap) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + cell / 2, header / 2), title, fill=_INK, font=font, anchor="mm")
    for index, row in enumerate(rows):
        top = header + index * (cell + gap)
        if row.label:
            draw.multiline_text((6, top + cell / 2), row.label, fill=_INK, font=font, anchor="lm")
        for left, picture in zip(lefts, _pictures(row, cell, with_truth), strict=True):
            if picture is not None:
                sheet.paste(picture, (left, top))
    return sheet


def _pictures(row: SheetRow, cell: int, with_truth: bool) -> list[Image.Image | None]:
    prediction = row.prediction
    matrix = crop_matrix(prediction.box, cell)
    camera = matrix @ prediction.K
    image = warp(prediction.image, matrix, cell)
    size = (cell, cell)
    side_camera = np.array([[camera[0, 0], 0, (cell - 1) / 2], [0, camera[0, 0], (cell - 1) / 2], [0, 0, 1]])
    pictures: list[Image.Image | None] = [
        image,
        overlay(image, prediction.vertices, prediction.faces, camera),
    ]
    finest = len(prediction.meshes) - 1
    for level, (mesh, faces) in enumerate(zip(prediction.meshes, prediction.level_faces, strict=True)):
        pictures.append(mesh_picture(mesh, faces, camera, size, flat=level < finest))
    side = mesh_picture(from_the_side(prediction.vertices), prediction.faces, side_camera, size)
    if not with_truth:
        return [*pictures, side]
    if row.truth is None:
        return [*pictures, None, side, None]
    truth = mesh_picture(row.truth, prediction.faces, camera, size, colour=TRUE)
    true_side = mesh_picture(from_the_side(row.truth), prediction.faces, side_camera, size, colour=TRUE)
    return [*pictures, truth, side, true_side]


def from_the_side(vertices: Array) -> Array:
    """Vertices (N, 3) turned a quarter about a vertical axis and moved sideways onto the optical axis."""
    middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    x, y, z = (vertices - middle).T
    return np.stack([-z, y, x + middle[2]], axis=1)


def _text_size(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> tuple[int, int]:
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox(
        (0, 0), text, font=font
    )
    return round(right - left), round(bottom - top)
