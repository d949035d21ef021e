"""Left hands. The package models right hands; a left hand is a mirror image."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Points = TypeVar("Points", Tensor, NDArray[np.float64], NDArray[np.floating])
Faces = TypeVar("Faces", Tensor, NDArray[np.int64], NDArray[np.integer])


def checked_left(value: object) -> bool:
    """Convert a bool, 0 or 1, including numpy's and torch's, to a bool. Raises TypeError for other values."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_, int, np.integer)) and value in (0, 1):
        return bool(value)
    raise TypeError(f"left: expected True or False, got {value!r}")


def mirror(points: Points) -> Points:
    """Negate x of points `(..., 3)`: a right hand's vertices or joints become a left hand's, and vice versa.

    In camera space this is the hand in the image flipped left to right. Returns a new array of the same
    kind. Raises ValueError if the last dimension is not 3.
    """
    if points.ndim == 0 or points.shape[-1] != 3:
        raise ValueError(f"points must have shape (..., 3), got {tuple(points.shape)}")
    flipped = points.clone() if isinstance(points, Tensor) else points.copy()
    flipped[..., 0] = -flipped[..., 0]
    return flipped


def mirror_faces(faces: Faces) -> Faces:
    """Reverse the winding of faces `(F, 3)`, so that the normals of a mirrored mesh point outwards."""
    if faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(f"faces must have shape (F, 3), got {tuple(faces.shape)}")
    return faces[:, [0, 2, 1]]


def mirror_pose(pose: Points) -> Points:
    """Convert axis-angle vectors `(..., 3)` of a right hand to the mirrored hand's: y and z are negated."""
    if pose.ndim == 0 or pose.shape[-1] != 3:
        raise ValueError(f"pose must have shape (..., 3), got {tuple(pose.shape)}")
    flipped = pose.clone() if isinstance(pose, Tensor) else pose.copy()
    flipped[..., 1:] = -flipped[..., 1:]
    return flipped
