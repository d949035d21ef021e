"""Reading triangle meshes from files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pahm_ops.mesh._checks import as_faces, as_vertices
from pahm_ops.mesh.gltf import read_gltf
from pahm_ops.mesh.ply import read_ply
from pahm_ops.mesh.polygons import Polygons, triangles
from pahm_ops.mesh.text_formats import read_obj, read_off, read_stl

if TYPE_CHECKING:
    import trimesh

# Formats that write the corners of each face separately, so that no two faces share a vertex.
_UNSHARED = {".stl", ".stl_ascii"}
_READERS: dict[str, Callable[[bytes], Polygons]] = {
    ".obj": read_obj,
    ".off": read_off,
    ".ply": read_ply,
    ".stl": read_stl,
    ".stl_ascii": read_stl,
}


def load_mesh(
    source: "str | os.PathLike[str] | trimesh.Trimesh", merge: bool | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Reads the vertices and faces of a triangle mesh, in the file's order.

    OBJ, OFF, PLY and STL files give all their vertices, and each polygon as a fan of triangles from its first
    corner. Materials, groups, texture coordinates, normals and colours do not split or reorder anything;
    lines and points are ignored. GLB and glTF files give the meshes of the default scene, each placed by its
    node, without skins and morph targets. Other formats are not supported; trimesh reads some, but may split
    vertices and reorder parts.

    Args:
        source: a mesh file whose suffix names its format, or a trimesh.Trimesh.
        merge: whether to merge vertices at exactly the same position into the first of them; otherwise the
            order is kept. None merges only for STL, where faces share no vertices. For other files the seams
            at which a file splits vertices (GLB) are then boundaries of the mesh; merge=True closes them.

    Returns:
        (N, 3) float64 vertices, in the file's unit, and (F, 3) int64 faces. Vertices without a face are kept.

    Raises:
        IndexError: a face of a trimesh.Trimesh refers to a vertex that does not exist.
        FileNotFoundError: no such file.
        ValueError: another format; a file that is incomplete or holds something unsupported (free-form
            surfaces, compressed glTF, coordinates that are not finite, no triangles).
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source must be a mesh file, got {path}, which is no file")
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # Non-finite values are rejected at the end.
                vertices, faces = _read(path)
        except ValueError as error:
            raise ValueError(f"source must be a mesh file, got {path}: {error}") from None
        name = str(path)
        if merge is None:
            merge = path.suffix.lower() in _UNSHARED
    else:
        name = type(source).__name__
        if not (hasattr(source, "vertices") and hasattr(source, "faces")):
            raise TypeError(f"source must be a path or a trimesh.Trimesh, got {name}")
        vertices = as_vertices(np.array(source.vertices, dtype=np.float64))
        faces = as_faces(np.array(source.faces, dtype=np.int64).reshape(-1, 3), len(vertices))
    if faces.size == 0:
        raise ValueError(f"source must hold triangles, got none in {name}")
    return _merge_identical(vertices, faces) if merge else (vertices, faces)


def _read(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    suffix = path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        mesh = read_gltf(path.read_bytes(), path.parent)
    elif suffix in _READERS:
        mesh = _READERS[suffix](path.read_bytes())
    else:
        raise ValueError(
            "only OBJ, OFF, PLY, STL, GLB and glTF are read, of other formats what trimesh makes of them: "
            "load_mesh(trimesh.load_mesh(path, process=False))"
        )
    return as_vertices(mesh.vertices), triangles(mesh)


def _merge_identical(
    vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    # Adding zero turns -0.0 into 0.0; np.unique would treat them as different.
    _, first, group = np.unique(vertices + 0.0, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return vertices[np.sort(first)], rank[group.reshape(-1)][faces]
