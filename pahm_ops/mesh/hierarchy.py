"""Coarser levels of a mesh, and the transforms between them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pahm_ops.array_files import read_npz
from pahm_ops.mesh._checks import as_count, as_faces, as_vertices, compiled_tables
from pahm_ops.mesh.files import load_mesh
from pahm_ops.mesh.sparse import entries
from pahm_ops.mesh.spirals import spiral_indices

if TYPE_CHECKING:
    import trimesh
    from scipy.sparse import csr_matrix


@dataclass(frozen=True)
class MeshHierarchy:
    """A mesh and its coarser levels, finest first, as in section 3 of the paper and in CoMA's mesh sampling.

    Attributes:
        vertices: for each level s, (N_s, 3) float64; every level's vertices are vertices of the finest level.
        faces: for each level, (F_s, 3) int64 into its vertices, oriented like the input.
        down: for each level but the last, (N_{s+1}, N_s) float64: a selection, with a single 1 in each row.
        up: for each level but the last, (N_s, N_{s+1}) float64. A row holds the barycentric weights of the
            point on level s + 1's surface that is nearest to the vertex: at most 3, each in (0, 1], with sum
            1. So `up` commutes with translation, and `down @ up` is the identity.
    """

    vertices: list[NDArray[np.float64]]
    faces: list[NDArray[np.int64]]
    down: list["csr_matrix"]
    up: list["csr_matrix"]

    @classmethod
    def build(
        cls, vertices: ArrayLike, faces: ArrayLike, sizes: Sequence[int] = (778, 389, 195, 98)
    ) -> "MeshHierarchy":
        """Coarsens a mesh by quadric edge collapse to exactly the numbers of vertices in `sizes`.

        A collapse moves a vertex onto the neighbour that adds the least quadric error (Garland and Heckbert,
        1997, with planes that hold the boundary, and a slight pull that keeps flat regions evenly covered).
        Every level is an oriented manifold with the boundary loops and the Euler characteristic of the input.
        Boundary vertices move along their loop. Faces are not flipped if that can be avoided. The same input
        gives the same levels.

        Args:
            vertices: (N, 3) real, finite, any unit; each belongs to a face.
            faces: (F, 3) integers, counter-clockwise seen from outside.
            sizes: the number of vertices of each level, descending from N.

        Raises:
            ValueError: wrong shape; sizes that do not start at N, do not descend, or that the topology does
                not allow (a closed component keeps at least 4 vertices, one with a boundary at least 3); a
                mesh that is not an oriented manifold (names the face, edge or vertex); a vertex without a
                face.
            IndexError: a face refers to a vertex that does not exist.
            TypeError: wrong dtype.
            RuntimeError: the package was installed without a compiler.
        """
        points = as_vertices(vertices)
        triangles = as_faces(faces, len(points))
        counts = [as_count(size, "sizes") for size in sizes]
        if not counts or counts[0] != len(points):
            raise ValueError(
                f"sizes must start at the number of vertices, {len(points)}, got {tuple(counts)}"
            )
        if any(coarse >= fine for fine, coarse in pairwise(counts)):
            raise ValueError(f"sizes must descend, got {tuple(counts)}")
        tables = compiled_tables()
        if tables is None:
            raise RuntimeError(
                "MeshHierarchy.build needs the compiled module pahm_ops.mesh._tables, which this "
                "installation lacks: install with a C++ compiler, or use MeshHierarchy.load"
            )
        levels = [(np.arange(len(points)), triangles), *tables.levels(points, triangles, counts[1:])]
        selections = [selection for selection, _ in levels]
        down, up = [], []
        for (fine, _), (coarse, coarse_faces) in pairwise(levels):
            kept = np.searchsorted(fine, coarse)
            removed = np.setdiff1d(np.arange(len(fine)), kept, assume_unique=True)
            corners, weights = tables.closest(points[coarse], coarse_faces, points[fine[removed]])
            rows = np.concatenate([kept, np.repeat(removed, 3)])
            columns = np.concatenate([np.arange(len(coarse)), corners.reshape(-1)])
            values = np.concatenate([np.ones(len(coarse)), weights.reshape(-1)])
            used = values > 0
            up.append(_sparse(rows[used], columns[used], values[used], (len(fine), len(coarse))))
            down.append(_selection_matrix(kept, len(fine)))
        return cls([points[s] for s in selections], [f for _, f in levels], down, up)

    @classmethod
    def from_file(
        cls, source: "str | os.PathLike[str] | trimesh.Trimesh", sizes: Sequence[int] = (778, 389, 195, 98)
    ) -> "MeshHierarchy":
        """`build` from a mesh file or a trimesh object, read by `load_mesh`."""
        return cls.build(*load_mesh(source), sizes=sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of vertices of each level, finest first."""
        return tuple(len(level) for level in self.vertices)

    def selection(self, level: int) -> NDArray[np.int64]:
        """(N_level,) int64, ascending: the indices of the level's vertices in the finest mesh (level 0)."""
        if not 0 <= level < len(self.vertices):
            raise IndexError(f"level must lie in [0, {len(self.vertices)}), got {level}")
        selection = np.arange(len(self.vertices[0]), dtype=np.int64)
        for down in self.down[:level]:
            selection = selection[down.indices]
        return selection

    def spiral_indices(self, level: int, length: int, dilation: int = 1) -> NDArray[np.int64]:
        """(N_level, length) int64: the level's table from `pahm_ops.mesh.spiral_indices`."""
        if not 0 <= level < len(self.vertices):
            raise IndexError(f"level must lie in [0, {len(self.vertices)}), got {level}")
        return spiral_indices(self.faces[level], length, dilation, self.vertices[level])

    def to_arrays(self) -> dict[str, NDArray]:
        """The hierarchy as plain arrays by name, as `save` writes them."""
        arrays: dict[str, NDArray] = {"vertices": self.vertices[0]}
        for s, faces in enumerate(self.faces):
            arrays[f"faces_{s}"] = faces.astype(np.int32)
        for s, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            arrays[f"down_{s}"] = down.indices.astype(np.int32)
            arrays[f"up_{s}_indptr"] = up.indptr.astype(np.int32)
            arrays[f"up_{s}_indices"] = up.indices.astype(np.int32)
            arrays[f"up_{s}_data"] = up.data
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> "MeshHierarchy":
        """The inverse of `to_arrays`; KeyError, ValueError or IndexError for other arrays."""
        from scipy.sparse import csr_matrix

        vertices = [as_vertices(arrays["vertices"])]
        faces = [as_faces(arrays["faces_0"], len(vertices[0]))]
        down, up = [], []
        for s in range(sum(name.startswith("down_") for name in arrays)):
            kept = arrays[f"down_{s}"]
            inside = kept.dtype.kind in "iu" and kept.ndim == 1 and kept.size > 0
            if not inside or kept.min() < 0 or kept.max() >= len(vertices[s]):
                raise ValueError(f"down_{s} does not select vertices of level {s}")
            kept = kept.astype(np.int64)
            down.append(_selection_matrix(kept, len(vertices[s])))
            vertices.append(vertices[s][kept])
            faces.append(as_faces(arrays[f"faces_{s + 1}"], len(kept)))
            parts = {part: arrays[f"up_{s}_{part}"] for part in ("data", "indices", "indptr")}
            shape = (len(vertices[s]), len(kept))
            if not np.isfinite(entries("csr", parts, shape, f"up_{s}").values).all():
                raise ValueError(f"up_{s} must be finite")
            up.append(csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape=shape))
        return cls(vertices, faces, down, up)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one compressed .npz of plain arrays; uses the file name as given."""
        arrays: dict[str, Any] = {**self.to_arrays()}
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MeshHierarchy":
        """Reads a file from `save`, even without the compiled module; ValueError explains any other file."""
        arrays = read_npz(path)
        name = f"path must be a file that MeshHierarchy.save wrote, got {path}"
        try:
            return cls.from_arrays(arrays)
        except KeyError as error:
            raise ValueError(f"{name}, which holds no array {error}") from error
        except (ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error


def _sparse(
    rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.float64], shape: tuple[int, int]
) -> "csr_matrix":
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((values, (rows, columns)), shape=shape)
    matrix.sort_indices()
    return matrix


def _selection_matrix(kept: NDArray[np.int64], width: int) -> "csr_matrix":
    return _sparse(np.arange(len(kept)), kept, np.ones(len(kept)), (len(kept), width))
