from __future__ import annotations

import numpy as np
import pytest
import trimesh

from pahm.synth.render import (
    Light,
    Scene,
    ambient_occlusion,
    render_mesh,
    sphere_directions,
    trace,
    vertex_normals,
)

SIZE = (48, 64)
K = np.array([[60.0, 0, 31.3], [0, 58.0, 22.6], [0, 0, 1]])
FLAT = Light(colour=(0, 0, 0), ambient=(1, 1, 1))


def at_pixels(points, depth=1.0, camera=K):
    """Vertices at the given depth that project to the pixels `points`."""
    homogeneous = np.concatenate([np.asarray(points, float), np.ones((len(points), 1))], axis=1)
    return homogeneous @ np.linalg.inv(camera).T * np.reshape(depth, (-1, 1))


def ball(centre, radius, subdivisions=5):
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return mesh.vertices + centre, np.asarray(mesh.faces)


def test_triangle_covers_exactly_the_pixels_whose_centres_it_contains():
    corners = np.array([[10.3, 4.2], [52.7, 13.4], [21.1, 41.6]])
    mask = render_mesh(at_pixels(corners, [0.5, 2.0, 1.0]), [[0, 1, 2]], K, SIZE).mask
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    sides = [
        (b[0] - a[0]) * (v - a[1]) - (b[1] - a[1]) * (u - a[0])
        for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True)
    ]
    assert np.array_equal(mask, np.all(np.stack(sides) > 0, axis=0))


def test_pixels_are_measured_from_the_centre_of_the_top_left_one():
    square = np.array([[-0.4, -0.4], [0.4, -0.4], [0.4, 0.4], [-0.4, 0.4]])
    for column, row in ((0, 0), (7, 3), (63, 47)):
        corners = at_pixels(square + np.array([column, row]))
        mask = render_mesh(corners, [[0, 1, 2], [0, 2, 3]], K, SIZE).mask
        assert np.argwhere(mask).tolist() == [[row, column]]


def test_sphere_has_its_analytic_silhouette():
    centre, radius = np.array([0.05, -0.04, 0.8]), 0.2
    mask = render_mesh(*ball(centre, radius), K, SIZE).mask
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(K).T
    along = rays @ centre
    inside = along**2 > (rays**2).sum(-1) * (centre @ centre - radius**2)
    assert (mask != inside).sum() <= 4
    assert abs(int(mask.sum()) - int(inside.sum())) <= 4


def test_depth_is_z_and_faces_are_the_nearest():
    far = at_pixels([[-5, -5], [80, -5], [80, 60], [-5, 60]], [1.0, 1.4, 1.9, 1.2])
    near = at_pixels([[20, 10], [40, 10], [30, 30]], 0.7)
    faces = [[0, 1, 2], [0, 2, 3], [4, 5, 6]]
    result = render_mesh(np.concatenate([far, near]), faces, K, SIZE)
    assert result.mask.all()
    assert set(np.unique(result.faces)) == {0, 1, 2}
    assert np.allclose(result.depth[result.faces == 2], 0.7, atol=1e-5)
    for face in (0, 1):
        a, b, c = far[faces[face]]
        normal = np.cross(b - a, c - a)
        rows, columns = np.nonzero(result.faces == face)
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(K).T
        assert np.allclose(result.depth[rows, columns], (normal @ a) / (rays @ normal), atol=1e-5)


def test_colours_are_interpolated_on_the_surface_not_on_the_screen():
    corners = at_pixels([[5, 5], [60, 8], [12, 45]], [0.5, 3.0, 1.0])
    result = render_mesh(corners, [[0, 1, 2]], K, SIZE, colours=np.eye(3), light=FLAT)
    rows, columns = np.nonzero(result.alpha == 1)
    points = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(K).T
    points *= result.depth[rows, columns][:, None]
    weights = points @ np.linalg.inv(corners)
    assert len(rows) > 500
    assert np.allclose(result.rgb[rows, columns], weights, atol=2e-3)


def test_shading_follows_the_smooth_normal():
    centre, radius = np.array([0.0, 0, 1.0]), 0.3
    light = Light(direction=(0.3, -0.5, -1), colour=(0.8, 0.8, 0.8), ambient=(0.1, 0.1, 0.1))
    result = render_mesh(*ball(centre, radius), K, SIZE, colours=(1, 1, 1), light=light)
    rows, columns = np.nonzero(result.alpha == 1)
    points = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(K).T
    normal = (points * result.depth[rows, columns][:, None] - centre) / radius
    towards = np.array(light.direction) / np.linalg.norm(light.direction)
    expected = 0.1 + 0.8 * np.clip(normal @ towards, 0, None)
    inner = normal[:, 2] < -0.55  # at the limb four rays share a pixel
    assert inner.sum() > 500
    assert np.allclose(result.rgb[rows, columns, 0][inner], expected[inner], atol=0.01)


def test_alpha_measures_covered_area_and_blends_with_the_background():
    square = at_pixels([[10.25, 10.25], [30.25, 10.25], [30.25, 30.25], [10.25, 30.25]])
    result = render_mesh(
        square, [[0, 1, 2], [0, 2, 3]], K, SIZE, colours=(1, 0, 0), light=FLAT, background=(0, 0, 1)
    )
    assert set(np.unique(result.alpha)) <= {0, 0.25, 0.5, 0.75, 1}
    assert ((result.alpha > 0) & (result.alpha < 1)).any()
    assert abs(float(result.alpha.sum()) - 400) < 6
    assert np.allclose(result.rgb[..., 0], result.alpha, atol=1e-6)
    assert np.allclose(result.rgb[..., 2], 1 - result.alpha, atol=1e-6)


def test_background_may_be_an_image():
    image = np.random.default_rng(0).random((*SIZE, 3), dtype=np.float32)
    result = render_mesh(at_pixels([[10, 10], [30, 10], [10, 30]]), [[0, 1, 2]], K, SIZE, background=image)
    assert np.array_equal(result.rgb[result.alpha == 0], image[result.alpha == 0])


def test_shadows_fall_where_the_light_is_blocked():
    plane = np.array([[-2, -2, 2.0], [2, -2, 2], [2, 2, 2], [-2, 2, 2]])
    blocker, faces = ball(np.array([-0.3, 0, 1.5]), 0.1, 3)
    faces = np.concatenate([[[0, 2, 1], [0, 3, 2]], faces + 4])
    light = Light(direction=(-0.6, 0, -1), shadow=1.0, ambient=(0.1, 0.1, 0.1), colour=(0.9, 0.9, 0.9))
    result = render_mesh(np.concatenate([plane, blocker]), faces, K, SIZE, colours=(1, 1, 1), light=light)
    shadow = np.array([-0.3, 0, 1.5]) + 0.5 * np.array([0.6, 0, 1])
    column, row = (K @ shadow / shadow[2])[:2].round().astype(int)
    assert result.rgb[row, column, 0] == pytest.approx(0.1, abs=1e-3)
    assert result.rgb[row, column + 12, 0] == pytest.approx(0.1 + 0.9 / np.sqrt(1.36), abs=1e-3)


def test_ambient_occlusion_darkens_what_is_enclosed():
    plate = np.array([[-0.02, -0.02, 1], [0.02, -0.02, 1], [0.02, 0.02, 1], [-0.02, 0.02, 1], [0, 0, 1.0]])
    faces = np.array([[0, 4, 1], [1, 4, 2], [2, 4, 3], [3, 4, 0]])
    normals = vertex_normals(plate, faces)
    assert np.allclose(normals, [0, 0, -1])
    assert np.array_equal(ambient_occlusion(Scene(plate, faces), normals, 64), np.ones(5))
    roof = plate - (0, 0, 0.01)
    scene = Scene(np.concatenate([plate, roof]), np.concatenate([faces, faces[:, ::-1] + 5]))
    both = np.concatenate([normals, -normals])
    openness = ambient_occlusion(scene, both, 64)
    assert openness[4] < 0.35
    assert (openness[:4] > openness[4] + 0.2).all()


def test_directions_are_spread_evenly():
    directions = sphere_directions(50)
    assert np.allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-6)
    assert np.linalg.norm(directions.mean(axis=0)) < 0.05
    assert np.sort(directions @ directions.T)[:, -2].max() < 0.93


def test_trace_sees_what_render_mesh_sees():
    vertices, faces = ball(np.array([0.1, 0, 0.9]), 0.25, 3)
    depth, ids = trace(vertices, faces, K, SIZE)
    result = render_mesh(vertices, faces, K, SIZE)
    assert np.array_equal(depth, result.depth)
    assert np.array_equal(ids, result.faces)
    assert np.array_equal(ids >= 0, result.mask)


@pytest.mark.parametrize("pixels", [[[-30, -30], [-10, -30], [-10, -9]], [[70, 5], [90, 5], [80, 30]]])
def test_what_is_outside_the_image_leaves_the_background(pixels):
    result = render_mesh(at_pixels(pixels), [[0, 1, 2]], K, SIZE, background=(0.2, 0.3, 0.4))
    assert not result.mask.any() and not result.alpha.any() and np.isinf(result.depth).all()
    assert np.allclose(result.rgb, (0.2, 0.3, 0.4))


def test_a_mesh_without_faces_leaves_the_background():
    result = render_mesh(np.ones((3, 3)), np.zeros((0, 3), int), K, SIZE)
    assert not result.mask.any() and not result.rgb.any()


TRIANGLE = at_pixels([[10, 10], [30, 10], [10, 30]])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"vertices": TRIANGLE - (0, 0, 1)}, ValueError, "vertices: 3 of 3 have z <= 0"),
        ({"vertices": TRIANGLE[:, :2]}, ValueError, "vertices: expected shape"),
        ({"vertices": TRIANGLE.astype(int)}, TypeError, "vertices: expected floating-point"),
        ({"vertices": TRIANGLE * np.nan}, ValueError, "vertices: every coordinate"),
        ({"faces": [[0, 1, 3]]}, ValueError, r"faces: indices must lie in \[0, 3\)"),
        ({"faces": [[0, 1, -1]]}, ValueError, "faces: indices"),
        ({"faces": [[0.0, 1, 2]]}, TypeError, "faces: expected integers"),
        ({"faces": [0, 1, 2]}, ValueError, "faces: expected shape"),
        ({"K": np.eye(4)}, ValueError, "K: expected shape"),
        ({"K": np.zeros((3, 3))}, ValueError, "K: expected finite, invertible"),
        ({"size": (0, 5)}, ValueError, "size: expected"),
        ({"colours": np.ones((2, 3))}, ValueError, "colours: expected shape"),
        ({"background": np.ones((5, 5, 3))}, ValueError, "background: expected shape"),
    ],
)
def test_bad_input_is_named(change, error, sentence):
    arguments = {"vertices": TRIANGLE, "faces": [[0, 1, 2]], "K": K, "size": SIZE, **change}
    with pytest.raises(error, match=sentence):
        render_mesh(**arguments)


def test_a_light_needs_a_direction():
    with pytest.raises(ValueError, match="direction"):
        Light(direction=(0, 0, 0))
