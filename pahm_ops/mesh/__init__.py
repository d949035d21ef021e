"""Index tables of triangle meshes, built once on the host from numpy arrays.

`spiral_indices` makes the table that `pahm_ops.spiral_conv` reads. `MeshHierarchy` makes the coarser levels
of a mesh and the transforms between them, which `pahm_ops.mesh_pool` applies. `load_mesh` reads mesh files.
`load_transforms` reads the hierarchies that SpiralNet++ and HandMesh have saved.
"""

from pahm_ops.mesh.files import load_mesh
from pahm_ops.mesh.hierarchy import MeshHierarchy
from pahm_ops.mesh.spirals import spiral_indices
from pahm_ops.mesh.transforms import Transforms, load_transforms

__all__ = ["MeshHierarchy", "Transforms", "load_mesh", "load_transforms", "spiral_indices"]
