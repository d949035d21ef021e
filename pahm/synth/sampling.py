"""Sample the annotation of a synthetic image from a seed: the hand's pose and shape, the view and the camera.

Everything here is a pure function of (seed, split, index), in float64 and rounded. The same seed therefore
gives the same annotations on every machine and with any number of workers.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pahm.data.freihand import Split
from pahm.hand import HandModel
from pahm.synth.pose import sample_pose, sample_rotation, sample_shape

Float = NDArray[np.float64]

ROOT, ROOT_CHILD = 9, 10  # the middle finger's proximal bone, which gives FreiHAND's root and scale
_DECIMALS = 6  # micrometres
_FOCAL = (400.0, 600.0)  # pixels at 224, as in FreiHAND
_DEPTH = (0.4, 1.0)  # metres
_FILL = (0.45, 0.75)  # longer side of the hand's box divided by the image's side
_NEAREST = 0.2  # metres; the hand stays at least this far from the camera


class Annotation(NamedTuple):
    """One hand's FreiHAND annotation: camera space, metres, pixels from the top-left pixel's centre."""

    K: Float
    """`(3, 3)` intrinsics in pixels."""
    vertices: Float
    """`(778, 3)`, rounded to micrometres."""
    joints: Float
    """`(21, 3)`, rounded to micrometres: the hand's joint regressor times the vertices."""
    pose: Float
    """`(16, 3)` axis-angle rotations; the first is global."""
    shape: Float
    """`(10,)` coefficients of the hand's shape space."""

    @property
    def scale(self) -> float:
        """Length in metres of the middle finger's proximal bone."""
        return round(float(np.linalg.norm(self.joints[ROOT] - self.joints[ROOT_CHILD])), _DECIMALS + 1)

    @property
    def mano(self) -> list[list[float]]:
        """FreiHAND's parameter record for this hand: `[[48 pose, 10 shape, 2 root pixel, 1 scale]]`."""
        u, v, w = self.K @ self.joints[ROOT]
        return [
            [*self.pose.ravel().tolist(), *self.shape.tolist(), round(u / w, 4), round(v / w, 4), self.scale]
        ]


@cache
def shipped_hand() -> HandModel:
    """The package's hand in float64, loaded once per process."""
    return HandModel.load(dtype=torch.float64)


def generators(seed: int, split: Split, index: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Two independent generators for one sample: one for its annotation, one for its appearance."""
    root = np.random.SeedSequence((seed, get_args(Split).index(split), index))
    annotation, appearance = root.spawn(2)
    return np.random.default_rng(annotation), np.random.default_rng(appearance)


def rotation_matrix(axis_angle: Float) -> Float:
    """The rotation matrix (3, 3) of an axis-angle vector (3,), by Rodrigues' formula."""
    angle = float(np.linalg.norm(axis_angle))
    x, y, z = axis_angle / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def _view(rng: np.random.Generator, fingers: Float) -> Float:
    """A random global rotation (3,): any view, but rarely along the arm.

    `fingers` (3,) is the direction from wrist to fingers in the rest pose. Little can be seen of a hand that
    points at the camera or away from it, and an arm coming from the camera would hide the hand.
    """
    while True:
        rotation = np.asarray(sample_rotation(rng, 1)[0], dtype=np.float64)
        away = (rotation_matrix(rotation) @ fingers)[2]  # 1: fingers point away from the camera
        accept = (
            1 - 0.8 * np.clip((-away - 0.4) / 0.6, 0, 1) if away < 0 else np.clip((0.75 - away) / 0.4, 0, 1)
        )
        if rng.random() < accept:
            return rotation


def _place(vertices: Float, K: Float, size: int, fill: float, centre: Float) -> Float:
    """The translation (3,) that makes the projected box span `fill` of the image's side, centred at `centre`.

    Depths stay in FreiHAND's range, so a fist that would have to come closer stays smaller.
    """
    focal = K[0, 0]
    extent = float(np.ptp(vertices[:, :2], axis=0).max())
    middle = (vertices.max(axis=0) + vertices.min(axis=0)) / 2
    nearest = max(_DEPTH[0], _NEAREST + float(np.ptp(vertices[:, 2])) / 2)
    depth = float(np.clip(focal * extent / (fill * size), nearest, _DEPTH[1]))
    offset = (centre - K[:2, 2]) / focal * depth
    for _ in range(4):
        points = vertices - middle + (*offset, depth)
        pixels = points[:, :2] / points[:, 2:] * (K[0, 0], K[1, 1]) + K[:2, 2]
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        grown = depth * float((high - low).max()) / (fill * size)
        offset = (offset + (centre - (low + high) / 2) / focal * depth) * (
            float(np.clip(grown, nearest, _DEPTH[1])) / depth
        )
        depth = float(np.clip(grown, nearest, _DEPTH[1]))
    return np.asarray([*offset, depth] - middle)


def sample_annotation(seed: int, split: Split, index: int, image_size: int = 224) -> Annotation:
    """Sample the hand in image `index` of `split` of the data set of `seed`.

    Views cover all sides of the hand and all in-plane angles. Focal length, depth, and the hand's size and
    place in the image follow FreiHAND: 400 to 600 px at 224, 0.4 to 1.0 m, 45 to 75 % of the image.
    Raises ValueError for a negative seed or index, an unknown split or an image size below 1.
    """
    for name, value, least in (("seed", seed, 0), ("index", index, 0), ("image_size", image_size, 1)):
        if value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    if split not in get_args(Split):
        raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    hand = shipped_hand()
    rng, _ = generators(seed, split, index)
    pose = np.array(sample_pose(rng, 1, hand=hand)[0], dtype=np.float64)
    shape: Float = np.round(sample_shape(rng, 1)[0], _DECIMALS)
    rest = (hand.joint_regressor @ hand.template).numpy()
    fingers = rest[ROOT] - rest[0]
    pose[0] = _view(rng, fingers / np.linalg.norm(fingers))
    pose = np.round(pose, _DECIMALS)

    unit = image_size / 224
    focal = rng.uniform(*_FOCAL) * unit
    aspect = rng.normal(1, 0.002)
    principal = (image_size - 1) / 2 + rng.normal(0, 4, 2) * unit
    K = np.round([[focal, 0, principal[0]], [0, focal * aspect, principal[1]], [0, 0, 1]], 4)
    with torch.no_grad():
        posed = hand(torch.from_numpy(pose)[None], torch.from_numpy(shape)[None]).vertices[0].numpy()
    centre = (image_size - 1) / 2 + rng.normal(0, 0.025, 2).clip(-0.08, 0.08) * image_size
    translation = _place(posed, K, image_size, rng.uniform(*_FILL), centre)
    vertices = np.round(posed + translation, _DECIMALS)
    joints = np.round(hand.joint_regressor.numpy() @ vertices, _DECIMALS)
    return Annotation(K, vertices, joints, pose, shape)
