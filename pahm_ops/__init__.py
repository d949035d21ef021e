"""Operators on meshes and pixels for PyTorch. `pahm_ops.mesh` makes the tables that they take."""

from importlib.metadata import PackageNotFoundError, version

from pahm_ops import _flops, _gpu  # noqa: F401  (register the counts of operations and the kernels for GPUs)
from pahm_ops._paths import backends
from pahm_ops.mesh_pool import MeshPool, MeshTransform, mesh_pool
from pahm_ops.spiral_conv import SpiralConv, spiral_conv
from pahm_ops.vertex_sample import vertex_sample

try:
    __version__ = version("pahm")  # one distribution has both packages
except PackageNotFoundError:  # a copy of the sources that was not installed
    __version__ = "0+unknown"

__all__ = [
    "MeshPool",
    "MeshTransform",
    "SpiralConv",
    "backends",
    "mesh_pool",
    "spiral_conv",
    "vertex_sample",
]
