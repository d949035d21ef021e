"""The hand's structure that a network needs: its mesh at four levels and its joint regressor."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pahm.hand.model import HandModel
from pahm_ops.mesh import MeshHierarchy

SIZES = (778, 389, 195, 98)


def level_name(count: int) -> str:
    """The name of the level with `count` vertices, with that number: M1 is the finest, M4 has 98 vertices."""
    return f"M{SIZES.index(count) + 1} ({count})"


_SMALLEST, _LARGEST = 0.02, 2.0  # metres
_JOINTS_OFF = 20  # mm; regressors of the same hand differ by less on a posed mesh


class HandTopology(NamedTuple):
    """The meshes M1 ... M4 of a hand and the regressor of its 21 joints."""

    hierarchy: MeshHierarchy
    """The mean hand's levels, finest first, in metres: 778, 389, 195 and 98 vertices."""
    joint_regressor: NDArray[np.float64]
    """`(21, 778)`: joints = regressor @ vertices, FreiHAND's order."""

    @classmethod
    def load(cls) -> HandTopology:
        """Load the shipped hand's topology from the package's assets."""
        with resources.as_file(resources.files("pahm") / "assets" / "hierarchy.npz") as path:
            hierarchy = MeshHierarchy.load(path)
        return cls(hierarchy, _regressor(HandModel.load()))

    @classmethod
    def from_hand(cls, hand: HandModel) -> HandTopology:
        """Build the hierarchy of another hand with 778 vertices, such as MANO's."""
        vertices = hand.template.detach().cpu().numpy().astype(np.float64)
        return cls(MeshHierarchy.build(vertices, hand.faces.cpu().numpy(), SIZES), _regressor(hand))

    def relative_vertices(self, level: int, root_joint: int) -> NDArray[np.float64]:
        """The mean hand's vertices `(N, 3)` at a level (0 is M1), in metres relative to a joint of M1."""
        root = self.joint_regressor[root_joint] @ self.hierarchy.vertices[0]
        return self.hierarchy.vertices[level] - root

    def check_joints(self, vertices: NDArray[np.floating], joints: NDArray[np.floating], where: str) -> None:
        """Reject a mesh of another hand: it may also have 778 vertices, but the regressor misses its joints.

        vertices `(778, 3)`, joints `(21, 3)`, metres. Raises ValueError; its message starts with `where`.
        """
        off = 1000 * float(np.linalg.norm(self.joint_regressor @ vertices - joints, axis=1).mean())
        if off > _JOINTS_OFF:
            raise ValueError(
                f"{where}: the joints lie {off:.0f} mm from where the network's hand has them in the same "
                "mesh, expected meshes of that hand (MANO's come with --mano, and checkpoints trained so)"
            )

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Convert to plain arrays, for a checkpoint."""
        return {**self.hierarchy.to_arrays(), "joint_regressor": self.joint_regressor}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> HandTopology:
        """The inverse of `to_arrays`.

        Raises KeyError for a missing array, and ValueError or IndexError for an invalid hierarchy or wrong
        level sizes, an invalid regressor, or a hand of impossible size.
        """
        rest = {name: value for name, value in arrays.items() if name != "joint_regressor"}
        hierarchy = MeshHierarchy.from_arrays(rest)
        regressor = np.asarray(arrays["joint_regressor"], dtype=np.float64)
        if tuple(hierarchy.sizes) != SIZES or regressor.shape != (21, SIZES[0]):
            raise ValueError(
                f"expected levels of {SIZES} vertices and a regressor (21, {SIZES[0]}), got "
                f"{tuple(hierarchy.sizes)} and {regressor.shape}"
            )
        if not np.isfinite(regressor).all() or np.abs(regressor.sum(1) - 1).max() > 1e-3:
            raise ValueError("expected a joint regressor of finite rows that sum to 1")
        for vertices in hierarchy.vertices:
            size = float(np.ptp(vertices, axis=0).max())
            if not _SMALLEST <= size <= _LARGEST:
                raise ValueError(f"expected a hand {_SMALLEST} to {_LARGEST} metres long, got {size:g}")
        return cls(hierarchy, regressor)


def _regressor(hand: HandModel) -> NDArray[np.float64]:
    return hand.joint_regressor.detach().cpu().numpy().astype(np.float64)
