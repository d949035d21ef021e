"""One row of the page: a hand's pictures, and its meshes for the viewer."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from pahm.data.augment import crop_matrix, warp
from pahm.hand.topology import level_name
from pahm.infer.drawing import BASELINE, PREDICTED, TRUE, Colour, mesh_cutout, overlay
from pahm.infer.hand import Hand
from pahm.infer.predictor import Predictor
from pahm.model.network import HandNet
from pahm.report.pictures import from_the_side
from pahm.score.metrics import align_with_scale

Array = npt.NDArray[np.float64]

CELL = 192
"""Side of a picture in pixels."""
_STEP = 5e-5  # metres; the viewer's coordinates are integer multiples of it
_ERROR_STEP = 1e-5


@dataclass
class Picture:
    """A picture of a hand and the viewer's mesh for it."""

    title: str
    """The title of its column."""
    source: str
    """A data URI; empty if there is no picture."""
    alt: str
    mesh: str = ""
    """Key of one of the row's meshes."""


@dataclass
class Row:
    """A row of the page: one hand."""

    index: int
    pictures: list[Picture] = field(default_factory=list)
    meshes: list[dict[str, Any]] = field(default_factory=list)
    """Each has `key`, `label`, `count` (vertices), `points` and `errors` (see `Meshes`), and the `mean` and
    `worst` error in mm, None for the truth.
    """


class Meshes:
    """Meshes of one hand in the viewer's format: aligned with the truth, with their errors.

    truth: (778, 3), metres, camera space. `points` are base64 of int16 (N, 3), twentieths of a millimetre
    from the truth's centre; `errors` are base64 of uint16 (N,), hundredths of a millimetre.
    """

    def __init__(self, truth: Array, network: HandNet) -> None:
        self.truth, self.hierarchy = truth, network.topology.hierarchy
        self.centre = truth.mean(0)
        self.found: list[dict[str, Any]] = []

    def add(self, key: str, label: str, mesh: Array) -> None:
        """Add a prediction (N, 3) in metres; N is the number of vertices of a level of the hierarchy."""
        truth = self.truth[self.hierarchy.selection(self.hierarchy.sizes.index(len(mesh)))]
        aligned = align_with_scale(torch.from_numpy(mesh)[None], torch.from_numpy(truth)[None])[0].numpy()
        errors = np.linalg.norm(aligned - truth, axis=1)
        self._append(key, label, aligned, errors)

    def add_truth(self) -> None:
        """Add the truth itself, without errors."""
        self._append("truth", "truth", self.truth, None)

    def _append(self, key: str, label: str, mesh: Array, errors: Array | None) -> None:
        points = ((mesh - self.centre) / _STEP).round().clip(-32768, 32767).astype("<i2")
        entry: dict[str, Any] = {"key": key, "label": label, "count": len(mesh), "points": _base64(points)}
        entry |= {"errors": "", "mean": None, "worst": None}
        if errors is not None:
            steps = (errors / _ERROR_STEP).round().clip(0, 65535).astype("<u2")
            entry |= {"errors": _base64(steps), "mean": 1000 * errors.mean(), "worst": 1000 * errors.max()}
        self.found.append(entry)


class Photographer:
    """Makes the page's rows: hands from our network, and from the baseline if there is one."""

    def __init__(self, ours: Predictor, baseline: Predictor | None) -> None:
        self.ours, self.baseline = ours, baseline
        network: HandNet = ours.network  # type: ignore[assignment]
        self.network = network

    def row(self, sample: dict[str, Any], kind: str) -> Row:
        """A row of the page for an annotated sample of `FreiHand`; kind: "grid" or "failure"."""
        return self._grid_row(sample) if kind == "grid" else self._failure_row(sample)

    def _grid_row(self, sample: dict[str, Any]) -> Row:
        """Figure 3: input, overlays, meshes from coarse to fine, truth."""
        row, view = self._begin(sample)
        hand = view.hands.get("ours")
        titles: list[str] = []
        for i, mesh in enumerate(hand.meshes if hand else []):
            titles.append(level_name(len(mesh)))
            again = titles.count(titles[-1])
            title = titles[-1] + (f", {again}" if again > 1 else "")
            row.pictures.append(view.mesh(mesh, title, f"mesh {title} of ours", f"ours-{i}"))
        row.pictures.append(view.truth())
        return row

    def _failure_row(self, sample: dict[str, Any]) -> Row:
        """Figure 4: input, overlays, our mesh and the truth from the camera and from the side."""
        row, view = self._begin(sample)
        hand = view.hands.get("ours")
        if hand:
            last = f"ours-{len(hand.meshes) - 1}"
            row.pictures.append(view.mesh(hand.vertices, "our mesh", "mesh of ours", last))
        row.pictures.append(view.truth())
        if hand:
            row.pictures.append(view.mesh(hand.vertices, "our mesh, side", "mesh of ours", last, side=True))
        row.pictures.append(view.truth(side=True))
        return row

    def _begin(self, sample: dict[str, Any]) -> tuple[Row, _View]:
        row, view = Row(int(sample["index"])), _View(sample, self.network)
        for name, predictor in (("baseline", self.baseline), ("ours", self.ours)):
            if predictor is not None:
                try:
                    view.hands[name] = predictor.predict(sample["image"], intrinsics=sample["K"])
                except FloatingPointError:
                    # The network is untrained; `_overlays` says so instead of a picture.
                    continue
        row.pictures = [view.input()]
        row.pictures += self._overlays(view)
        meshes = Meshes(view.true, self.network)
        if "ours" in view.hands:
            for i, mesh in reversed(list(enumerate(view.hands["ours"].meshes))):
                meshes.add(f"ours-{i}", f"ours, {level_name(len(mesh))}", mesh)
        if "baseline" in view.hands:
            meshes.add("baseline", "baseline", view.hands["baseline"].vertices)
        meshes.add_truth()
        row.meshes = meshes.found
        return row, view

    def _overlays(self, view: _View) -> list[Picture]:
        wanted = {"baseline": (self.baseline, BASELINE), "ours": (self.ours, PREDICTED)}
        found = []
        for name, (predictor, colour) in wanted.items():
            if name in view.hands:
                found.append(view.overlay(view.hands[name], name, colour))
            elif predictor is not None:
                found.append(Picture(name, "", "no hand that fits in front of the camera"))
        return found


class _View:
    """A sample's whole image, as the background and the camera of its pictures."""

    def __init__(self, sample: dict[str, Any], network: HandNet) -> None:
        image = sample["image"]
        side = float(max(image.size))
        box = ((image.width - side) / 2, (image.height - side) / 2, side, side)
        matrix = crop_matrix(box, CELL)
        self.index = int(sample["index"])
        self.image = warp(image, matrix, CELL)
        self.camera: Array = matrix @ np.asarray(sample["K"], np.float64)
        self.true: Array = np.asarray(sample["vertices"], np.float64)
        self.share = network.config.crop
        self.hierarchy = network.topology.hierarchy
        self.hands: dict[str, Hand] = {}

    def input(self) -> Picture:
        """The image, with an outline of the square that the network sees unless it is the whole image."""
        drawn, what = self.image, f"evaluation image {self.index}"
        if self.share < 1:
            drawn, what = drawn.copy(), f"{what}, the square that the network sees outlined"
            first, last = (round(CELL * (1 + sign * self.share) / 2) for sign in (-1, 1))
            draw = ImageDraw.Draw(drawn)
            # A black line around a white one: one of them shows on any background.
            draw.rectangle((first - 1, first - 1, last, last), outline="black")
            draw.rectangle((first, first, last - 1, last - 1), outline="white")
        return Picture("input", data_uri(drawn), what)

    def overlay(self, hand: Hand, name: str, colour: Colour) -> Picture:
        faces = self.hierarchy.faces[0]
        drawn = overlay(self.image, hand.vertices, faces, self.camera, colour=colour)
        key = f"ours-{len(hand.meshes) - 1}" if name == "ours" else name
        return Picture(name, data_uri(drawn), f"image {self.index} with the mesh of {name} over it", key)

    def mesh(self, mesh: Array, title: str, what: str, key: str, *, side: bool = False) -> Picture:
        return self._draw(mesh, title, what, key, PREDICTED, side)

    def truth(self, *, side: bool = False) -> Picture:
        return self._draw(self.true, "truth, side" if side else "truth", "true mesh", "truth", TRUE, side)

    def _draw(self, mesh: Array, title: str, what: str, key: str, colour: Colour, side: bool) -> Picture:
        level = self.hierarchy.sizes.index(len(mesh))
        camera = self.camera
        if side:
            middle = (CELL - 1) / 2
            camera = np.array([[camera[0, 0], 0, middle], [0, camera[0, 0], middle], [0, 0, 1]])
            mesh = from_the_side(mesh)
        drawn = mesh_cutout(
            mesh, self.hierarchy.faces[level], camera, (CELL, CELL), flat=level > 0, colour=colour
        )
        where = " from the side" if side else ""
        return Picture(title, data_uri(drawn), f"{what} of image {self.index}{where}", key)


def data_uri(picture: Image.Image) -> str:
    """Encode a picture as a data URI: JPEG for RGB, PNG with 256 colours for RGBA."""
    buffer = io.BytesIO()
    if picture.mode == "RGBA":
        picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _base64(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()
