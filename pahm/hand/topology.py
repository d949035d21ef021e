"""What a network must know of a hand: its mesh at four levels and where its joints are."""

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
    """M1 for the finest mesh to M4 for that of 98 vertices, with its number of vertices."""
    return f"M{SIZES.index(count) + 1} ({count})"


_SMALLEST, _LARGEST = 0.02, 2.0  # metres
_JOINTS_OFF = 20  # mm; joints of a posed mesh differ by less between regressors of one hand


class HandTopology(NamedTuple):
    """The meshes M1 ... M4 of a hand and the regressor of its 21 joints."""

    hierarchy: MeshHierarchy
    """Levels finest first, 778, 389, 195 and 98 vertices, of the mean hand in metres."""
    joint_regressor: NDArray[np.float64]
    """`(21, 778)`: joints = regressor @ vertices, FreiHAND's order."""

    @classmethod
    def load(cls) -> HandTopology:
        """The shipped open hand's, from the package's assets."""
        with resources.as_file(resources.files("pahm") / "assets" / "hierarchy.npz") as path:
            hierarchy = MeshHierarchy.load(path)
        return cls(hierarchy, _regressor(HandModel.load()))

    @classmethod
    def from_hand(cls, hand: HandModel) -> HandTopology:
        """Build the hierarchy of another hand with 778 vertices, such as MANO's."""
        vertices = hand.template.detach().cpu().numpy().astype(np.float64)
        return cls(MeshHierarchy.build(vertices, hand.faces.cpu().numpy(), SIZES), _regressor(hand))

    def relative_vertices(self, level: int, root_joint: int) -> NDArray[np.float64]:
        """The mean hand's vertices of a level, 0 for M1, in metres relative to a joint of M1: `(N, 3)`."""
        root = self.joint_regressor[root_joint] @ self.hierarchy.vertices[0]
        return self.hierarchy.vertices[level] - root

    def check_joints(self, vertices: NDArray[np.floating], joints: NDArray[np.floating], where: str) -> None:
        """Refuse a mesh of another hand: it may have 778 vertices, too, but the regressor does not find its
        joints.

        vertices `(778, 3)`, joints `(21, 3)`, metres. Raises ValueError that begins with `where`.
        """
        off = 1000 * float(np.linalg.norm(self.joint_regressor @ vertices - joints, axis=1).mean())
        if off > _JOINTS_OFF:
            raise ValueError(
                f"{where}: the joints lie {off:.0f} mm from where the network's hand has them in the same "
                "mesh, expected meshes of that hand (MANO's come with --mano, and checkpoints trained so)"
            )

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """As plain arrays, for a checkpoint."""
        return {**self.hierarchy.to_arrays(), "joint_regressor": self.joint_regressor}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> HandTopology:
        """The inverse of `to_arrays`.

        Raises KeyError for a missing array, and ValueError or IndexError for an invalid hierarchy or one of
        other sizes, an invalid regressor, or a hand of an impossible size.
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
