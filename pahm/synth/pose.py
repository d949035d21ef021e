"""Random hand poses, rotations and shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from pahm.hand.articulation import ABDUCTION_LIMITS, FLEXION_LIMITS, THUMB_LIMITS, Articulation
from pahm.hand.model import HandModel

Array = NDArray[np.float64]


class Posture(NamedTuple):
    """A typical posture: flexion of the long fingers in degrees, spread, and the thumb's five angles."""

    mcp: tuple[float, float, float, float]
    pip: tuple[float, float, float, float]
    spread: float
    thumb: tuple[float, float, float, float, float]
    weight: float = 1.0


_TUCKED = (26.0, 48.0, 8.0, 32.0, 52.0)
POSTURES: dict[str, Posture] = {
    "open": Posture((0, 0, 0, 0), (4, 4, 4, 4), 1.0, (55, 20, 0, 5, 0), 1.5),
    "flat": Posture((0, 0, 0, 0), (4, 4, 4, 4), 0.1, (32, 12, 0, 8, 8)),
    "relaxed": Posture((20, 25, 30, 32), (25, 32, 35, 35), 0.3, (42, 30, 5, 15, 15), 2.0),
    "fist": Posture((78, 80, 78, 74), (92, 94, 92, 88), 0.0, (38, 54, 5, 34, 58), 1.5),
    "thumb up": Posture((78, 80, 78, 74), (92, 94, 92, 88), 0.0, (55, 5, -10, -5, -8), 0.5),
    "point": Posture((5, 75, 77, 74), (6, 92, 92, 88), 0.0, _TUCKED),
    "pistol": Posture((5, 75, 77, 74), (6, 92, 92, 88), 0.0, (58, 15, -5, 0, 0), 0.5),
    "two": Posture((2, 2, 75, 74), (5, 5, 92, 88), 0.8, _TUCKED),
    "three": Posture((2, 2, 5, 72), (5, 5, 8, 90), 0.7, _TUCKED, 0.5),
    "four": Posture((2, 2, 2, 2), (5, 5, 5, 5), 0.7, (22, 40, 15, 40, 50), 0.5),
    "horns": Posture((2, 72, 75, 5), (5, 92, 92, 10), 0.5, _TUCKED, 0.5),
    "call": Posture((70, 75, 72, 5), (90, 92, 90, 8), 0.5, (58, 15, 0, 0, 0), 0.5),
    "pinch": Posture((48, 30, 22, 18), (52, 35, 28, 25), 0.4, (28, 50, 15, 10, 28), 1.5),
    "ring pinch": Posture((52, 12, 8, 5), (58, 15, 12, 12), 0.7, (28, 50, 15, 12, 30)),
    "tripod": Posture((48, 52, 60, 65), (48, 50, 65, 65), 0.2, (28, 50, 15, 10, 25)),
    "cylinder": Posture((42, 45, 48, 48), (48, 50, 50, 48), 0.3, (35, 52, 15, 10, 20), 1.5),
    "sphere": Posture((25, 25, 25, 25), (40, 42, 42, 40), 1.0, (45, 50, 12, 10, 18)),
    "hook": Posture((8, 8, 8, 8), (82, 85, 85, 80), 0.2, (38, 25, 0, 10, 15), 0.7),
    "claw": Posture((-5, -5, -5, -5), (55, 58, 58, 55), 1.0, (55, 30, 5, 5, 35), 0.7),
    "roof": Posture((65, 68, 70, 70), (8, 8, 8, 8), 0.2, (35, 45, 10, 10, 10), 0.7),
}
"""The postures that `sample_pose` mixes."""

_SPREAD: Array = np.array([[-2.0, 0.0, 3.0, 6.0], [13.0, 2.0, -6.0, -13.0]])
"""Abduction of the four fingers in degrees, closed and spread."""
_REST_FLEXION: Array = np.array([[10.0, 15.0, 9.0]] * 4)
_REST_THUMB: Array = np.array([58.0, 25.0, 0.0, 8.0, 8.0])


def sample_pose(rng: np.random.Generator, count: int, hand: HandModel | None = None) -> Array:
    """Random poses within anatomical limits, float64 `(count, 16, 3)` axis-angle, without wrist rotation.

    A pose lies between two of `POSTURES`; one in four is a free mixture finger by finger. A variation
    common to all fingers and smaller ones of each finger are added. DIP follows PIP. If fingers collide, the
    thumb or the other fingers move step by step towards an open hand. hand: the skeleton that defines the
    axes, None for the shipped hand. The same generator state gives the same poses, to rounding, on every
    machine. Raises ValueError for a negative count.
    """
    _check(rng, count)
    body = _default() if hand is None else _articulation(hand)
    flexion, abduction, thumb = _sample_angles(rng, count)
    return _untangle(body, flexion, abduction, thumb)


def sample_rotation(rng: np.random.Generator, count: int) -> Array:
    """Random rotations, uniform over SO(3), float64 `(count, 3)` axis-angle."""
    _check(rng, count)
    quaternions = rng.standard_normal((count, 4))
    return Rotation.from_quat(quaternions).as_rotvec() if count else np.zeros((0, 3))


def sample_shape(rng: np.random.Generator, count: int, components: int = 10, limit: float = 2.5) -> Array:
    """Random shape coefficients, float64 `(count, components)`: standard normal, clipped at +-limit."""
    _check(rng, count)
    return np.clip(rng.standard_normal((count, components)), -limit, limit)


def _check(rng: np.random.Generator, count: int) -> None:
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")


@lru_cache(maxsize=1)
def _default() -> Articulation:
    return Articulation(HandModel.load())


_ARTICULATIONS: WeakKeyDictionary[HandModel, Articulation] = WeakKeyDictionary()


def _articulation(hand: HandModel) -> Articulation:
    if hand not in _ARTICULATIONS:
        _ARTICULATIONS[hand] = Articulation(hand)
    return _ARTICULATIONS[hand]


def _sample_angles(rng: np.random.Generator, count: int) -> tuple[Array, Array, Array]:
    """Anatomical angles in degrees: flexion (count, 4, 3), abduction (count, 4), thumb (count, 5)."""
    table = list(POSTURES.values())
    odds = np.cumsum([posture.weight for posture in table])
    curl = np.array([[p.mcp, p.pip] for p in table], dtype=np.float64)  # (P, 2, 4)
    thumbs = np.array([p.thumb for p in table], dtype=np.float64)
    spreads = np.array([p.spread for p in table])

    # Every pose uses the same number of draws, so pose i does not depend on the others.
    draws = rng.random((count, 14))
    noise = rng.standard_normal((count, 24))
    which = np.searchsorted(odds / odds[-1], draws[:, :6], side="right")
    mix = draws[:, 6:7] ** 2
    first, second = curl[which[:, 0]], curl[which[:, 1]]
    bent = first + mix[..., None] * (second - first)
    thumb = thumbs[which[:, 0]] + mix * (thumbs[which[:, 1]] - thumbs[which[:, 0]])
    spread = spreads[which[:, 0]] + mix[:, 0] * (spreads[which[:, 1]] - spreads[which[:, 0]])

    # Free mixtures: each finger takes its own posture, pulled towards its neighbours.
    free = draws[:, 7] < 0.25
    own = np.stack([curl[which[:, 2 + i], :, i] for i in range(4)], -1)
    shared = 0.55 * own + 0.45 * own.mean(-1, keepdims=True)
    bent[free] = shared[free]
    box = THUMB_LIMITS[:, 0] + draws[:, 8:13] * (THUMB_LIMITS[:, 1] - THUMB_LIMITS[:, 0])
    thumb[free] = 0.5 * (thumb + box)[free]
    spread = np.where(free, draws[:, 13], spread)

    bent = bent + 8.0 * noise[:, :1, None] + 5.0 * noise[:, 1:5].reshape(-1, 1, 4)
    bent = bent + 5.0 * noise[:, 5:13].reshape(-1, 2, 4)
    mcp, pip = bent[:, 0], np.maximum(bent[:, 1], 0.0)
    dip = 0.62 * pip + 5.0 * noise[:, 13:17]
    low, high = FLEXION_LIMITS.T
    flexion = np.clip(np.stack([mcp, pip, dip], -1), low, high)

    # A bent finger cannot spread: its ligaments are tight.
    spread = np.clip(spread + 0.2 * noise[:, 17], -0.1, 1.1)[:, None]
    abduction = _SPREAD[0] + spread * (_SPREAD[1] - _SPREAD[0]) + 2.0 * noise[:, 18:22]
    slack = 1.0 - 0.8 * np.clip(flexion[..., 0] / 90.0, 0.0, 1.0)
    abduction = np.clip(_SPREAD[0] + slack * (abduction - _SPREAD[0]), *ABDUCTION_LIMITS)

    jitter = np.stack([noise[:, 22], noise[:, 23], noise[:, 0], noise[:, 17], noise[:, 5]], -1)
    thumb = np.clip(thumb + 5.0 * jitter, *THUMB_LIMITS.T)
    return flexion, abduction, thumb


def _untangle(body: Articulation, flexion: Array, abduction: Array, thumb: Array) -> Array:
    """Poses of the angles; colliding fingers move in steps of a fifth towards an open hand."""
    pose = body.pose(flexion, abduction, thumb)
    fingers_back, thumb_back = np.zeros(len(pose)), np.zeros(len(pose))
    open_abduction = _SPREAD.mean(0)
    left = np.arange(len(pose))
    for _ in range(10):
        of_thumb, of_fingers = body.collisions(pose[left])
        hit = of_thumb | of_fingers
        if not hit.any():
            break
        # If the thumb is already fully out of the way, the fingers move instead.
        stuck = of_thumb & (thumb_back[left] > 0.99)
        thumb_back[left] = np.minimum(thumb_back[left] + 0.2 * of_thumb, 1.0)
        fingers_back[left] = np.minimum(fingers_back[left] + 0.2 * (of_fingers | stuck), 1.0)
        left = left[hit]
        back, out = fingers_back[left], thumb_back[left, None]
        pose[left] = body.pose(
            flexion[left] + back[:, None, None] * (_REST_FLEXION - flexion[left]),
            abduction[left] + back[:, None] * (open_abduction - abduction[left]),
            thumb[left] + out * (_REST_THUMB - thumb[left]),
        )
    return pose
