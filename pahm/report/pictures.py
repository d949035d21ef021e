"""Contact sheets: tables of pictures of reconstructed hands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pahm.data.augment import crop_matrix, warp
from pahm.hand.topology import level_name
from pahm.infer.drawing import TRUE, mesh_picture, overlay
from pahm.infer.hand import Hand

Array = npt.NDArray[np.float64]

_PAPER, _INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class SheetRow:
    """One hand of a contact sheet."""

    hand: Hand
    truth: Array | None = None
    """`(778, 3)` true vertices in the camera space of `hand.K`, if known."""
    label: str = ""
    """A line or two next to the row, such as a score."""


def contact_sheet(rows: Sequence[SheetRow], cell: int = 160) -> Image.Image:
    """Draw one row per hand: image, overlay, meshes M4, M3, M2, M1, ground truth, side views.

    The ground truth has columns if any row has one. All pictures of a row show the crop that the network saw.
    The side views show the hand from its left. cell: side of a picture in pixels.
    Raises ValueError for no rows or cells below 32 pixels.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    if cell < 32:
        raise ValueError(f"cell: expected at least 32 pixels, got {cell}")
    with_truth = any(row.truth is not None for row in rows)
    titles = ["image", "overlay"]
    titles += [level_name(len(mesh)) for mesh in rows[0].hand.meshes]
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
    hand = row.hand
    matrix = crop_matrix(hand.box, cell)
    camera = matrix @ hand.K
    image = warp(hand.image, matrix, cell)
    size = (cell, cell)
    side_camera = np.array([[camera[0, 0], 0, (cell - 1) / 2], [0, camera[0, 0], (cell - 1) / 2], [0, 0, 1]])
    pictures: list[Image.Image | None] = [
        image,
        overlay(image, hand.vertices, hand.faces, camera),
    ]
    finest = len(hand.meshes) - 1
    for level, (mesh, faces) in enumerate(zip(hand.meshes, hand.level_faces, strict=True)):
        pictures.append(mesh_picture(mesh, faces, camera, size, flat=level < finest))
    side = mesh_picture(from_the_side(hand.vertices), hand.faces, side_camera, size)
    if not with_truth:
        return [*pictures, side]
    if row.truth is None:
        return [*pictures, None, side, None]
    truth = mesh_picture(row.truth, hand.faces, camera, size, colour=TRUE)
    true_side = mesh_picture(from_the_side(row.truth), hand.faces, side_camera, size, colour=TRUE)
    return [*pictures, truth, side, true_side]


def from_the_side(vertices: Array) -> Array:
    """Turn vertices (N, 3) by a quarter about a vertical axis and move them sideways to the optical axis."""
    middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    x, y, z = (vertices - middle).T
    return np.stack([-z, y, x + middle[2]], axis=1)


def _text_size(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> tuple[int, int]:
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox(
        (0, 0), text, font=font
    )
    return round(right - left), round(bottom - top)
