"""Spiral index tables."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pahm_ops.mesh._checks import as_count, as_faces, as_vertices, compiled_tables
from pahm_ops.reference import spiral_indices as reference


def spiral_indices(
    faces: ArrayLike, length: int, dilation: int = 1, vertices: ArrayLike | None = None
) -> NDArray[np.int64]:
    """The spiral around every vertex of a triangle mesh: the index table of `pahm_ops.spiral_conv`.

    Row v is v, then the rings around it, ring after ring, cut to length * dilation entries, of which every
    dilation-th is kept. The order within a ring is the one that SpiralNet++ takes from OpenMesh (clockwise
    from outside), so the tables match its tables and checkpoints; OpenMesh is not needed. If the rings around
    v run out (a small mesh, a small component, a vertex without a face), the row holds the length * dilation
    vertices nearest to v instead, v first, equal distances by index, again every dilation-th. As in
    SpiralNet++, the rings have run out as soon as the next ring is empty, even if the row is already full.

    Args:
        faces: (F, 3) integers, counter-clockwise seen from outside. Their order in the file decides where a
            ring starts.
        length: entries per row, L.
        dilation: step through the row.
        vertices: (N, 3) real, any unit. Their number is needed if the last vertices have no face, and their
            positions if rings run out. Without them N is the highest index in faces plus 1.

    Returns:
        (N, L) int64, values in [0, N); column 0 is 0, 1, ..., N - 1.

    Raises:
        ValueError: wrong shape; vertices not finite; length * dilation > N; rings run out around a vertex and
            vertices is None; the mesh is not an oriented manifold (names the face, edge or vertex).
        IndexError: a face refers to a vertex that does not exist.
        TypeError: wrong dtype.

    Source: Gong et al., "SpiralNet++", 2019, and its public code.
    """
    positions = None if vertices is None else as_vertices(vertices)
    triangles = as_faces(faces, None if positions is None else len(positions))
    length, dilation = as_count(length, "length"), as_count(dilation, "dilation")
    count = len(positions) if positions is not None else int(triangles.max(initial=-1)) + 1
    if length * dilation > count:
        raise ValueError(
            f"length * dilation must be at most the number of vertices, {count}, got {length} * {dilation}"
        )
    if positions is None and length * dilation > 1 and count > triangles.size:
        used = np.unique(triangles)  # Checked first: a table for the highest index might not fit into memory.
        vertex = int(np.argmax(used != np.arange(len(used))))
        raise ValueError(
            f"vertices are needed: vertex {vertex} belongs to no face, and the nearest vertices fill its row"
        )
    tables = compiled_tables()
    if tables is None:
        return reference.spiral_indices(triangles, count, length, dilation, positions)
    return tables.spirals(triangles, count, length, dilation, positions)
