"""A reconstructed hand, which draws and saves itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pahm.data.augment import crop_matrix
from pahm.data.camera import Array
from pahm.data.crop import Box
from pahm.infer import drawing, writers
from pahm.synth.render import Scene, trace


@dataclass(frozen=True)
class Hand:
    """A reconstructed hand. Arrays are numpy, float64 where not said otherwise.

    Camera space is x right, y down, z forward, in metres. Pixels are those of the image, from the centre of
    its top-left pixel.
    """

    meshes: list[Array]
    """M4, M3, M2, M1 in camera space, `(98 | 195 | 389 | 778, 3)`, or whatever meshes the network makes on
    the way; the last is `vertices`.
    """
    level_faces: list[npt.NDArray[np.int64]]
    """Triangles `(F, 3)` of each of `meshes`, counter-clockwise seen from outside (for left hands too)."""
    joints: Array
    """`(21, 3)`, camera space, FreiHAND's order."""
    relative_meshes: list[Array]
    """`meshes` as the network gives them, relative to its root joint, axes of the crop's camera."""
    vertices_2d: Array
    """`(778, 2)`, pixels: where the network's weak-perspective camera puts the vertices."""
    joints_2d: Array
    """`(21, 2)`, pixels, likewise."""
    K: Array
    """`(3, 3)` intrinsics in pixels."""
    intrinsics_assumed: bool
    """Whether K was assumed (see `assumed_intrinsics`), which leaves the hand's distance uncertain."""
    weak_camera: Array
    """`(3,)` [s, tx, ty]: x_n = s (X + tx), y_n = s (Y + ty), -1 and 1 at the edges of the crop."""
    box: Box
    """The square crop (x, y, width, height) in pixels from the image's top-left corner."""
    left: bool
    image: Image.Image
    """The RGB image that was given."""
    source: str | None
    """Absolute path of the image, where it was a file."""
    silhouette: npt.NDArray[np.float32] | None
    """`(h, h)` float32 over the crop: the network's probability that a pixel shows the hand. None for a
    network without 2D heads.
    """

    @property
    def vertices(self) -> Array:
        """`(778, 3)`, camera space."""
        return self.meshes[-1]

    @property
    def faces(self) -> npt.NDArray[np.int64]:
        """Triangles of `vertices`, `(1538, 3)`."""
        return self.level_faces[-1]

    @cached_property
    def _scene(self) -> Scene:
        """The mesh, ready for rays."""
        return Scene(self.vertices, self.faces)

    def __getstate__(self) -> dict[str, object]:
        """All but the scene, which cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_scene"}

    @cached_property
    def confidence(self) -> float | None:
        """How well the mesh fills the silhouette that the network sees, 0 to 1; None without a silhouette.

        It is the intersection over union of `silhouette`, s, with the silhouette of the mesh as K projects
        it, m, which is 0 or 1: the sum of min(s, m) over the crop's pixels, over the sum of max(s, m). A
        network that sees no hand gives a faint silhouette, which no mesh fills. This is agreement of two
        outputs, not a calibrated probability: it tells pictures without a hand from those with one, and says
        little about which of two good reconstructions is the better one. It is 0 for a mesh that is not in
        front of the camera.
        """
        if self.silhouette is None:
            return None
        if self.vertices[:, 2].min() <= 0:
            return 0.0
        side = len(self.silhouette)
        K = crop_matrix(self.box, side) @ self.K
        _, ids = trace(self.vertices, self.faces, K, (side, side), scene=self._scene)
        mesh = (ids >= 0).astype(np.float64)
        return float(np.minimum(self.silhouette, mesh).sum() / np.maximum(self.silhouette, mesh).sum())

    def overlay(self) -> Image.Image:
        """The image with the mesh drawn over it, RGB, of the image's size.

        Raises ValueError for a mesh that is not in front of the camera.
        """
        return drawing.overlay(self.image, self.vertices, self.faces, self.K, scene=self._scene)

    def save(
        self,
        folder: str | os.PathLike[str],
        name: str | None = None,
        formats: Iterable[str] = ("obj", "json", "png"),
    ) -> list[Path]:
        """Write the hand to `folder`, one file a format, and return their paths.

        name: what the files' names begin with; by default the image file's name without its suffix, or
        "hand". formats: of `pahm.infer.writers.FORMATS`: "png" is the overlay, "obj", "ply" and "glb" are the
        mesh, "json" is everything else. See `pahm.infer.writers.write_many` for what the files hold and when
        files that are there are replaced.

        Raises ValueError for a name that is not a plain file name and for unknown formats, OSError where a
        file cannot be written.
        """
        if name is None:
            name = "hand" if self.source is None else Path(self.source).stem
        (result,) = writers.write_many([(name, self)], folder, formats)
        if isinstance(result, Exception):
            raise result
        return result
