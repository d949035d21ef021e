"""Reads the user's own MANO_RIGHT.pkl (Romero et al. 2017; non-commercial, from mano.is.tue.mpg.de)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from pahm.hand.joints import FREIHAND_TIPS, MANO_TIPS
from pahm_ops.mesh.pickles import load_arrays, to_array, to_integers

SHAPES: dict[str, tuple[int, ...]] = {
    "v_template": (778, 3),
    "f": (1538, 3),
    "weights": (778, 16),
    "shapedirs": (778, 3, 10),
    "posedirs": (778, 3, 135),
    "J_regressor": (16, 778),
    "kintree_table": (2, 16),
}
"""The arrays of MANO's file that are used here."""


def read_mano(path: str | PathLike[str], tips: Sequence[int] | str = FREIHAND_TIPS) -> dict[str, Any]:
    """Read the arguments of `HandModel` from MANO's pickle without running any of its code.

    tips: the vertices at the ends of thumb, index, middle, ring, pinky, or a name in `MANO_TIPS`. The numbers
    are not changed: MANO's wrist bone is not at the origin. Raises FileNotFoundError for a missing file,
    ValueError for a file that lacks a key, has an array of a wrong shape, or names a class that is not
    allowed.
    """
    if isinstance(tips, str):
        if tips not in MANO_TIPS:
            raise ValueError(f"tips must be five vertices or one of {', '.join(MANO_TIPS)}, got {tips!r}")
        tips = MANO_TIPS[tips]
    try:
        content = load_arrays(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no MANO model at {path}: expected the MANO_RIGHT.pkl of https://mano.is.tue.mpg.de"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; MANO's is the MANO_RIGHT.pkl of https://mano.is.tue.mpg.de") from error
    missing = [key for key in SHAPES if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: a MANO model has {', '.join(SHAPES)}")
    arrays = {
        key: (to_integers if key in ("f", "kintree_table") else to_array)(
            f"{key} in {path}", content[key], shape
        )
        for key, shape in SHAPES.items()
    }
    parents = arrays["kintree_table"][0]
    return {
        "template": arrays["v_template"],
        "faces": arrays["f"],
        "skinning_weights": arrays["weights"],
        "shape_basis": arrays["shapedirs"],
        "pose_basis": arrays["posedirs"],
        "bone_regressor": arrays["J_regressor"],
        "parents": (-1, *parents[1:].tolist()),
        "tips": tuple(tips),
    }
