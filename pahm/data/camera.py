"""Pinhole cameras: reading intrinsics, casting rays through pixels, and placing meshes on those rays.

Camera space is x right, y down, z forward, metres. Pixels are measured from the centre of the top-left pixel.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pahm.text_files import read_json, shown
from pahm_ops.array_files import read_npy

Array = npt.NDArray[np.float64]
FOCAL = (1, 10**7)  # pixels


def assumed_intrinsics(width: int, height: int) -> Array:
    """Assumed intrinsics (3, 3) of an unknown camera: the focal length is the image's diagonal, and the
    principal point is the image's centre.

    The diagonal field of view is 53 degrees, between those of a phone and a portrait lens.
    """
    focal = math.hypot(width, height)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float64)


def check_intrinsics(values: npt.ArrayLike) -> Array:
    """Intrinsics as a float64 array (3, 3). Raises ValueError if they are not a camera matrix."""
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
    """Read intrinsics (3, 3) from a JSON file with `{"K": [[...], [...], [...]]}`, the bare matrix or a list
    of one matrix, or from a .npy file with the matrix.

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


def rays(pixels: Tensor, K: Tensor) -> Tensor:
    """The points (..., N, 2) at which rays of `pixels` (..., N, 2), cameras K (..., 3, 3), meet z = 1."""
    return torch.stack(_rays(pixels, K), -1)


def _rays(pixels: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of `rays`, (..., N) each."""
    across, down = pixels.unbind(-1)
    (fx, skew, cx), (_, fy, cy), _ = (row.unbind(-2) for row in K[..., None].unbind(-3))
    y = (down - cy) / fy
    return (across - cx - skew * y) / fx, y


def ray_rotation(K: Tensor, pixel: Tensor) -> Tensor:
    """The smallest rotations (..., 3, 3) that turn the optical axis of each camera K (..., 3, 3) to the ray
    of `pixel` (2,).
    """
    x, y = rays(pixel[None], K)[..., 0, :].unbind(-1)
    z = 1 / (x * x + y * y + 1).sqrt()
    x, y = x * z, y * z
    # Rodrigues' formula for the axis (-y, x, 0). Its length is the sine of the angle, z the cosine.
    xx, xy, yy = x * x / (1 + z), x * y / (1 + z), y * y / (1 + z)
    return torch.stack([1 - xx, -xy, x, -xy, 1 - yy, y, -x, -y, z], -1).unflatten(-1, (3, 3))


def rotate(points: Tensor, rotation: Tensor) -> Tensor:
    """Rotate points (..., N, 3) by rotations (..., 3, 3)."""
    # A matrix product may run in TF32 or bfloat16 and lose tenths of a millimetre, so multiply and add.
    # Coordinates first: operations are slow where the innermost dimension is 3.
    x, y, z = points.mT[..., None, :, :].unbind(-2)
    for_x, for_y, for_z = rotation[..., None].unbind(-2)
    return (for_x * x + for_y * y + for_z * z).mT.contiguous()


def solve_translation(points: Tensor, pixels: Tensor, K: Tensor) -> Tensor:
    """The translations t (..., 3) that best place `points` (..., N, 3) on the rays of `pixels` (..., N, 2) of
    cameras K (..., 3, 3).

    For the ray (x, y, 1) of a pixel, X + t_x = x (Z + t_z) and Y + t_y = y (Z + t_z). These 2 N linear
    equations in t are solved by least squares. A distant hand spans a small angle, so use float64.
    """
    # Coordinates first, as in `rotate`.
    xy, points = torch.stack(_rays(pixels, K), -2), points.mT.contiguous()
    # For any t_z the best (t_x, t_y) is the mean of `offset` + t_z `xy`; the rest is a line through 0.
    offset = xy * points[..., 2:, :] - points[..., :2, :]
    mean_xy, mean_offset = xy.mean(-1, keepdim=True), offset.mean(-1, keepdim=True)
    spread = xy - mean_xy
    depth = -(spread * (offset - mean_offset)).sum((-2, -1)) / spread.square().sum((-2, -1))
    across = mean_offset[..., 0] + depth[..., None] * mean_xy[..., 0]
    return torch.cat([across, depth[..., None]], -1)


def project_weakly(points: Tensor, camera: Tensor, size: int) -> Tensor:
    """Project `points` (..., N, 3), metres, with weak-perspective cameras to crop pixels (..., N, 2).

    camera: (..., 3) [s, tx, ty], -1 and 1 at the edges of the crop. size: the crop's side in pixels.
    """
    scale, shift = camera[..., :1, None], camera[..., 1:, None]
    origin = ((scale * shift + 1) * size - 1) / 2  # the pixel of the point 0
    return torch.addcmul(origin, scale * (size / 2), points.mT[..., :2, :]).mT.contiguous()
