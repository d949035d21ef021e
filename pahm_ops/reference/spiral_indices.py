"""The definition of the spiral index table, in plain Python with half-edges in dictionaries."""

import numpy as np
from numpy.typing import NDArray


def half_edges(faces: NDArray[np.int64]) -> dict[tuple[int, int], int]:
    """The face left of each directed edge; raises on degenerate faces and non-manifold edges."""
    left: dict[tuple[int, int], int] = {}
    repeated: list[tuple[int, int]] = []
    for face, (a, b, c) in enumerate(faces.tolist()):
        if a == b or b == c or c == a:
            raise ValueError(f"faces must have three different vertices, got face {face} = ({a}, {b}, {c})")
        for edge in ((a, b), (b, c), (c, a)):
            if edge in left:
                repeated.append(edge)
            left.setdefault(edge, face)
    if repeated:
        v, w = min((min(edge), max(edge)) for edge in repeated)
        owners = [f for f, face in enumerate(faces.tolist()) if v in face and w in face]
        if len(owners) > 2:
            shown = ", ".join(map(str, owners[:6])) + (", ..." if len(owners) > 6 else "")
            raise ValueError(
                f"faces are not manifold: edge ({v}, {w}) belongs to {len(owners)} faces ({shown}), "
                "expected at most 2"
            )
        raise ValueError(
            f"faces are not consistently oriented: faces {owners[0]} and {owners[1]} run along edge "
            f"({v}, {w}) in the same direction, expected opposite directions"
        )
    return left


def ordered_neighbors(faces: NDArray[np.int64], vertex_count: int) -> list[list[int]]:
    """The neighbours of each vertex in OpenMesh's order: clockwise, b after a if (v, b, a) is a face.

    An interior vertex's list starts with the vertex that follows it in the last face that contains it. The
    list of a boundary vertex v starts with the neighbour w for which no face has the directed edge (v, w).
    """
    left = half_edges(faces)
    start: list[int | None] = [None] * vertex_count
    after: list[dict[int, int]] = [{} for _ in range(vertex_count)]
    for face in faces.tolist():
        for k in range(3):
            v, b, a = face[k], face[(k + 1) % 3], face[(k + 2) % 3]
            start[v] = b
            after[v][a] = b
    rings: list[list[int]] = []
    for v, turn in enumerate(after):
        ring: list[int] = []
        open_starts = [w for w in turn if (v, w) not in left]
        at = open_starts[0] if open_starts else start[v]
        while at is not None and at not in ring:
            ring.append(at)
            at = turn.get(at)
        if len(open_starts) > 1 or len(ring) != len(turn) + len(open_starts):
            raise ValueError(
                f"faces are not manifold: the faces around vertex {v} form more than one fan, so that they "
                "meet in that vertex only, expected one fan"
            )
        rings.append(ring)
    return rings


def next_ring(neighbors: list[list[int]], last_ring: list[int], seen: set[int]) -> list[int]:
    """The vertices around last_ring that are not in seen.

    Each vertex of last_ring adds its neighbours, starting after the first neighbour that is in last_ring and
    going around to that one.
    """
    inside = set(last_ring)
    ring: list[int] = []
    for u in last_ring:
        around = neighbors[u]
        first = next((i for i, w in enumerate(around) if w in inside), len(around))
        for w in around[first + 1 :] + around[:first]:
            if w not in seen and w not in ring:
                ring.append(w)
    return ring


def rescaled(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vertices times a power of two that brings the longest side of their bounding box into [0.5, 1].

    An axis on which all vertices agree becomes 0. Both steps are exact, and squared distances between the
    vertices then neither overflow nor vanish.
    """
    if len(vertices) == 0:
        return vertices
    low, high = vertices.min(0), vertices.max(0)
    with np.errstate(over="ignore"):
        side = min(float((high - low).max()), np.finfo(np.float64).max)
    return np.ldexp(np.where(low == high, 0.0, vertices), -np.frexp(side)[1])


def spiral_indices(
    faces: NDArray[np.int64],
    vertex_count: int,
    length: int,
    dilation: int,
    vertices: NDArray[np.float64] | None,
) -> NDArray[np.int64]:
    """The table that `pahm_ops.mesh.spiral_indices` describes. The arguments must already be checked."""
    neighbors = ordered_neighbors(faces, vertex_count)
    points = None if vertices is None else rescaled(vertices)
    wanted = length * dilation
    table = np.empty((vertex_count, length), dtype=np.int64)
    for v in range(vertex_count):
        row = [v, *neighbors[v]]
        ring = next_ring(neighbors, neighbors[v], set(row))
        while ring and len(row) + len(ring) < wanted:
            row += ring
            ring = next_ring(neighbors, ring, set(row))
        row += ring
        if not ring and wanted > 1:
            if points is None:
                raise ValueError(
                    f"vertices are needed: the rings around vertex {v} run out before its row of "
                    f"length * dilation = {wanted} is full, and the nearest vertices fill it"
                )
            offsets = points - points[v]
            distances = offsets[:, 0] ** 2 + offsets[:, 1] ** 2 + offsets[:, 2] ** 2
            distances[v] = -1.0
            row = np.argsort(distances, kind="stable").tolist()
        table[v] = row[:wanted:dilation]
    return table
