"""Names and orders of bones, joints and fingertips."""

from __future__ import annotations

BONE_NAMES: tuple[str, ...] = (
    "wrist",
    *(f"{finger}_{k}" for finger in ("index", "middle", "pinky", "ring", "thumb") for k in (1, 2, 3)),
)
"""The 16 bones in MANO's order. `index_1` starts at the knuckle, `thumb_1` at the base of the thumb."""

PARENTS: tuple[int, ...] = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
"""Parent of each bone, -1 for the wrist."""

JOINT_NAMES: tuple[str, ...] = (
    "wrist",
    *(f"thumb_{part}" for part in ("cmc", "mcp", "ip", "tip")),
    *(
        f"{finger}_{part}"
        for finger in ("index", "middle", "ring", "pinky")
        for part in ("mcp", "pip", "dip", "tip")
    ),
)
"""FreiHAND's 21 joints: wrist, then thumb, index, middle, ring, pinky, each from the palm outwards."""

JOINT_ORDER: tuple[int, ...] = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
"""The index of each FreiHAND joint in the list of 16 bones followed by 5 tips (thumb ... pinky)."""

FINGERS: dict[str, tuple[int, int, int]] = {
    "thumb": (13, 14, 15),
    "index": (1, 2, 3),
    "middle": (4, 5, 6),
    "ring": (10, 11, 12),
    "pinky": (7, 8, 9),
}
"""Bones of each finger, from the palm outwards."""

FREIHAND_TIPS: tuple[int, ...] = (744, 320, 443, 555, 672)
"""MANO's fingertip vertices as FreiHAND defines them: thumb, index, middle, ring, pinky."""

MANO_TIPS: dict[str, tuple[int, ...]] = {
    "freihand": FREIHAND_TIPS,
    "cmr": (744, 333, 443, 555, 672),
    "smplx": (744, 320, 443, 554, 671),
    "manopth": (745, 317, 444, 556, 673),
}
"""Fingertip vertices on MANO's mesh, by the name of the project that uses them."""
