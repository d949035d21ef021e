"""Spiral index tables."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pahm_ops.mesh._checks import as_count, as_faces, as_vertices, compiled_tables
from pahm_ops.reference import spiral_indices as reference


def spiral_indices(
    faces: ArrayLike, length: int, dilation: int = 1, vertices: ArrayLike | None = None
) -> NDArray[np.int64]:
    """The spiral around every vertex of a triangle mesh, the index table of `pahm_ops.spiral_conv`.

    Row v is v, then the rings around it, ring after ring, cut to length * dilation entries of which every
    dilation-th is kept. The order within a ring is the one that SpiralNet++ takes from OpenMesh (clockwise
    from outside), so that the tables, and with them its checkpoints, agree; OpenMesh is not needed. Where the
    rings around v run out (a small mesh, a small component, a vertex of no face) the row holds the length *
    dilation vertices nearest to v instead, v first, equal distances by index, again every dilation-th. As in
    SpiralNet++ the rings have run out as soon as the ring that would come next is empty, even if the row is
    full by then.

    Args:
        faces: (F, 3) integers, counter-clockwise seen from outside. Their order in the file decides where a
            ring starts.
        length: entries of a row, L.
        dilation: step through the row.
        vertices: (N, 3) real, any unit. Needed for their number where the last vertices belong to no face,
            and for their positions where rings run out; without them N is the highest index in faces plus 1.

    Returns:
        (N, L) int64, values in [0, N), column 0 counting from 0 to N - 1.

    Raises:
        ValueError: wrong shape; vertices not finite; length * dilation > N; rings run out around a vertex and
            vertices is None; the mesh is not an oriented manifold (the face, edge or vertex is named).
        IndexError: a face refers to no vertex.
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
        used = np.unique(triangles)  # Asked here: tables of the highest index might not fit into memory.
        vertex = int(np.argmax(used != np.arange(len(used))))
        raise ValueError(
            f"vertices are needed: vertex {vertex} belongs to no face, and the nearest vertices fill its row"
        )
    tables = compiled_tables()
    if tables is None:
        return reference.spiral_indices(triangles, count, length, dilation, positions)
    return tables.spirals(triangles, count, length, dilation, positions)
