"""Operators on meshes and pixels for PyTorch. `pahm_ops.mesh` makes the tables that they take."""

from pahm_ops._library import backends

__all__ = ["backends"]
