"""The contents of a mesh file before its polygons are split into triangles."""

from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Polygons(NamedTuple):
    """A mesh of polygons, in the order of its file."""

    vertices: NDArray[np.float64]
    """(N, 3), in the file's unit."""
    sides: NDArray[np.int64]
    """(P,) the number of corners of each polygon."""
    corners: NDArray[np.int64]
    """(sum of sides,) the vertices of the polygons, one polygon after another."""


def polygons(coordinates: ArrayLike, sides: "ArrayLike | array[int]", corners: ArrayLike) -> Polygons:
    """Checked `Polygons`; ValueError for fewer than 3 corners or a corner that is not a vertex."""
    found = Polygons(
        np.asarray(coordinates, dtype=np.float64).reshape(-1, 3),
        np.asarray(sides, dtype=np.int64).reshape(-1),
        np.asarray(corners, dtype=np.int64).reshape(-1),
    )
    if (found.sides < 3).any():
        face = int(np.argmax(found.sides < 3))
        raise ValueError(f"face {face} has {found.sides[face]} corners, expected at least 3")
    wrong = (found.corners < 0) | (found.corners >= len(found.vertices))
    if wrong.any():
        at = int(np.argmax(wrong))
        face = int(np.searchsorted(np.cumsum(found.sides), at, side="right"))
        raise ValueError(
            f"face {face} refers to vertex {found.corners[at]}, but there are {len(found.vertices)} (from 0)"
        )
    return found


def triangles(mesh: Polygons) -> NDArray[np.int64]:
    """The triangles (F, 3) of all polygons in order, each split into a fan from its first corner."""
    fans = mesh.sides - 2
    polygon = np.repeat(np.arange(len(fans)), fans)
    first = (np.cumsum(mesh.sides) - mesh.sides)[polygon]
    step = np.arange(len(polygon)) - (np.cumsum(fans) - fans)[polygon]
    return mesh.corners[np.stack([first, first + step + 1, first + step + 2], axis=1)]


def shown(line: bytes) -> str:
    """A line of a file for use in a message: printable and short."""
    text = line[:200].decode("latin-1").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
