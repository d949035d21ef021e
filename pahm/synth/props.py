"""The forearm, and objects in front of the hand, as coloured triangles for synthetic pictures."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import trimesh
from numpy.typing import NDArray

from pahm.synth.backgrounds import palette
from pahm.synth.render import trace
from pahm.synth.sampling import ROOT, Annotation, rotation_matrix, shipped_hand
from pahm.synth.skin import linear

Float = NDArray[np.float32]
Int = NDArray[np.int32]

_CLEARANCE = 0.12  # metres; the forearm and objects stay at least this far from the camera
MAX_COVER = 0.35  # share of the hand's pixels that an object may hide


class Part(NamedTuple):
    """Vertices (N, 3) in camera space, faces (F, 3) and linear colours (N, 3)."""

    vertices: Float
    faces: Int
    colours: Float


def join(parts: list[Part]) -> Part:
    """Join parts into one. Faces keep the order of the parts."""
    starts = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    faces = [part.faces + np.int32(start) for part, start in zip(parts, starts, strict=True)]
    return Part(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate(faces),
        np.concatenate([part.colours for part in parts]),
    )


def boundary_loop(faces: NDArray[np.integer]) -> NDArray[np.int64]:
    """The vertices of the mesh's only boundary, in the order of its faces' edges."""
    edges = {(int(face[i]), int(face[i - 2])) for face in faces for i in range(3)}
    following = {a: b for a, b in edges if (b, a) not in edges}
    loop = [min(following)]
    while (vertex := following[loop[-1]]) != loop[0]:
        loop.append(vertex)
    return np.array(loop)


@cache
def _wrist() -> tuple[NDArray[np.int64], Float]:
    """The wrist's boundary loop, and the direction (3,) from hand to elbow in the rest pose."""
    hand = shipped_hand()
    joints = (hand.joint_regressor @ hand.template).numpy()
    away = joints[0] - joints[ROOT]
    return boundary_loop(hand.faces.numpy()), (away / np.linalg.norm(away)).astype(np.float32)


def hand_and_forearm(rng: np.random.Generator, annotation: Annotation, skin: Float) -> Part:
    """The hand and a bare or sleeved forearm that continues from its open wrist; the hand's faces come first.

    `skin` (778, 3) are the hand's linear colours. The arm bends at the wrist by about 15 degrees and ends
    before it gets close to the camera. It appears in the picture only, not in the mask or the mesh.
    """
    loop, rest_axis = _wrist()
    rim = annotation.vertices[loop]
    centre = rim.mean(axis=0)
    axis = rotation_matrix(annotation.pose[0]) @ rest_axis
    axis += rng.normal(0, 0.15, 3)
    axis /= np.linalg.norm(axis)
    length = rng.uniform(0.2, 0.32)
    if axis[2] < 0:
        length = min(length, float(rim[:, 2].min() - 0.05 - _CLEARANCE) / -axis[2])
    length = max(length, 0.01)
    offsets = rim - centre
    heights = offsets @ axis
    radial = offsets - np.outer(heights, axis)
    tone = skin[loop].mean(axis=0)
    sleeve_at = rng.uniform(0.02, 0.2) if rng.random() < 0.55 else np.inf
    growth = rng.uniform(0.1, 0.45)

    def ring(distance: float, widening: float = 1.0) -> NDArray[np.float64]:
        flat = max(0.0, 1 - distance / 0.03)  # the rim is not planar; the arm's sections are
        width = widening * (1 + growth * min(distance / 0.2, 1))
        return centre + distance * axis + width * radial + np.outer(flat * heights, axis)

    bare_to = min(length, sleeve_at)
    steps = np.linspace(0, bare_to, max(2, int(bare_to / 0.02) + 1))[1:]
    rings = [rim, *(ring(step) for step in steps)]
    fade = np.linspace(0, 1, len(rings))[:, None, None].clip(0, 1)
    colours = list(skin[loop] * (1 - fade) + tone * fade)
    breaks = [len(rings)]
    if sleeve_at < length:
        cloth = linear(palette(rng, 2))
        band = int(rng.integers(1, 4)) if rng.random() < 0.3 else 1000
        wide = rng.uniform(1.08, 1.35)
        steps = np.linspace(sleeve_at, length, max(2, int((length - sleeve_at) / 0.012)))
        rings += [ring(sleeve_at, 0.98), *(ring(step, wide) for step in steps)]
        stripes = [cloth[(i // band) % 2] for i in range(len(steps) + 1)]
        colours += [np.broadcast_to(stripe, (len(loop), 3)) for stripe in stripes]
        breaks.append(len(rings))
    arm = _tube_faces(len(loop), breaks)
    hand = annotation.vertices
    arm = np.where(arm < len(loop), loop[np.minimum(arm, len(loop) - 1)], arm + len(hand) - len(loop))
    return Part(
        np.concatenate([hand, *rings[1:]]).astype(np.float32),
        np.concatenate([shipped_hand().faces.numpy(), arm]).astype(np.int32),
        np.concatenate([skin, *colours[1:]]).astype(np.float32),
    )


def _tube_faces(around: int, breaks: list[int]) -> Int:
    """Faces of tubes made of rings of `around` vertices. A tube ends before each ring index in `breaks`."""
    j = np.arange(around)
    following = (j + 1) % around
    faces, first = [], 0
    for last in breaks:
        for i in range(first, last - 1):
            a, b, c, d = (
                i * around + j,
                i * around + following,
                (i + 1) * around + j,
                (i + 1) * around + following,
            )
            faces += [np.stack([b, a, c], 1), np.stack([b, c, d], 1)]
        first = last
    return np.concatenate(faces).astype(np.int32)


@cache
def _primitives() -> tuple[tuple[Float, Int], ...]:
    """Solids of about unit radius: a ball, a capsule, and a can and a box with sharp edges."""
    ball = trimesh.creation.icosphere(subdivisions=2)
    capsule = trimesh.creation.capsule(height=1.5, radius=0.4, count=[12, 12])
    capsule.vertices -= capsule.vertices.mean(axis=0)
    can = trimesh.creation.cylinder(radius=0.5, height=1.6, sections=20)
    box = trimesh.creation.box((1.2, 1.2, 1.2)).subdivide()
    sharp = [
        (mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3)) for mesh in (can, box)
    ]
    smooth = [(mesh.vertices, mesh.faces) for mesh in (ball, capsule)]
    return tuple((np.asarray(v, np.float32), np.asarray(f, np.int32)) for v, f in (*smooth, *sharp))


def _object(rng: np.random.Generator, centre: NDArray[np.float64], radius: float) -> Part:
    """A coloured solid of random kind, proportions, orientation and texture around `centre`."""
    unit, faces = _primitives()[int(rng.integers(4))]
    turn = rotation_matrix(rng.normal(0, 1.5, 3))
    vertices = (unit * rng.uniform(0.45, 1.2, 3) * radius) @ turn.T + centre
    vertices[:, 2] = np.maximum(vertices[:, 2], _CLEARANCE)
    colours = palette(rng, 3)
    wave = np.sin(unit @ rng.normal(0, 4, 3) + rng.uniform(0, 6))
    blend = (wave > 0 if rng.random() < 0.5 else 0.5 + 0.5 * wave)[:, None]
    table = colours[0] + blend * (colours[1] - colours[0]) if rng.random() < 0.7 else colours[:1]
    return Part(
        vertices.astype(np.float32), faces, linear(np.broadcast_to(table, vertices.shape)).astype(np.float32)
    )


def occluder(rng: np.random.Generator, annotation: Annotation, size: int) -> Part | None:
    """An object in front of or touching the hand that hides at most 35 % of it, or None if none fits."""
    faces = shipped_hand().faces.numpy()
    half = (size // 2, size // 2)  # a quarter of the pixels is accurate enough
    K = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]]) @ annotation.K
    hand_depth, hand_faces = trace(annotation.vertices, faces, K, half)
    hand = hand_faces >= 0
    middle = annotation.vertices.mean(axis=0)
    for widen in (0.9, 1.2, 1.5, 1.9):
        target = annotation.vertices[rng.integers(len(annotation.vertices))]
        radius = rng.uniform(0.012, 0.045)
        centre = middle + widen * (target - middle)
        centre[2] = target[2] + rng.uniform(-0.05 - radius, 0.01)
        part = _object(rng, centre, radius)
        depth, _ = trace(part.vertices, part.faces, K, half)
        cover = float((depth < hand_depth)[hand].mean()) if hand.any() else 1.0
        if cover <= MAX_COVER:
            return part
    return None
