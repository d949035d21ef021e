"""Axis-angle rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_angle_to_matrix(rotation: Tensor) -> Tensor:
    """Convert axis-angle vectors to rotation matrices (Rodrigues' formula).

    rotation: `(..., 3)`, the unit axis times the angle in radians. Returns `(..., 3, 3)`. Smooth everywhere,
    including zero. Near zero, sin(t)/t and (1 - cos(t))/t^2 are computed from their series in t^2, so first
    and second derivatives are correct. Raises ValueError for a wrong shape.
    """
    if rotation.ndim == 0 or rotation.shape[-1] != 3:
        raise ValueError(f"rotation must have shape (..., 3), got {tuple(rotation.shape)}")
    square = (rotation * rotation).sum(-1)
    small = square < 1e-2
    angle = torch.where(small, torch.ones_like(square), square).sqrt()
    near = torch.where(small, square, torch.zeros_like(square))
    first = torch.where(
        small,
        1 - near / 6 * (1 - near / 20 * (1 - near / 42 * (1 - near / 72))),
        angle.sin() / angle,
    )
    half = torch.where(
        small,
        1 - near / 24 * (1 - near / 80 * (1 - near / 168 * (1 - near / 288))),
        (angle / 2).sin() / (angle / 2),
    )
    x, y, z = rotation.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    identity = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    second = 0.5 * half * half
    return identity + first[..., None, None] * skew + second[..., None, None] * (skew @ skew)
