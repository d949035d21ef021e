"""Index tables of triangle meshes, built once on the host from numpy arrays.

`spiral_indices` gives the rows that `pahm_ops.spiral_conv` reads, `MeshHierarchy` the coarser levels of a
mesh and the transforms between them that `pahm_ops.mesh_pool` applies, `load_mesh` reads the mesh files they
start from.
"""

from pahm_ops.mesh.files import load_mesh
from pahm_ops.mesh.hierarchy import MeshHierarchy
from pahm_ops.mesh.spirals import spiral_indices

__all__ = ["MeshHierarchy", "load_mesh", "spiral_indices"]
