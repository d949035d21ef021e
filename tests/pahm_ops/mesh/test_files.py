"""Meshes from files and trimesh objects: order, merging, joining, and what is refused."""

from collections import Counter

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from pahm_ops.mesh import MeshHierarchy, load_mesh
from pahm_ops.mesh._checks import compiled_tables

Mesh = tuple[NDArray[np.float64], NDArray[np.int64]]

needs_compiled = pytest.mark.skipif(compiled_tables() is None, reason="installed without a compiler")


def sphere(subdivisions: int) -> Mesh:
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.array(mesh.vertices), np.array(mesh.faces)


@pytest.mark.parametrize("suffix", ["ply", "obj", "off", "glb"])
def test_files_with_shared_vertices_keep_their_order(tmp_path, suffix):
    vertices, faces = sphere(2)
    vertices[5] = vertices[90]
    path = tmp_path / f"mesh.{suffix}"
    trimesh.Trimesh(vertices, faces, process=False).export(path)
    read_vertices, read_faces = load_mesh(path)
    assert (read_vertices.dtype, read_faces.dtype) == (np.float64, np.int64)
    assert np.array_equal(read_faces, faces)
    assert np.abs(read_vertices - vertices).max() < 1e-6
    merged, merged_faces = load_mesh(str(path), merge=True)
    assert len(merged) == len(vertices) - 1
    assert np.array_equal(merged[merged_faces], read_vertices[faces])
    assert np.array_equal(merged, np.delete(read_vertices, 90, axis=0))


def test_texture_seams_of_obj_do_not_split(tmp_path):
    vertices, faces = sphere(1)
    lines = [f"v {x} {y} {z}" for x, y, z in vertices]
    lines += [f"vt {i / 240} {i % 7 / 7}" for i in range(240)]
    lines += [
        f"f {a + 1}/{3 * i + 1} {b + 1}/{3 * i + 2} {c + 1}/{3 * i + 3}" for i, (a, b, c) in enumerate(faces)
    ]
    (tmp_path / "seams.obj").write_text("\n".join(lines))
    read_vertices, read_faces = load_mesh(tmp_path / "seams.obj")
    assert np.array_equal(read_vertices, vertices)
    assert np.array_equal(read_faces, faces)


@needs_compiled
@pytest.mark.parametrize("file_type", ["stl", "stl_ascii"])
def test_stl_shares_vertices_again(tmp_path, file_type):
    vertices, faces = sphere(1)
    vertices[np.abs(vertices) < 1e-9] = np.where(np.arange((np.abs(vertices) < 1e-9).sum()) % 2, 0.0, -0.0)
    path = tmp_path / "mesh.stl"
    trimesh.Trimesh(vertices, faces, process=False).export(path, file_type=file_type)
    read_vertices, read_faces = load_mesh(path)
    assert read_vertices.shape == vertices.shape
    assert np.abs(read_vertices[read_faces] - vertices[faces]).max() < 1e-6
    assert len(load_mesh(path, merge=False)[0]) == faces.size
    assert MeshHierarchy.from_file(path, sizes=(42, 20)).sizes == (42, 20)


@needs_compiled
def test_from_file_takes_trimesh_objects_and_names_offending_edges(tmp_path):
    vertices, faces = sphere(1)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert np.array_equal(MeshHierarchy.from_file(mesh, (42, 12)).faces[0], faces)
    path = tmp_path / "fin.ply"
    fin = np.concatenate([faces, [[faces[0, 0], faces[0, 1], 42]]])
    trimesh.Trimesh(np.concatenate([vertices, [[2.0, 2, 2]]]), fin, process=False).export(path)
    low, high = sorted(faces[0, :2].tolist())
    with pytest.raises(ValueError, match=rf"edge \({low}, {high}\) belongs to 3 faces \(0, \d+, 80\)"):
        MeshHierarchy.from_file(path, (43, 20))


def test_several_meshes_in_a_file_are_joined_in_place(tmp_path):
    scene = trimesh.Scene()
    for x in (0.0, 5.0):
        move = trimesh.transformations.translation_matrix([x, 0, 0])
        scene.add_geometry(trimesh.creation.icosphere(1), transform=move)
    scene.export(tmp_path / "scene.glb")
    vertices, faces = load_mesh(tmp_path / "scene.glb")
    assert (len(vertices), len(faces)) == (84, 160)
    assert Counter(np.round(vertices[:, 0] / 5).tolist()) == {0.0: 42, 1.0: 42}
    assert all((face < 42).all() or (face >= 42).all() for face in faces)


def test_vertices_of_no_face_are_kept_and_polygons_split(tmp_path):
    path = tmp_path / "quad.off"
    path.write_text("OFF\n5 1 0\n9 9 9\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 1 2 3 4\n")
    vertices, faces = load_mesh(path)
    assert vertices[0].tolist() == [9, 9, 9]
    assert sorted(np.unique(faces).tolist()) == [1, 2, 3, 4]
    assert faces.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("junk.ply", "hello", ValueError, r"got .*junk\.ply: it must start with the line ply, got 'hello'"),
        (
            "mesh.unknown",
            "hello",
            ValueError,
            r"mesh\.unknown: only OBJ, OFF, PLY, STL, GLB and glTF are read",
        ),
        ("empty.obj", "", ValueError, r"must hold triangles, got none in .*empty\.obj"),
        ("points.obj", "v 0 0 0\nv 1 1 1\n", ValueError, r"must hold triangles, got none"),
        ("missing.ply", None, FileNotFoundError, r"got .*missing\.ply, which is no file"),
    ],
)
def test_load_mesh_names_a_file_that_is_no_mesh(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        load_mesh(tmp_path / name)


def test_load_mesh_names_an_object_that_is_no_mesh():
    with pytest.raises(TypeError, match=r"source must be a path or a trimesh\.Trimesh, got int"):
        load_mesh(3)
