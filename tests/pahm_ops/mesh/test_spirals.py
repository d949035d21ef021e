"""Spiral tables: the compiled builder and the plain-Python one against OpenMesh and the definition."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial import Delaunay

from pahm_ops.mesh import MeshHierarchy, spiral_indices
from pahm_ops.mesh._checks import compiled_tables
from pahm_ops.reference import spiral_indices as reference

Mesh = tuple[NDArray[np.float64], NDArray[np.int64]]


@pytest.fixture(params=["compiled", "reference"])
def builder(request, monkeypatch):
    """Runs a test once with each implementation behind spiral_indices."""
    if request.param == "reference":
        monkeypatch.setattr("pahm_ops.mesh.spirals.compiled_tables", lambda: None)
    elif compiled_tables() is None:
        pytest.skip("installed without a compiler")
    return request.param


def sphere(subdivisions: int) -> Mesh:
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.array(mesh.vertices), np.array(mesh.faces)


def torus() -> Mesh:
    mesh = trimesh.creation.torus(1.0, 0.3, major_sections=12, minor_sections=7)
    return np.array(mesh.vertices), np.array(mesh.faces)


def scattered(count: int, seed: int) -> Mesh:
    """A disc of irregular triangles: Delaunay's of random points."""
    points = np.random.default_rng(seed).random((count, 2))
    return np.column_stack([points, points[:, :1] ** 2]), Delaunay(points).simplices.astype(np.int64)


def decimated() -> Mesh:
    if compiled_tables() is None:
        return scattered(90, 9)
    hierarchy = MeshHierarchy.build(*sphere(3), sizes=(642, 150))
    return hierarchy.vertices[1], hierarchy.faces[1]


def shuffled(mesh: Mesh, rng: np.random.Generator) -> Mesh:
    """The same surface: vertices and faces in another order, faces from another corner."""
    vertices, faces = mesh
    place = rng.permutation(len(vertices))
    moved = np.empty_like(vertices)
    moved[place] = vertices
    faces = place[faces][rng.permutation(len(faces))]
    return moved, np.stack([np.roll(face, rng.integers(3)) for face in faces])


MESHES = {
    "sphere": lambda: sphere(2),
    "torus": torus,
    "disc": lambda: scattered(120, 1),
    "small disc": lambda: scattered(30, 2),
    "decimated": decimated,
}


TETRAHEDRON = [[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]]

# Faces in a random order and from a random corner, with the rows that SpiralNet++'s walk gives over the
# neighbours of OpenMesh 1.2.1: an icosahedron, and a grid of 4 x 4 vertices.
ICOSAHEDRON = [
    [11, 2, 4], [6, 3, 2], [7, 8, 6], [10, 7, 6], [7, 10, 0], [6, 8, 3], [9, 5, 4], [9, 4, 3],
    [5, 11, 4], [0, 5, 1], [7, 0, 1], [2, 3, 4], [2, 10, 6], [11, 5, 0], [3, 8, 9], [1, 8, 7],
    [0, 10, 11], [11, 10, 2], [5, 9, 1], [8, 1, 9],
]  # fmt: skip
ICOSAHEDRON_ROWS = [
    [0, 10, 7, 1, 5, 11, 2], [1, 9, 5, 0, 7, 8, 3], [2, 11, 4, 3, 6, 10, 0], [3, 8, 6, 2, 4, 9, 1],
    [4, 2, 11, 5, 9, 3, 6], [5, 9, 4, 11, 0, 1, 8], [6, 2, 3, 8, 7, 10, 11], [7, 1, 0, 10, 6, 8, 9],
    [8, 1, 7, 6, 3, 9, 5], [9, 8, 3, 4, 5, 1, 7], [10, 2, 6, 7, 0, 11, 4], [11, 10, 0, 5, 4, 2, 6],
]  # fmt: skip
GRID = [
    [5, 4, 9], [10, 5, 9], [5, 1, 0], [5, 0, 4], [10, 11, 6], [7, 6, 11], [8, 9, 4], [10, 6, 5],
    [10, 14, 15], [9, 8, 13], [7, 2, 6], [8, 12, 13], [9, 13, 14], [9, 14, 10], [10, 15, 11], [6, 2, 1],
    [1, 5, 6], [3, 2, 7],
]  # fmt: skip
GRID_ROWS = [
    [0, 1, 5, 4, 2, 6], [1, 2, 6, 5, 0, 3], [2, 3, 7, 6, 1, 11], [3, 7, 2, 11, 6, 1],
    [4, 0, 5, 9, 8, 1], [5, 6, 10, 9, 4, 0], [6, 1, 2, 7, 11, 10], [7, 11, 6, 2, 3, 15],
    [8, 4, 9, 13, 12, 0], [9, 14, 13, 8, 4, 5], [10, 15, 14, 9, 5, 6], [11, 15, 10, 6, 7, 14],
    [12, 8, 13, 4, 9, 14], [13, 12, 8, 9, 14, 4], [14, 13, 9, 10, 15, 12], [15, 14, 10, 11, 13, 9],
]  # fmt: skip


@pytest.mark.parametrize(("faces", "rows"), [(ICOSAHEDRON, ICOSAHEDRON_ROWS), (GRID, GRID_ROWS)])
def test_order_is_openmesh(builder, faces, rows):
    table = spiral_indices(faces, len(rows[0]))
    assert table.dtype == np.int64
    assert table.tolist() == rows


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("length", "dilation"), [(1, 1), (2, 1), (9, 1), (27, 1), (9, 2), (5, 3)])
def test_compiled_matches_reference(name, length, dilation):
    if compiled_tables() is None:
        pytest.skip("installed without a compiler")
    vertices, faces = MESHES[name]()
    for seed in range(3):
        table = spiral_indices(faces, length, dilation, vertices)
        assert table.shape == (len(vertices), length)
        assert np.array_equal(
            table, reference.spiral_indices(faces, len(vertices), length, dilation, vertices)
        )
        vertices, faces = shuffled((vertices, faces), np.random.default_rng(seed))


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(40)), st.lists(st.integers(0, 2), min_size=40, max_size=40), st.integers(1, 20))
def test_any_face_order(order, corners, length):
    vertices, faces = scattered(25, 4)
    faces = np.stack([np.roll(faces[face], corner) for face, corner in zip(order, corners, strict=True)])
    table = spiral_indices(faces, length, vertices=vertices)
    assert np.array_equal(table, reference.spiral_indices(faces, 25, length, 1, vertices))
    assert np.array_equal(table[:, 0], np.arange(25))
    assert all(len(set(row)) == length for row in table.tolist())


def test_first_ring_is_clockwise_and_starts_by_rule(builder):
    vertices, faces = shuffled(scattered(60, 5), np.random.default_rng(6))
    oriented = {tuple(np.roll(face, k).tolist()) for face in faces for k in range(3)}
    directed = {(a, b) for a, b, _ in oriented}
    neighbors = {v: {w for edge in directed if v in edge for w in edge} - {v} for v in range(60)}
    table = spiral_indices(faces, 27, vertices=vertices).tolist()
    for v, row in enumerate(table):
        ring = row[1 : 1 + len(neighbors[v])]
        assert set(ring) == neighbors[v]
        assert all((v, b, a) in oriented for a, b in pairwise(ring))
        last = [face for face in faces.tolist() if v in face][-1]
        if (v, ring[0]) in directed:
            assert ring[0] == last[(last.index(v) + 1) % 3]
            assert (v, ring[0], ring[-1]) in oriented


def test_dilation_takes_every_second_entry(builder):
    _, faces = sphere(2)
    assert np.array_equal(spiral_indices(faces, 9, 2), spiral_indices(faces, 18)[:, ::2])


def test_shorter_tables_are_prefixes(builder):
    _, faces = sphere(2)
    assert np.array_equal(spiral_indices(faces, 27)[:, :9], spiral_indices(faces, 9))


def nearest_rows(vertices: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    distances = ((vertices[:, None] - vertices[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, -1)
    return np.argsort(distances, axis=1, kind="stable")[:, :count]


def test_rows_of_small_components_are_nearest_vertices(builder):
    vertices, faces = sphere(0)
    vertices = np.concatenate([vertices, vertices + np.array([2.5, 0.1, 0.2]), [[9.0, 9.0, 9.0]]])
    faces = np.concatenate([faces, faces + 12])
    assert np.array_equal(spiral_indices(faces, 14, vertices=vertices), nearest_rows(vertices, 14))
    assert np.array_equal(spiral_indices(faces, 7, 2, vertices), nearest_rows(vertices, 14)[:, ::2])
    # Only the vertex of no face lacks rings for a shorter row.
    table = spiral_indices(faces, 7, vertices=vertices)
    assert np.array_equal(table[:12], spiral_indices(faces[:20], 7))
    assert np.array_equal(table[24], nearest_rows(vertices, 7)[24])


def test_full_row_without_a_next_ring_is_nearest_vertices(builder):
    vertices = np.array([[0.0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 1]])
    assert spiral_indices(TETRAHEDRON, 4, vertices=vertices).tolist() == [
        [0, 3, 2, 1],
        [1, 0, 3, 2],
        [2, 0, 3, 1],
        [3, 0, 2, 1],
    ]


def test_nearest_rows_of_many_points_with_equal_distances(builder):
    vertices = np.stack(np.meshgrid(*[np.arange(5.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    vertices[7] = vertices[90]
    table = spiral_indices(np.zeros((0, 3), dtype=int), 20, vertices=vertices)
    assert np.array_equal(table, nearest_rows(vertices, 20))


def test_length_one_needs_no_vertices(builder):
    assert spiral_indices([[0, 1, 2]], 1).tolist() == [[0], [1], [2]]


def test_vertices_are_asked_for_by_row(builder):
    with pytest.raises(ValueError, match=r"vertices are needed: the rings around vertex 0 run out"):
        spiral_indices(TETRAHEDRON, 4)
    _, faces = sphere(1)
    faces = np.concatenate([faces, [[42, 43, 44]]])
    with pytest.raises(
        ValueError, match=r"vertex 42 run out before its row of length \* dilation = 9 is full"
    ):
        spiral_indices(faces, 9)


@pytest.mark.parametrize(
    "convert",
    [
        lambda faces: faces.tolist(),
        lambda faces: faces.astype(np.uint16),
        lambda faces: np.asfortranarray(faces),
        lambda faces: np.repeat(faces, 2, axis=0)[::2],
        torch.as_tensor,
    ],
)
def test_any_integer_array_serves(builder, convert):
    vertices, faces = sphere(1)
    expected = spiral_indices(faces, 9)
    assert np.array_equal(spiral_indices(convert(faces), 9), expected)
    assert np.array_equal(spiral_indices(faces, 9, vertices=vertices.astype(np.float32)), expected)


TOPOLOGY = {
    "edge of three faces": (
        [[0, 1, 2], [1, 0, 3], [0, 1, 4], [2, 1, 5]],
        r"edge \(0, 1\) belongs to 3 faces \(0, 1, 2\), expected at most 2",
    ),
    "edge of many faces": (
        [[8, 9, v] for v in range(8)],
        r"edge \(8, 9\) belongs to 8 faces \(0, 1, 2, 3, 4, 5, \.\.\.\)",
    ),
    "opposite orientation": (
        [[2, 1, 0], [2, 1, 3]],
        r"faces 0 and 1 run along edge \(1, 2\) in the same direction",
    ),
    "face twice": ([[0, 1, 2], [1, 2, 0]], r"faces 0 and 1 run along edge \(0, 1\) in the same direction"),
    "two fans with boundary": (
        [[0, 1, 2], [0, 3, 4], [1, 5, 2]],
        r"the faces around vertex 0 form more than one fan",
    ),
    "two closed fans": (
        [[3, 1, 2], [3, 2, 0], [3, 0, 1], [3, 4, 5], [3, 5, 6], [3, 6, 4]],
        r"the faces around vertex 3 form more than one fan",
    ),
    "closed and open fan": (
        [[3, 1, 2], [3, 2, 0], [3, 0, 1], [3, 4, 5]],
        r"the faces around vertex 3 form more than one fan",
    ),
    "edge before vertex": ([[0, 1, 2], [1, 2, 3], [0, 3, 4]], r"faces 0 and 1 run along edge \(1, 2\)"),
    "repeated vertex": ([[0, 1, 2], [2, 1, 1]], r"three different vertices, got face 1 = \(2, 1, 1\)"),
}


@pytest.mark.parametrize("name", TOPOLOGY)
def test_refuses_what_is_not_manifold(builder, name):
    faces, message = TOPOLOGY[name]
    with pytest.raises(ValueError, match=message):
        spiral_indices(faces, 1, vertices=np.random.default_rng(0).random((12, 3)))


TRIANGLE = [[0, 1, 2]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0, 1]], 1), ValueError, r"faces must have shape \(F, 3\), got \(1, 2\)"),
        (([0, 1, 2], 1), ValueError, r"faces must have shape \(F, 3\), got \(3,\)"),
        (([[0.0, 1, 2]], 1), TypeError, "faces must be integers, got dtype float64"),
        (([[True, False, True]], 1), TypeError, "faces must be integers, got dtype bool"),
        (([[0, 1, 2], [0, -1, 1]], 1), IndexError, r"from 0, got face 1 = \(0, -1, 1\)"),
        (([[0, 1, 2**31]], 1), IndexError, r"fewer than 2\^31 vertices from 0, got face 0"),
        ((TRIANGLE, 1, 1, np.zeros((2, 3))), IndexError, r"the 2 vertices from 0, got face 0 = \(0, 1, 2\)"),
        ((TRIANGLE, 0), ValueError, "length must be at least 1, got 0"),
        ((TRIANGLE, 1, -2), ValueError, "dilation must be at least 1, got -2"),
        ((TRIANGLE, 1.0), TypeError, "length must be an integer, got float 1.0"),
        ((TRIANGLE, 1, None), TypeError, "dilation must be an integer, got NoneType None"),
        ((TRIANGLE, 2, 2), ValueError, r"at most the number of vertices, 3, got 2 \* 2"),
        ((np.zeros((0, 3), int), 1), ValueError, r"at most the number of vertices, 0, got 1 \* 1"),
        ((TRIANGLE, 1, 1, np.zeros((3, 2))), ValueError, r"vertices must have shape \(N, 3\), got \(3, 2\)"),
        ((TRIANGLE, 1, 1, [["a"] * 3] * 3), TypeError, "vertices must be real numbers, got dtype <U1"),
        ((TRIANGLE, 1, 1, [[0, 0, 0], [0, np.nan, 1], [1, 1, 1]]), ValueError, r"finite, got .* at vertex 1"),
    ],
)
def test_refuses_bad_arguments(builder, arguments, error, message):
    with pytest.raises(error, match=message):
        spiral_indices(*arguments)


def test_import_leaves_trimesh_alone():
    code = "import sys, pahm_ops.mesh; sys.exit('trimesh' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent).returncode == 0
