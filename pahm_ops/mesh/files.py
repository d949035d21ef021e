"""Triangle meshes from files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pahm_ops.mesh._checks import as_faces, as_vertices

if TYPE_CHECKING:
    import trimesh

# Formats that write the corners of each face anew, so that no two faces share a vertex.
_UNSHARED = {".stl", ".stl_ascii"}


def load_mesh(
    source: "str | os.PathLike[str] | trimesh.Trimesh", merge: bool | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Reads the vertices and faces of a triangle mesh, in the order in which the file has them.

    Args:
        source: a file in any format that trimesh reads (PLY, OBJ, OFF, STL, GLB, ...), or a trimesh.Trimesh.
            Several meshes in one file are joined, each where the file's scene places it; faces of more than
            three corners are split.
        merge: whether vertices at exactly the same position become one, the first of them; order is kept
            otherwise. None merges for STL only, where faces share no vertices, and leaves every other file as
            it is: seams at which a file splits vertices (GLB) are then boundaries of the mesh, and merge=True
            closes them.

    Returns:
        (N, 3) float64 vertices, in the file's unit, and (F, 3) int64 faces. Vertices of no face are kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: trimesh does not read it, or it holds no triangles.
    """
    if isinstance(source, str | os.PathLike):
        mesh = _read(Path(source))
        name = str(source)
        if merge is None:
            merge = Path(source).suffix.lower() in _UNSHARED
    else:
        mesh, name = source, type(source).__name__
        if not (hasattr(mesh, "vertices") and hasattr(mesh, "faces")):
            raise TypeError(f"source must be a path or a trimesh.Trimesh, got {name}")
    vertices = np.array(mesh.vertices, dtype=np.float64)
    faces = np.array(getattr(mesh, "faces", ()), dtype=np.int64)
    if faces.size == 0:
        raise ValueError(f"source must hold triangles, got none in {name}")
    vertices, faces = as_vertices(vertices), as_faces(faces, len(vertices))
    return _merge_identical(vertices, faces) if merge else (vertices, faces)


def _read(path: Path) -> Any:
    import trimesh

    if not path.is_file():
        raise FileNotFoundError(f"source must be a mesh file, got {path}, which is no file")
    try:
        scene = trimesh.load_scene(path, process=False, maintain_order=True)
        return scene.to_mesh()
    except Exception as error:  # trimesh's readers raise whatever their parsers raise
        raise ValueError(f"source must be a mesh file that trimesh reads, got {path}: {error}") from error


def _merge_identical(
    vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    # Adding zero turns -0.0 into 0.0, which np.unique would otherwise keep apart.
    _, first, group = np.unique(vertices + 0.0, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return vertices[np.sort(first)], rank[group.reshape(-1)][faces]
