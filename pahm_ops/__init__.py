"""PyTorch operators on meshes and pixels. `pahm_ops.mesh` makes the tables that they take."""

from importlib.metadata import PackageNotFoundError, version

from pahm_ops import _flops  # noqa: F401  (registers the counts of operations)
from pahm_ops.backends import backends
from pahm_ops.frozen import freeze
from pahm_ops.mesh_pool import MeshPool, mesh_pool
from pahm_ops.prepared import MeshTransform, SpiralTable
from pahm_ops.spiral_conv import SpiralConv, spiral_conv
from pahm_ops.vertex_sample import vertex_sample

try:
    __version__ = version("pahm")  # one distribution holds both packages
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "MeshPool",
    "MeshTransform",
    "SpiralConv",
    "SpiralTable",
    "backends",
    "freeze",
    "mesh_pool",
    "spiral_conv",
    "vertex_sample",
]
