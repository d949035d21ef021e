"""Skin colours of a synthetic hand, one per vertex."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pahm.synth.backgrounds import SKIN
from pahm.synth.render import vertex_normals
from pahm.synth.sampling import ROOT, shipped_hand

Float = NDArray[np.float32]

_NAIL = np.array((236, 190, 180), np.float32) / 255


class Surface(NamedTuple):
    """The properties of the hand's rest surface that affect its colour. Every weight is in [0, 1]."""

    rest: Float
    """`(778, 3)` rest vertices in metres."""
    palm: Float
    """`(778,)`, 1 on the palm side."""
    nail: Float
    """`(778,)`, 1 on finger nails."""
    knuckle: Float
    """`(778,)`, 1 on the back of finger joints."""
    tip: Float
    """`(778,)`, 1 at the pads of the fingertips."""


def linear(colours: NDArray[np.floating]) -> Float:
    """Convert sRGB values in [0, 1] to linear light."""
    return np.power(np.clip(colours, 0, 1), 2.2, dtype=np.float32)


def _smoothstep(value: NDArray[np.floating], low: float, high: float) -> Float:
    t = np.clip((value - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


@cache
def hand_surface() -> Surface:
    """The shipped hand's `Surface`."""
    hand = shipped_hand()
    rest = hand.template.numpy()
    joints = hand.joint_regressor.numpy() @ rest
    normals = vertex_normals(rest, hand.faces.numpy()).astype(np.float64)
    fingers = joints[ROOT] - joints[0]
    across = joints[17] - joints[5]  # from the index finger's knuckle to the little finger's
    out_of_palm = np.cross(fingers, across)  # right hand
    out_of_palm /= np.linalg.norm(out_of_palm)
    radial = -across / np.linalg.norm(across)
    facing = normals @ out_of_palm

    nail, knuckle, tip = (np.zeros(len(rest)) for _ in range(3))
    for finger in range(5):
        chain = joints[1 + 4 * finger : 5 + 4 * finger]
        along = chain[3] - chain[2]
        length = np.linalg.norm(along)
        along /= length
        back = -out_of_palm if finger else radial - 0.5 * out_of_palm  # the thumb is rotated
        back = back - (back @ along) * along
        back /= np.linalg.norm(back)
        position = (rest - chain[2]) @ along / length  # 0 at the last joint, 1 at the tip
        beside = np.linalg.norm((rest - chain[2]) - np.outer((rest - chain[2]) @ along, along), axis=1)
        near = (beside < 0.014) & (position < 1.3)
        dorsal = normals @ back
        nail = np.maximum(nail, near * _smoothstep(position, 0.45, 0.6) * _smoothstep(dorsal, 0.5, 0.85))
        tip = np.maximum(tip, near * _smoothstep(position, 0.3, 0.8) * _smoothstep(-dorsal, 0, 0.6))
        for joint in chain[0 if finger else 1 : 3]:
            distance = np.linalg.norm(rest - joint, axis=1)
            knuckle = np.maximum(knuckle, np.exp(-((distance / 0.013) ** 2)) * _smoothstep(dorsal, 0.2, 0.8))
    columns = (rest, _smoothstep(facing, -0.3, 0.5), nail, knuckle / max(knuckle.max(), 1e-9), tip)
    return Surface(*(np.asarray(column, np.float32) for column in columns))


def skin_tone(rng: np.random.Generator) -> Float:
    """A random skin colour (3,), sRGB in [0, 1]: between two neighbours in `SKIN`, slightly varied."""
    place = rng.uniform(0, len(SKIN) - 1)
    low = int(place)
    tone = SKIN[low] + (place - low) * (SKIN[min(low + 1, len(SKIN) - 1)] - SKIN[low])
    return np.clip(tone * rng.normal(1, 0.03, 3), 0.04, 1).astype(np.float32)


def skin_colours(rng: np.random.Generator, tone: Float) -> Float:
    """Linear colours (778, 3) of a hand with this skin tone, including palm, nails, knuckles and blotches."""
    surface = hand_surface()
    brightness = float(tone.mean())
    pale = tone + (0.12 + 0.5 * (0.6 - brightness) * (brightness < 0.6)) * (
        np.array((0.95, 0.78, 0.7)) - tone
    )
    strength = rng.uniform(0.5, 1.2)
    colours = tone + surface.palm[:, None] * strength * (pale - tone)
    red = np.array((0.02, -0.06, -0.05))
    colours += surface.knuckle[:, None] * rng.uniform(0, 1.5) * red
    colours *= 1 - surface.knuckle[:, None] * rng.uniform(0, 0.2)
    colours += surface.tip[:, None] * rng.uniform(0, 1.2) * red
    waves = rng.normal(0, 1, (6, 3)) / rng.uniform(0.006, 0.03, (6, 1))
    blotches = np.sin(surface.rest @ waves.T.astype(np.float32) + rng.uniform(0, 2 * np.pi, 6)).mean(axis=1)
    colours *= 1 + rng.uniform(0.02, 0.12) * blotches[:, None]
    colours += rng.uniform(0, 0.03) * blotches[:, None] * np.array((1, -0.5, -0.5))
    polish = 0.75 * tone + 0.25 * _NAIL if brightness < 0.45 else 0.35 * tone + 0.65 * _NAIL
    if rng.random() < 0.08:
        polish = rng.uniform(0.1, 0.9, 3)
    colours += surface.nail[:, None] * (polish - colours)
    return linear(colours)
