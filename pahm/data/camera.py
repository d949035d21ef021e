"""Pinhole cameras: intrinsics and where they come from, rays of pixels, and the place of a mesh on them.

Camera space is x right, y down, z forward, in metres; pixels count from the centre of the top-left one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pahm.text_files import read_json, shown
from pahm_ops.array_files import read_npy

Array = npt.NDArray[np.float64]
FOCAL = (1, 10**7)  # pixels


def assumed_intrinsics(width: int, height: int) -> Array:
    """Intrinsics (3, 3) of an unknown camera: focal length = the image's diagonal, centre = the image's.

    That is a field of view of 53 degrees over the diagonal, between a phone's and a portrait lens.
    """
    focal = math.hypot(width, height)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float64)


def check_intrinsics(values: npt.ArrayLike) -> Array:
    """Intrinsics as a float64 array (3, 3); ValueError where they are not a camera matrix."""
    try:
        K = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"intrinsics: expected 3 x 3 numbers, got {shown(values)}") from error
    if K.shape == (1, 3, 3):
        K = K[0]
    if K.shape != (3, 3):
        raise ValueError(f"intrinsics: expected shape (3, 3), got {K.shape}")
    if (
        not np.isfinite(K).all()
        or not np.array_equal(K[2], [0, 0, 1])
        or min(K[0, 0], K[1, 1]) <= 0
        or K[1, 0]
    ):
        raise ValueError(
            f"intrinsics: expected finite [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with positive fx and fy, "
            f"got {K.tolist()}"
        )
    shortest, longest = FOCAL
    if min(K[0, 0], K[1, 1]) < shortest or np.abs(K[:2]).max() > longest:
        raise ValueError(
            f"intrinsics: expected pixels, with fx and fy from {shortest} to {longest}, got {K.tolist()}"
        )
    return K


def read_intrinsics(path: str | os.PathLike[str]) -> Array:
    """Intrinsics (3, 3) from a JSON file: `{"K": [[...], [...], [...]]}`, the bare matrix, a list of one;
    or from a .npy file with the matrix.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"intrinsics: {os.fspath(path)} does not exist")
    read = read_npy if Path(path).suffix == ".npy" else read_json
    content = read(path, limit=1 << 20)
    try:
        if isinstance(content, dict):
            if "K" not in content:
                raise ValueError('intrinsics: expected a key "K" in the JSON object')
            content = content["K"]
        return check_intrinsics(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def ray_rotation(K: Array, pixel: Array) -> Array:
    """The smallest rotation (3, 3) that takes the optical axis to the ray of `pixel` (2,)."""
    ray = np.linalg.solve(K, np.array([*pixel, 1.0]))
    x, y, z = ray / np.linalg.norm(ray)
    # Rodrigues' formula for the axis (-y, x, 0), whose length is the sine and z the cosine of the angle.
    cross = np.array([[0, 0, x], [0, 0, y], [-x, -y, 0]])
    return np.asarray(np.eye(3) + cross + cross @ cross / (1 + z))


def solve_translation(points: Array, pixels: Array, K: Array) -> Array:
    """The translation t (3,) that best puts `points` (N, 3) on the rays of `pixels` (N, 2) of camera K.

    With the ray (x, y, 1) of a pixel: X + t_x = x (Z + t_z) and Y + t_y = y (Z + t_z), 2 N linear equations
    in t, solved in the least-squares sense.
    """
    rays = np.linalg.solve(K, np.concatenate([pixels, np.ones_like(pixels[:, :1])], axis=1).T).T
    x, y = rays[:, 0], rays[:, 1]
    one, zero = np.ones_like(x), np.zeros_like(x)
    left = np.concatenate([np.stack([one, zero, -x], 1), np.stack([zero, one, -y], 1)])
    right = np.concatenate([x * points[:, 2] - points[:, 0], y * points[:, 2] - points[:, 1]])
    return np.asarray(np.linalg.lstsq(left, right, rcond=None)[0])


def project_weakly(points: Array, camera: Array, size: int, to_image: Array) -> Array:
    """Pixels (N, 2) of the image where the weak-perspective camera of a crop sees `points` (N, 3), metres.

    camera: (3,) [s, tx, ty], -1 and 1 at the edges of the crop. size: the crop's side. to_image: (3, 3),
    the crop's pixels to the image's.
    """
    normalised = camera[0] * (points[:, :2] + camera[1:])
    crop = ((normalised + 1) * size - 1) / 2
    return np.asarray(crop @ to_image[:2, :2].T + to_image[:2, 2])
