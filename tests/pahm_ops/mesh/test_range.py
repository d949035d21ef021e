"""Index tables of meshes with coordinates of every size and place that float64 holds."""

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from pahm_ops.mesh import MeshHierarchy, spiral_indices
from pahm_ops.mesh._checks import compiled_tables

LARGEST = np.finfo(np.float64).max
needs_compiled = pytest.mark.skipif(compiled_tables() is None, reason="installed without a compiler")


@pytest.fixture(params=["compiled", "reference"])
def tables(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr("pahm_ops.mesh.spirals.compiled_tables", lambda: None)
    elif compiled_tables() is None:
        pytest.skip("installed without a compiler")


def bumpy_sphere() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    mesh = trimesh.creation.icosphere(2)
    noise = np.random.default_rng(0).normal(size=mesh.vertices.shape) * 0.02
    # Multiples of 2^-24, so that adding 2^20, or scaling to the smallest numbers, rounds nothing away.
    return np.round(np.ldexp(mesh.vertices + noise, 24)) * 2.0**-24, np.array(mesh.faces)


def itself(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    return vertices


def flat(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    return vertices * [1, 1, 0]


# Where the mesh is moved, and the mesh of ordinary size that has the same shape.
PLACES = {
    "subnormal": (lambda v: np.ldexp(v, -1050), itself),
    "small": (lambda v: np.ldexp(v, -600), itself),
    "fourth power overflows": (lambda v: np.ldexp(v, 260), itself),
    "square overflows": (lambda v: np.ldexp(v, 520), itself),
    "largest": (lambda v: np.ldexp(v, 1022), itself),
    "far from the origin": (lambda v: np.ldexp(v + 2.0**20, 480), itself),
    "small, and far away on an axis": (lambda v: np.ldexp(flat(v), -600) + np.array([0, 0, 3]), flat),
    "corners of all there is": (
        lambda v: np.where(v > 0, 1, -1) * 2.0**1023,
        lambda v: np.where(v > 0, 1, -1),
    ),
}


@needs_compiled
@pytest.mark.parametrize("place", PLACES)
def test_levels_do_not_depend_on_size_and_place(place):
    vertices, faces = bumpy_sphere()
    sizes = (162, 80, 40)
    move, alike = PLACES[place]
    found = MeshHierarchy.build(move(vertices), faces, sizes)
    for up in found.up:
        assert np.abs(up.sum(axis=1) - 1).max() <= 1e-12
    expected = MeshHierarchy.build(alike(vertices), faces, sizes)
    for s in (0, 1):
        assert np.array_equal(found.selection(s + 1), expected.selection(s + 1))
        assert np.array_equal(found.faces[s + 1], expected.faces[s + 1])
        assert abs(found.up[s] - expected.up[s]).max() <= 1e-9


@pytest.mark.parametrize("place", PLACES)
def test_nearest_vertices_do_not_depend_on_size_and_place(tables, place):
    move, alike = PLACES[place]
    vertices, _ = bumpy_sphere()
    found = spiral_indices([[0, 1, 2]], 20, 1, move(vertices))
    vertices = alike(vertices)
    squared = ((vertices[:, None] - vertices) ** 2).sum(-1)
    np.fill_diagonal(squared, -1)
    assert np.array_equal(found, np.argsort(squared, axis=1, kind="stable")[:, :20])


@needs_compiled
@pytest.mark.parametrize("size", [5e-324, 1e-320, 1e-200, 1.0, 1e150, 1e200, LARGEST / 8])
def test_nearest_point_of_two_triangles(size):
    vertices = np.array([[0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 0, 3], [4, 0, 3], [0, 4, 3.0]])
    queries = np.array([[1, 1, 0], [1, 1, 2], [4, 4, -1], [0, -4, 3.0]])
    corners, weights = compiled_tables().closest(vertices * size, [[0, 1, 2], [3, 4, 5]], queries * size)
    assert corners[:, 0].tolist() == [0, 3, 0, 3]
    points = (vertices[corners] * weights[..., None]).sum(1)
    assert np.abs(points - [[1, 1, 0], [1, 1, 3], [2, 2, 0], [0, 0, 3]]).max() <= 1e-12


@needs_compiled
def test_nearest_point_of_a_triangle_whose_area_vanishes():
    vertices = np.array([[1e-159, 0, 0], [1, 0, 0], [0, 0, 1e-159]])
    corners, weights = compiled_tables().closest(vertices, [[0, 1, 2]], [[0.25, 0, 0]])
    assert (vertices[corners[0]] * weights[0][:, None]).sum(0) == pytest.approx([0.25, 0, 0], abs=1e-12)


@needs_compiled
def test_points_far_from_a_small_mesh_have_a_nearest_point():
    vertices = np.random.default_rng(0).random((9, 3)) * 1e-300
    queries = np.array([[LARGEST, 0, 0], [-LARGEST, LARGEST, 1], [1e-300, 1e300, 0]])
    corners, weights = compiled_tables().closest(vertices, np.arange(9).reshape(3, 3), queries)
    assert ((corners >= 0) & (corners < 9)).all()
    assert (weights >= 0).all()
    assert np.abs(weights.sum(1) - 1).max() <= 1e-12


@needs_compiled
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_compiled_tables_refuse_points_that_are_not_finite(value):
    vertices, faces = np.random.default_rng(0).random((40, 3)), [[0, 1, 2]]
    vertices[7, 1] = value
    message = rf"points must be finite, got {value} at point 7"
    for call in (
        lambda: compiled_tables().closest(vertices, faces, np.zeros((1, 3))),
        lambda: compiled_tables().closest(np.zeros((3, 3)), faces, vertices),
        lambda: compiled_tables().levels(vertices, faces, [30]),
        lambda: compiled_tables().spirals(faces, 40, 20, 1, vertices),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@needs_compiled
def test_compiled_levels_of_nothing():
    with pytest.raises(ValueError, match="keeps its topology down to 0 vertices, got size -1"):
        compiled_tables().levels(np.zeros((0, 3)), np.zeros((0, 3), int), [-1])
    ((selection, faces),) = compiled_tables().levels(np.zeros((0, 3)), np.zeros((0, 3), int), [0])
    assert (selection.shape, faces.shape) == ((0,), (0, 3))


def test_a_table_of_vertices_that_no_face_has_is_refused_before_it_is_made(tables):
    message = "vertices are needed: vertex 2 belongs to no face"
    with pytest.raises(ValueError, match=message):
        spiral_indices([[0, 1, 2**31 - 2]], 2)
