"""Mesh hierarchies: every level's size, topology and shape, and the transforms between levels."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from scipy.spatial import Delaunay

from pahm_ops.mesh import MeshHierarchy, spiral_indices
from pahm_ops.mesh._checks import compiled_tables
from pahm_ops.reference.spiral_indices import ordered_neighbors

Mesh = tuple[NDArray[np.float64], NDArray[np.int64]]

needs_compiled = pytest.mark.skipif(compiled_tables() is None, reason="installed without a compiler")


def sphere(subdivisions: int) -> Mesh:
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.array(mesh.vertices), np.array(mesh.faces)


def grid(rows: int, columns: int, hole: bool = False) -> Mesh:
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    vertices = np.stack([i, j, 0 * i], -1).reshape(-1, 3).astype(float)
    corner = (i * columns + j)[:-1, :-1].reshape(-1)
    faces = np.concatenate(
        [
            np.stack([corner, corner + columns, corner + columns + 1], -1),
            np.stack([corner, corner + columns + 1, corner + 1], -1),
        ]
    )
    if hole:
        center = vertices[faces].mean(1)
        inside = np.abs(center[:, :2] - [(rows - 1) / 2, (columns - 1) / 2]).max(1) < 1.2
        faces = faces[~inside]
        used = np.unique(faces)
        vertices, faces = vertices[used], np.searchsorted(used, faces)
    return vertices, faces


def bumpy(mesh: Mesh, seed: int, scale: float) -> Mesh:
    return mesh[0] + np.random.default_rng(seed).normal(size=mesh[0].shape) * scale, mesh[1]


def torus() -> Mesh:
    mesh = trimesh.creation.torus(1.0, 0.3)
    return np.array(mesh.vertices), np.array(mesh.faces)


def tube() -> Mesh:
    mesh = trimesh.creation.torus(1.0, 0.01, major_sections=40, minor_sections=3)
    return np.array(mesh.vertices), np.array(mesh.faces)


def scattered() -> Mesh:
    points = np.random.default_rng(5).random((500, 2))
    return np.column_stack([points, np.sin(4 * points[:, 0])]), Delaunay(points).simplices.astype(np.int64)


def pair() -> Mesh:
    (a, f), (b, g) = sphere(2), grid(9, 9)
    return np.concatenate([a, b * 0.2 + np.array([2.0, 0, 0])]), np.concatenate([f, g + len(a)])


# Name: mesh, sizes below the finest, boundary loops, Euler characteristic.
MESHES = {
    "sphere": (lambda: sphere(3), (321, 160, 80, 4), 0, 2),
    "noisy sphere": (lambda: bumpy(sphere(3), 0, 0.05), (500, 20, 5, 4), 0, 2),
    "torus": (torus, (500, 250, 30), 0, 0),
    "grid": (lambda: grid(14, 11), (77, 38, 10, 3), 1, 1),
    "rough grid": (lambda: bumpy(grid(20, 20), 1, 0.3), (200, 100, 50), 1, 1),
    "ring": (lambda: grid(15, 15, hole=True), (100, 50, 25), 2, 0),
    "scattered": (scattered, (250, 125, 62), 1, 1),
    "two components": (pair, (121, 60, 30), 1, 3),
    "strip": (lambda: grid(2, 389), (389, 195, 98), 1, 1),
    # The cheapest collapses pinch the strip, and close the tube's rings of three edges.
    "thin strip": (lambda: (grid(40, 3)[0] * [1, 0.01, 1], grid(40, 3)[1]), (60, 30, 8), 1, 1),
    "thin tube": (tube, (60, 30, 15), 0, 0),
}


class Built(NamedTuple):
    hierarchy: MeshHierarchy
    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]
    sizes: tuple[int, ...]
    loops: int
    euler: int


@pytest.fixture(scope="module", params=MESHES)
def built(request):
    if compiled_tables() is None:
        pytest.skip("installed without a compiler")
    make, sizes, loops, euler = MESHES[request.param]
    vertices, faces = make()
    sizes = (len(vertices), *sizes)
    return Built(MeshHierarchy.build(vertices, faces, sizes), vertices, faces, sizes, loops, euler)


def boundary_loops(faces: NDArray[np.int64]) -> int:
    directed = {(a, b) for face in faces.tolist() for a, b in zip(face, face[1:] + face[:1], strict=True)}
    after = {b: a for a, b in directed if (b, a) not in directed}
    loops = 0
    while after:
        at = next(iter(after))
        while at in after:
            at = after.pop(at)
        loops += 1
    return loops


def test_levels_have_the_asked_sizes_and_the_topology_of_the_input(built):
    hierarchy = built.hierarchy
    assert hierarchy.sizes == built.sizes
    assert tuple(len(level) for level in hierarchy.vertices) == built.sizes
    assert np.array_equal(hierarchy.vertices[0], built.vertices)
    assert np.array_equal(hierarchy.faces[0], built.faces)
    for level_vertices, level_faces in zip(hierarchy.vertices, hierarchy.faces, strict=True):
        assert level_vertices.dtype == np.float64
        assert level_faces.dtype == np.int64
        assert np.array_equal(np.unique(level_faces), np.arange(len(level_vertices)))
        ordered_neighbors(level_faces, len(level_vertices))  # raises unless manifold
        edges = {frozenset(e) for a, b, c in level_faces.tolist() for e in ((a, b), (b, c), (c, a))}
        assert len(level_vertices) - len(edges) + len(level_faces) == built.euler
        assert boundary_loops(level_faces) == built.loops


def test_down_selects(built):
    hierarchy, vertices = built.hierarchy, built.vertices
    for s, down in enumerate(hierarchy.down):
        assert down.shape == (hierarchy.sizes[s + 1], hierarchy.sizes[s])
        assert down.dtype == np.float64
        assert np.array_equal(down.data, np.ones(down.shape[0]))
        assert np.array_equal(down.indptr, np.arange(down.shape[0] + 1))
        assert np.array_equal(down @ hierarchy.vertices[s], hierarchy.vertices[s + 1])
    for level in range(len(hierarchy.sizes)):
        selection = hierarchy.selection(level)
        assert selection.dtype == np.int64
        assert (np.diff(selection) > 0).all()
        assert np.array_equal(vertices[selection], hierarchy.vertices[level])
    assert np.array_equal(hierarchy.selection(0), np.arange(len(vertices)))


def test_up_rows_are_barycentric(built):
    hierarchy = built.hierarchy
    for s, up in enumerate(hierarchy.up):
        assert up.shape == (hierarchy.sizes[s], hierarchy.sizes[s + 1])
        assert up.has_canonical_format
        assert up.data.min() > 0
        assert up.data.max() <= 1
        assert np.abs(up.sum(axis=1) - 1).max() <= 1e-12
        assert np.diff(up.indptr).max() <= 3
        faces = {frozenset(face) for face in hierarchy.faces[s + 1].tolist()}
        for row in range(up.shape[0]):
            corners = set(up.indices[up.indptr[row] : up.indptr[row + 1]].tolist())
            assert any(corners <= face for face in faces)
        identity = (hierarchy.down[s] @ up).toarray()
        assert np.array_equal(identity, np.eye(len(identity)))


def test_up_commutes_with_translation(built):
    hierarchy = built.hierarchy
    offset = np.array([0.3, -20.0, 5.0])
    for s, up in enumerate(hierarchy.up):
        coarse = hierarchy.vertices[s + 1]
        assert np.abs(up @ (coarse + offset) - (up @ coarse + offset)).max() <= 1e-11


def distances_to_surface(
    points: NDArray[np.float64], vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Of every point to every triangle: the plane's nearest point where it lies inside, else the edges'."""
    best = np.full((len(points), len(faces)), np.inf)
    for k in range(3):
        start, end = vertices[faces[:, k]], vertices[faces[:, (k + 1) % 3]]
        step = end - start
        length = np.maximum((step**2).sum(-1), 1e-300)
        along = ((points[:, None] - start) * step).sum(-1) / length
        nearest = start + np.clip(along, 0, 1)[..., None] * step
        best = np.minimum(best, np.linalg.norm(points[:, None] - nearest, axis=-1))
    for f, (a, b, c) in enumerate(vertices[faces]):
        basis = np.stack([b - a, c - a], 1)
        if np.linalg.matrix_rank(basis) < 2:
            continue
        weights = (points - a) @ np.linalg.pinv(basis).T
        inside = (weights >= 0).all(1) & (weights.sum(1) <= 1)
        distance = np.linalg.norm(points - a - weights @ basis.T, axis=1)
        best[inside, f] = np.minimum(best[inside, f], distance[inside])
    return best.min(1)


def test_up_gives_the_nearest_point(built):
    hierarchy = built.hierarchy
    for s, up in enumerate(hierarchy.up):
        fine, coarse = hierarchy.vertices[s], hierarchy.vertices[s + 1]
        reached = np.linalg.norm(up @ coarse - fine, axis=1)
        expected = distances_to_surface(fine, coarse, hierarchy.faces[s + 1])
        assert np.abs(reached - expected).max() <= 1e-9


@needs_compiled
def test_nearest_point_of_a_soup_with_degenerate_faces():
    rng = np.random.default_rng(2)
    vertices = rng.random((60, 3))
    faces = rng.integers(0, 60, (80, 3))
    faces[:5] = faces[:5, :1]  # points
    faces[5:15, 2] = faces[5:15, 1]  # segments
    vertices[faces[15, 2]] = vertices[faces[15, :2]].mean(0)  # three vertices on a line
    points = rng.random((300, 3)) * 2 - 0.5
    corners, weights = compiled_tables().closest(vertices, faces, points)
    assert weights.min() >= 0
    assert np.abs(weights.sum(1) - 1).max() <= 1e-12
    reached = np.linalg.norm((vertices[corners] * weights[..., None]).sum(1) - points, axis=1)
    assert np.abs(reached - distances_to_surface(points, vertices, faces)).max() <= 1e-9


def normals(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return np.cross(b - a, c - a)


@needs_compiled
def test_faces_keep_their_side():
    ball = MeshHierarchy.build(*sphere(3), sizes=(642, 321, 160, 80, 40))
    for v, f in zip(ball.vertices, ball.faces, strict=True):
        assert ((normals(v, f) * v[f].mean(1)).sum(1) > 0).all()
    flat = MeshHierarchy.build(*grid(20, 20), sizes=(400, 200, 100, 50))
    for v, f in zip(flat.vertices, flat.faces, strict=True):
        assert (normals(v, f)[:, 2] > 0).all()


@needs_compiled
def test_quadrics_keep_sharp_corners():
    mesh = trimesh.creation.box()
    for _ in range(4):
        mesh = mesh.subdivide()
    vertices, faces = np.array(mesh.vertices), np.array(mesh.faces)
    hierarchy = MeshHierarchy.build(vertices, faces, (len(vertices), 400, 60))
    for v, f in zip(hierarchy.vertices, hierarchy.faces, strict=True):
        assert (np.abs(v) == 0.5).all(axis=1).sum() == 8
        assert trimesh.Trimesh(v, f, process=False).volume == pytest.approx(1, abs=1e-9)


@needs_compiled
def test_boundary_planes_keep_the_outline():
    vertices, faces = grid(16, 16)
    hierarchy = MeshHierarchy.build(vertices, faces, (256, 64, 30))
    for v, f in zip(hierarchy.vertices, hierarchy.faces, strict=True):
        assert trimesh.Trimesh(v, f, process=False).area == pytest.approx(225, abs=1e-9)


@needs_compiled
def test_flat_regions_stay_evenly_covered():
    vertices, faces = grid(30, 30)
    hierarchy = MeshHierarchy.build(vertices, faces, (900, 225))
    inner = hierarchy.vertices[1][:, :2]
    gaps = np.linalg.norm(vertices[:, None, :2] - inner[None], axis=-1).min(1)
    assert gaps.max() < 3.2


@needs_compiled
def test_same_input_same_levels():
    vertices, faces = bumpy(sphere(3), 7, 0.02)
    first = MeshHierarchy.build(vertices, faces, (642, 300, 100))
    again = MeshHierarchy.build(np.asfortranarray(vertices), faces.astype(np.int32).tolist(), [642, 300, 100])
    for name, array in first.to_arrays().items():
        assert np.array_equal(array, again.to_arrays()[name]), name


@needs_compiled
def test_one_vertex_at_a_time_gives_the_same_levels():
    vertices, faces = bumpy(sphere(2), 7, 0.02)
    straight = MeshHierarchy.build(vertices, faces, (162, 60))
    stepwise = MeshHierarchy.build(vertices, faces, range(162, 59, -1))
    assert np.array_equal(straight.faces[-1], stepwise.faces[-1])
    assert np.array_equal(straight.selection(1), stepwise.selection(102))


@needs_compiled
def test_scale_and_place_do_not_matter():
    vertices, faces = bumpy(sphere(3), 3, 0.02)
    sizes = (642, 200)
    here = MeshHierarchy.build(vertices, faces, sizes).selection(1)
    there = MeshHierarchy.build(vertices * 2.0**-20 + 2.0**-3, faces, sizes).selection(1)
    assert len(np.intersect1d(here, there)) >= 195


@needs_compiled
def test_spirals_of_a_level():
    hierarchy = MeshHierarchy.build(*sphere(2), sizes=(162, 81))
    expected = spiral_indices(hierarchy.faces[1], 9, 2, hierarchy.vertices[1])
    assert np.array_equal(hierarchy.spiral_indices(1, 9, 2), expected)
    for call in (lambda: hierarchy.spiral_indices(2, 9), lambda: hierarchy.selection(-1)):
        with pytest.raises(IndexError, match=r"level must lie in \[0, 2\)"):
            call()


@needs_compiled
@pytest.mark.parametrize(
    ("faces", "message"),
    [
        ([[0, 1, 2], [1, 0, 3], [0, 1, 4]], r"edge \(0, 1\) belongs to 3 faces \(0, 1, 2\)"),
        ([[0, 1, 2], [1, 2, 3], [2, 1, 4]], r"edge \(1, 2\) belongs to 3 faces \(0, 1, 2\)"),
        ([[0, 1, 2], [1, 2, 3], [0, 3, 4]], r"faces 0 and 1 run along edge \(1, 2\) in the same direction"),
        ([[0, 1, 2], [2, 3, 4]], r"the faces around vertex 2 form more than one fan"),
        ([[0, 1, 2], [1, 3, 3], [2, 3, 4]], r"three different vertices, got face 1 = \(1, 3, 3\)"),
        ([[0, 1, 2], [1, 3, 2]], r"vertices must all belong to a face, but vertex 4 belongs to none"),
    ],
)
def test_refuses_what_is_not_manifold(faces, message):
    with pytest.raises(ValueError, match=message):
        MeshHierarchy.build(np.random.default_rng(0).random((5, 3)), faces, (5, 4))


@needs_compiled
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vertices": np.zeros((12, 2))}, ValueError, r"vertices must have shape \(N, 3\), got \(12, 2\)"),
        ({"vertices": np.full((12, 3), np.inf)}, ValueError, r"vertices must be finite, got .* at vertex 0"),
        ({"vertices": np.zeros((12, 3), complex)}, TypeError, "vertices must be real numbers"),
        ({"vertices": np.zeros((11, 3))}, IndexError, r"faces must index the 11 vertices from 0, got face 0"),
        ({"faces": np.zeros((2, 4), int)}, ValueError, r"faces must have shape \(F, 3\), got \(2, 4\)"),
        ({"faces": np.zeros((2, 3))}, TypeError, "faces must be integers, got dtype float64"),
        ({"sizes": (778, 389)}, ValueError, r"sizes must start at the number of vertices, 12, got \(778, 3"),
        ({"sizes": ()}, ValueError, r"sizes must start at the number of vertices, 12, got \(\)"),
        ({"sizes": (12, 8, 8)}, ValueError, r"sizes must descend, got \(12, 8, 8\)"),
        ({"sizes": (12, 0)}, ValueError, "sizes must be at least 1, got 0"),
        ({"sizes": (12, 6.0)}, TypeError, "sizes must be an integer, got float 6.0"),
        ({"sizes": (12, 6, 3)}, ValueError, "keeps its topology down to 4 vertices, got size 3"),
    ],
)
def test_refuses_bad_arguments(change, error, message):
    vertices, faces = sphere(0)
    arguments = {"vertices": vertices, "faces": faces, "sizes": (12, 6), **change}
    with pytest.raises(error, match=message):
        MeshHierarchy.build(**arguments)


@needs_compiled
def test_every_component_stays():
    vertices, faces = pair()
    with pytest.raises(ValueError, match="keeps its topology down to 7 vertices, got size 6"):
        MeshHierarchy.build(vertices, faces, (len(vertices), 6))


@needs_compiled
def test_vertices_in_one_place_are_coarsened_too():
    _, faces = sphere(1)
    hierarchy = MeshHierarchy.build(np.zeros((42, 3)), faces, (42, 10))
    ordered_neighbors(hierarchy.faces[1], 10)
    assert np.abs(hierarchy.up[0].sum(axis=1) - 1).max() == 0


@needs_compiled
def test_save_and_load(tmp_path, monkeypatch):
    hierarchy = MeshHierarchy.build(*bumpy(sphere(3), 0, 0.01), sizes=(642, 321, 160))
    path = tmp_path / "levels.bin"
    hierarchy.save(path)
    assert path.stat().st_size < 60_000
    monkeypatch.setattr("pahm_ops.mesh.hierarchy.compiled_tables", lambda: None)
    loaded = MeshHierarchy.load(path)
    assert loaded.sizes == hierarchy.sizes
    for name in ("vertices", "faces", "down", "up"):
        for ours, theirs in zip(getattr(hierarchy, name), getattr(loaded, name), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            assert abs(ours - theirs).max() == 0


def test_load_names_a_file_that_is_no_hierarchy(tmp_path):
    path = tmp_path / "other.npz"
    with pytest.raises(FileNotFoundError):
        MeshHierarchy.load(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a whole .npz file"):
        MeshHierarchy.load(path)
    np.savez(path, vertices=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="holds no array 'faces_0'"):
        MeshHierarchy.load(path)
    np.savez(path, vertices=np.zeros((3, 3)), faces_0=[[0, 1, 2]], down_0=[0, 7])
    with pytest.raises(ValueError, match="down_0 does not select vertices of level 0"):
        MeshHierarchy.load(path)
    np.savez(path, vertices=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"array 'vertices': its header is not that of an array"):
        MeshHierarchy.load(path)
    arrays = {
        "faces_1": np.zeros((0, 3), int),
        "down_0": [0],
        "up_0_data": [1.0] * 3,
        "up_0_indptr": range(4),
    }
    np.savez(path, vertices=np.zeros((3, 3)), faces_0=[[0, 1, 2]], up_0_indices=[0, 0, 9], **arrays)
    with pytest.raises(ValueError, match=r"MeshHierarchy\.save wrote"):
        MeshHierarchy.load(path)


def test_build_says_that_nothing_was_compiled(monkeypatch):
    monkeypatch.setattr("pahm_ops.mesh.hierarchy.compiled_tables", lambda: None)
    with pytest.raises(RuntimeError, match=r"needs the compiled module .* use MeshHierarchy\.load"):
        MeshHierarchy.build(*sphere(0), sizes=(12, 6))
