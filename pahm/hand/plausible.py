"""Checks that arrays describe a right hand in metres."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SIZES = (0.05, 0.5)  # metres; an adult's hand is 0.15 to 0.25 long, including the wrist
_SUM_OFF = 0.01
_WRIST, _INDEX, _PINKY, _THUMB = 0, 1, 7, [13, 14, 15]


@np.errstate(over="ignore", invalid="ignore")  # an overflow is rejected by its size
def check_plausible(
    template: NDArray[np.floating],
    skinning_weights: NDArray[np.floating],
    shape_basis: NDArray[np.floating],
    bone_regressor: NDArray[np.floating],
    pose_basis: NDArray[np.floating] | None = None,
) -> None:
    """Raise ValueError, with one sentence, if arrays in the form of `HandModel` do not describe a right hand.

    All must be real and finite. Rows of the weights and the regressor must sum to 1. The template's size must
    be 0.05 to 0.5 metres, and no direction of a basis may move a vertex by more than that size.
    """
    arrays = {
        "template": template,
        "skinning_weights": skinning_weights,
        "shape_basis": shape_basis,
        "bone_regressor": bone_regressor,
        **({} if pose_basis is None else {"pose_basis": pose_basis}),
    }
    for name, values in arrays.items():
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
        finite = np.isfinite(array)
        if not finite.all():
            row = int(np.argmin(finite.reshape(len(array), -1).all(1)))
            raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")
    for name in ("skinning_weights", "bone_regressor"):
        sums = np.asarray(arrays[name], dtype=np.float64) @ np.ones(np.shape(arrays[name])[1])
        off = np.abs(sums - 1)
        if off.max(initial=0) > _SUM_OFF:
            row = int(np.argmax(off))
            raise ValueError(f"{name} must have rows of sum 1, got {sums[row]:.4g} in row {row}")
    points = np.asarray(template, dtype=np.float64)
    size = float(np.ptp(points, axis=0).max()) if len(points) else 0.0
    if not _SIZES[0] <= size <= _SIZES[1]:
        raise ValueError(
            f"template must be a hand in metres, {_SIZES[0]} to {_SIZES[1]} long, got a length of {size:.4g}"
        )
    for name in ("shape_basis", "pose_basis"):
        most = np.abs(arrays[name]).max(initial=0) if name in arrays else 0
        if most > size:
            raise ValueError(
                f"{name} must move a vertex by less than the hand's {size:.4g} m, got {most:.4g}"
            )
    if _thumb_height(np.asarray(bone_regressor, dtype=np.float64) @ points) < 0:
        raise ValueError(
            "the hand must be a right one, got a left one: take MANO_RIGHT.pkl, and for images of left hands "
            "the option --left, which mirrors them"
        )


def _thumb_height(bones: NDArray[np.float64]) -> float:
    """How far the thumb lies on a right hand's palm side, in metres; negative for a left hand.

    bones (16, 3), in any frame. The axis of the turn from index to pinky about the wrist points to the palm
    side of a right hand and to the back of a left one. A thumb at rest lies on the palm side of both.
    """
    sideways = np.cross(bones[_INDEX] - bones[_WRIST], bones[_PINKY] - bones[_WRIST])
    heights = (bones[_THUMB] - bones[_WRIST]) @ sideways
    return float(heights.mean() / max(float(np.linalg.norm(sideways)), 1e-12))
