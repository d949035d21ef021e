"""Joint axes from the rest skeleton, poses from anatomical angles, joint limits and collisions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from pahm.hand.joints import FINGERS
from pahm.hand.model import HandModel

Array = NDArray[np.float64]

LONG_FINGERS = ("index", "middle", "ring", "pinky")

FLEXION_LIMITS: Array = np.array([(-10.0, 90.0), (0.0, 100.0), (0.0, 80.0)])
"""Degrees of flexion of a long finger at MCP, PIP and DIP. 0 is in line with the previous bone; at the MCP,
in the plane of the metacarpals."""
ABDUCTION_LIMITS = (-15.0, 15.0)
"""Degrees at the MCP from the finger's neutral direction, positive towards the thumb."""
ABDUCTION_NEUTRAL: Array = np.array([5.0, 0.0, -5.0, -12.0])
"""Neutral directions of index, middle, ring and pinky from the mean of middle and ring, positive towards
the thumb."""
THUMB_LIMITS: Array = np.array([(5.0, 70.0), (0.0, 60.0), (-25.0, 35.0), (-10.0, 55.0), (-15.0, 80.0)])
"""Degrees for the thumb. Two give its metacarpal's direction: radial abduction (in the plane of the palm,
from the middle metacarpal towards the thumb's side) and palmar abduction (out of that plane). Then come
pronation about the metacarpal and flexion at MCP and IP."""

TOLERANCE, PALM_TOLERANCE = 0.7, 0.55
"""Two capsules collide if their axes are closer than this fraction of the sum of their radii. The second
value applies if one is the palm's. Both are below 1 because flesh yields."""


class Articulation:
    """Joint axes of one hand.

    Works with MANO's bones and any rest pose of a right hand, flat or relaxed. Angles are absolute, so the
    same angles give two hands with different rest poses the same posture.
    """

    def __init__(self, hand: HandModel) -> None:
        template = hand.template.detach().cpu().numpy().astype(np.float64)
        weights = hand.skinning_weights.detach().cpu().numpy().astype(np.float64)
        self.parents = hand.parents
        self.bones: Array = hand.bone_regressor.detach().cpu().numpy().astype(np.float64) @ template
        self.tips: Array = template[list(hand.tips)]
        bones = self.bones
        along = _unit(bones[4] - bones[0])
        self.palmward = _unit(np.cross(bones[1] - bones[7], along))
        self.along = _unit(along - self.palmward * (along @ self.palmward))
        self.radial = np.cross(self.along, self.palmward)

        self.flexion_axes: Array = np.zeros((4, 3))
        self.abduction_axes: Array = np.zeros((4, 3))
        self.rest_flexion: Array = np.zeros((4, 3))
        self.rest_abduction: Array = np.zeros(4)
        for i, finger in enumerate(LONG_FINGERS):
            first, second, third = FINGERS[finger]
            proximal = _unit(bones[second] - bones[first])
            middle = _unit(bones[third] - bones[second])
            distal = _unit(self._tip(finger) - bones[third])
            # A curled finger shows its own plane of bending. For a straight finger the palm defines it.
            axis = 2.0 * np.cross(proximal, distal) + _unit(np.cross(proximal, self.palmward))
            axis = _unit(axis - proximal * (axis @ proximal))
            self.flexion_axes[i] = axis
            self.abduction_axes[i] = np.cross(proximal, axis)
            level = np.arcsin(np.clip(proximal @ self.palmward, -1.0, 1.0))
            self.rest_flexion[i] = level, _angle(proximal, middle, axis), _angle(middle, distal, axis)
            self.rest_abduction[i] = np.arctan2(proximal @ self.radial, proximal @ self.along)
        straight = self.rest_abduction[1:3].mean()
        self.neutral_abduction = straight + np.radians(ABDUCTION_NEUTRAL)
        # The knuckle bends in the plane of the finger's neutral direction, not of its rest direction.
        to_neutral = (self.neutral_abduction - self.rest_abduction)[:, None] * self.abduction_axes
        self.knuckle_axes: Array = Rotation.from_rotvec(to_neutral).apply(self.flexion_axes)

        base, knuckle, joint = FINGERS["thumb"]
        self.metacarpal = _unit(bones[knuckle] - bones[base])
        proximal = _unit(bones[joint] - bones[knuckle])
        distal = _unit(self._tip("thumb") - bones[joint])
        across = 0.85 * self.palmward - 0.45 * self.along
        axis = 2.5 * np.cross(proximal, distal) + across
        self.thumb_axis = _unit(axis - proximal * (axis @ proximal))
        self.rest_thumb: Array = np.array(
            [_angle(self.metacarpal, proximal, self.thumb_axis), _angle(proximal, distal, self.thumb_axis)]
        )
        self._make_capsules(template, weights)

    def _tip(self, finger: str) -> Array:
        return self.tips[list(FINGERS).index(finger)]

    def pose(self, flexion: Array, abduction: Array, thumb: Array) -> Array:
        """Axis-angle poses `(N, 16, 3)` for N sets of anatomical angles in degrees, without wrist rotation.

        flexion: `(N, 4, 3)` of index, middle, ring, pinky at MCP, PIP, DIP. abduction: `(N, 4)`. thumb:
        `(N, 5)`. The limits in this module define the angles. They are not applied here.
        """
        count = len(flexion)
        pose = np.zeros((count, 16, 3))
        bend = np.radians(flexion) - self.rest_flexion
        spread = np.radians(abduction) + self.neutral_abduction - self.rest_abduction
        for i, finger in enumerate(LONG_FINGERS):
            first, second, third = FINGERS[finger]
            flex = Rotation.from_rotvec(bend[:, i, :1] * self.knuckle_axes[i])
            abduct = Rotation.from_rotvec(spread[:, i, None] * self.abduction_axes[i])
            pose[:, first] = (flex * abduct).as_rotvec()
            pose[:, second] = bend[:, i, 1:2] * self.flexion_axes[i]
            pose[:, third] = bend[:, i, 2:3] * self.flexion_axes[i]
        base, knuckle, joint = FINGERS["thumb"]
        angles = np.radians(thumb)
        target = np.cos(angles[:, 1:2]) * (
            np.cos(angles[:, :1]) * self.along + np.sin(angles[:, :1]) * self.radial
        ) + np.sin(angles[:, 1:2]) * (self.palmward)
        pose[:, base] = (
            Rotation.from_rotvec(angles[:, 2:3] * target) * _shortest_turn(self.metacarpal, target)
        ).as_rotvec()
        pose[:, knuckle] = (angles[:, 3:4] - self.rest_thumb[0]) * self.thumb_axis
        pose[:, joint] = (angles[:, 4:5] - self.rest_thumb[1]) * self.thumb_axis
        return pose

    def skeleton(self, pose: Array) -> tuple[Array, Array]:
        """Posed bones `(N, 16, 3)` and fingertips `(N, 5, 3)`, metres, for poses `(N, 16, 3)`."""
        count = len(pose)
        local = Rotation.from_rotvec(pose.reshape(-1, 3)).as_matrix().reshape(count, 16, 3, 3)
        turns, heads = np.empty_like(local), np.empty((count, 16, 3))
        turns[:, 0], heads[:, 0] = local[:, 0], self.bones[0]
        for j, parent in enumerate(self.parents[1:], start=1):
            turns[:, j] = turns[:, parent] @ local[:, j]
            heads[:, j] = heads[:, parent] + turns[:, parent] @ (self.bones[j] - self.bones[parent])
        ends = [third for _, _, third in FINGERS.values()]
        reach = self.tips - self.bones[ends]
        return heads, heads[:, ends] + (turns[:, ends] @ reach[..., None])[..., 0]

    def _make_capsules(self, template: Array, weights: Array) -> None:
        """Make a capsule for each phalanx and metacarpal. Its radius is the median distance to its skin."""
        owner = weights.argmax(1)
        starts, ends = self._segments(self.bones[None], self.tips[None])
        bones = [*range(1, 16), 0, 0, 0, 0]
        radii = np.zeros(19)
        for k, bone in enumerate(bones):
            skin = template[owner == bone]
            reach = np.stack([_to_segment(skin, starts[0, s], ends[0, s]) for s in range(15, 19)])
            if bone == 0:
                skin, reach = skin[reach.argmin(0) == k - 15], reach[k - 15, reach.argmin(0) == k - 15]
            else:
                reach = _to_segment(skin, starts[0, k], ends[0, k])
            radii[k] = np.median(reach) if len(skin) else 0.0
        finger = [(bone - 1) // 3 for bone in range(1, 16)]
        pairs = [(a, b) for a in range(15) for b in range(a + 1, 15) if finger[a] != finger[b]]
        # Skip pairs that always touch: neighbours share a web, and the thumb's metacarpal is in the palm.
        pairs = [(a, b) for a, b in pairs if not (a % 3 == 0 and b % 3 == 0) and 12 not in (a, b)]
        pairs += [(a, b) for a in range(15) if a % 3 != 0 for b in range(15, 19)]
        self._pairs = np.array(pairs)
        part = np.where(self._pairs[:, 1] < 15, TOLERANCE, PALM_TOLERANCE)
        self._gaps = part * (radii[self._pairs[:, 0]] + radii[self._pairs[:, 1]])
        self._of_thumb = np.isin(self._pairs, (12, 13, 14)).any(1)

    def _segments(self, bones: Array, tips: Array) -> tuple[Array, Array]:
        """Ends `(N, 19, 3)` of 15 phalanges (the last stops short of the tip) and 4 metacarpals."""
        starts, ends = bones[:, 1:].copy(), bones[:, 1:].copy()
        for i, (first, second, third) in enumerate(FINGERS.values()):
            ends[:, first - 1], ends[:, second - 1] = bones[:, second], bones[:, third]
            ends[:, third - 1] = bones[:, third] + 0.75 * (tips[:, i] - bones[:, third])
        knuckles = bones[:, [FINGERS[finger][0] for finger in LONG_FINGERS]]
        wrist = bones[:, :1]
        return (
            np.concatenate([starts, wrist + 0.3 * (knuckles - wrist)], 1),
            np.concatenate([ends, wrist + 0.95 * (knuckles - wrist)], 1),
        )

    def collisions(self, pose: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For poses `(N, 16, 3)`: whether the thumb hits something, and whether another finger does."""
        starts, ends = self._segments(*self.skeleton(pose))
        first, second = self._pairs.T
        near = _segment_distance(starts[:, first], ends[:, first], starts[:, second], ends[:, second])
        hit = near < self._gaps
        return hit[:, self._of_thumb].any(1), hit[:, ~self._of_thumb].any(1)


def _unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector)


def _angle(a: Array, b: Array, axis: Array) -> float:
    """The angle in radians from a to b about the axis."""
    return float(np.arctan2(np.cross(a, b) @ axis, a @ b - (a @ axis) * (b @ axis)))


def _shortest_turn(source: Array, targets: Array) -> Rotation:
    """The smallest rotations that turn one unit vector to each of `(N, 3)` others."""
    cross = np.cross(source, targets)
    sine = np.linalg.norm(cross, axis=1, keepdims=True)
    angle = np.arctan2(sine, (targets @ source)[:, None])
    return Rotation.from_rotvec(cross * np.divide(angle, sine, out=np.ones_like(angle), where=sine > 1e-12))


def _to_segment(points: Array, start: Array, end: Array) -> Array:
    """Distances of points `(P, 3)` from one segment."""
    along = end - start
    t = np.clip((points - start) @ along / (along @ along), 0.0, 1.0)
    return np.linalg.norm(points - start - t[:, None] * along, axis=1)


def _segment_distance(p0: Array, p1: Array, q0: Array, q1: Array) -> Array:
    """Distances of pairs of segments `(..., 3)` (Ericson 2005, section 5.1.9)."""
    u, v, w = p1 - p0, q1 - q0, p0 - q0
    a, b, c = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    d, e = (u * w).sum(-1), (v * w).sum(-1)
    tiny = 1e-12
    s = np.clip((b * e - c * d) / np.maximum(a * c - b * b, tiny), 0.0, 1.0)
    t = np.clip((b * s + e) / np.maximum(c, tiny), 0.0, 1.0)
    s = np.clip((b * t - d) / np.maximum(a, tiny), 0.0, 1.0)
    return np.linalg.norm(w + s[..., None] * u - t[..., None] * v, axis=-1)
