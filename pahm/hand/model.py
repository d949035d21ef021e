"""A hand with variable pose and shape: linear blend skinning of 778 vertices over 16 bones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahm.hand.joints import BONE_NAMES, FREIHAND_TIPS, JOINT_NAMES, JOINT_ORDER, PARENTS
from pahm.hand.plausible import check_plausible
from pahm.hand.rotation import axis_angle_to_matrix
from pahm_ops.array_files import read_npz
from pahm_ops.constant_buffers import ConstantBuffers

ASSET_KEYS = ("template", "faces", "parents", "skinning_weights", "shape_basis", "bone_regressor", "tips")


class HandOutput(NamedTuple):
    """The output of `HandModel`."""

    vertices: Tensor
    """`(B, 778, 3)` metres."""
    joints: Tensor
    """`(B, 21, 3)` metres, FreiHAND's order."""


class HandModel(ConstantBuffers):
    """A right hand with variable pose and shape and MANO's bones (Romero et al. 2017, section 3).

    Buffers, in one floating dtype except `faces`: `template` (778, 3) metres; `faces` (1538, 3) int64,
    counter-clockwise from outside; `skinning_weights` (778, 16); `shape_basis` (778, 3, 10), metres per
    standard deviation; `bone_regressor` (16, 778) and `joint_regressor` (21, 778), rows summing to 1, the
    latter with one-hot rows for the fingertips; `pose_basis` (778, 3, 135) or None, MANO's pose blend shapes.
    `parents` is a tuple of 16 with -1 for the wrist.
    """

    template: Tensor
    faces: Tensor
    skinning_weights: Tensor
    shape_basis: Tensor
    bone_regressor: Tensor
    joint_regressor: Tensor
    pose_basis: Tensor | None

    bone_names = BONE_NAMES
    joint_names = JOINT_NAMES

    def __init__(
        self,
        *,
        template: NDArray[np.floating],
        faces: NDArray[np.integer],
        skinning_weights: NDArray[np.floating],
        shape_basis: NDArray[np.floating],
        bone_regressor: NDArray[np.floating],
        tips: Sequence[int],
        parents: Sequence[int] = PARENTS,
        pose_basis: NDArray[np.floating] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make a hand from the arrays that the class describes.

        tips: the vertices at the ends of thumb, index, middle, ring and pinky. Raises ValueError for a wrong
        shape or index, and for what `check_plausible` rejects: numbers that are not finite, a unit other than
        metres, a left hand.
        """
        super().__init__()
        count = np.shape(template)[0] if np.ndim(template) else 0
        expected = {
            "template": (np.shape(template), (count, 3)),
            "faces": (np.shape(faces), (*np.shape(faces)[:1], 3)),
            "skinning_weights": (np.shape(skinning_weights), (count, 16)),
            "shape_basis": (np.shape(shape_basis), (count, 3, *np.shape(shape_basis)[2:3])),
            "bone_regressor": (np.shape(bone_regressor), (16, count)),
            "parents": (np.shape(parents), (16,)),
            "tips": (np.shape(tips), (5,)),
        }
        if pose_basis is not None:
            expected["pose_basis"] = (np.shape(pose_basis), (count, 3, 135))
        for name, (shape, wanted) in expected.items():
            if shape != wanted or len(shape) == 0:
                raise ValueError(f"{name} must have shape {wanted} for {count} vertices, got {shape}")
        for name, integers in (("faces", faces), ("parents", parents), ("tips", tips)):
            if np.asarray(integers).dtype.kind not in "iu":
                raise ValueError(f"{name} must be integers, got dtype {np.asarray(integers).dtype}")
        if np.size(faces) and (np.min(faces) < 0 or np.max(faces) >= count):
            raise ValueError(
                f"faces must lie in [0, {count}), got values from {np.min(faces)} to {np.max(faces)}"
            )
        self.parents = tuple(int(parent) for parent in parents)
        if self.parents[0] != -1 or any(not 0 <= p < j for j, p in enumerate(self.parents) if j):
            raise ValueError(f"parents must start with -1 and name an earlier bone each, got {self.parents}")
        self.tips = tuple(int(tip) for tip in tips)
        if any(not 0 <= tip < count for tip in self.tips):
            raise ValueError(f"tips must lie in [0, {count}), got {self.tips}")
        check_plausible(template, skinning_weights, shape_basis, bone_regressor, pose_basis)
        ends = np.zeros((5, count))
        ends[np.arange(5), list(self.tips)] = 1.0
        rows = np.concatenate([np.asarray(bone_regressor, dtype=np.float64), ends])
        joint_regressor = rows[list(JOINT_ORDER)]

        def buffer(name: str, values: NDArray[np.floating] | None) -> None:
            if values is None:
                self.register_buffer(name, None)
            else:
                tensor = torch.as_tensor(np.array(values), dtype=dtype, device="cpu")
                self.register_constant(name, tensor, cast=True)

        self.register_constant("faces", torch.as_tensor(np.array(faces), dtype=torch.int64, device="cpu"))
        buffer("template", template)
        buffer("skinning_weights", skinning_weights)
        buffer("shape_basis", shape_basis)
        buffer("bone_regressor", bone_regressor)
        buffer("joint_regressor", joint_regressor)
        buffer("pose_basis", pose_basis)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        tips: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> HandModel:
        """Load the open hand that ships with the package, or another in the same format.

        path: an .npz written by tools/make_hand.py; None for the shipped hand. tips: five fingertip vertices
        that replace the file's. Raises FileNotFoundError for a missing file, and ValueError for a file that
        is damaged, lacks an array, or does not hold a hand.
        """
        if path is None:
            with resources.as_file(resources.files("pahm") / "assets" / "hand.npz") as asset:
                return cls.load(asset, tips=tips, dtype=dtype)
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no hand at {path}: expected an .npz written by tools/make_hand.py")
        if path.suffix != ".npz":
            raise ValueError(f"{path} must be an .npz file (for MANO_RIGHT.pkl use HandModel.from_mano)")
        arrays: dict[str, Any] = dict(read_npz(path, ASSET_KEYS))
        missing = [key for key in ASSET_KEYS if key not in arrays]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: expected {', '.join(ASSET_KEYS)}")
        if tips is not None:
            arrays["tips"] = np.asarray(tips)
        return cls._of_file(path, arrays, dtype)

    @classmethod
    def from_mano(
        cls,
        path: str | PathLike[str],
        tips: Sequence[int] | str = FREIHAND_TIPS,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> HandModel:
        """Load the user's own MANO_RIGHT.pkl, including pose blend shapes; see `pahm.hand.mano`.

        tips: five vertices (thumb, index, middle, ring, pinky) or a name in `MANO_TIPS`.
        """
        from pahm.hand.mano import read_mano

        return cls._of_file(path, read_mano(path, tips), dtype)

    @classmethod
    def _of_file(cls, path: str | PathLike[str], arrays: dict[str, Any], dtype: torch.dtype) -> HandModel:
        try:
            return cls(**arrays, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{error} (in {path})") from error

    def forward(
        self, pose: Tensor, shape: Tensor | None = None, translation: Tensor | None = None
    ) -> HandOutput:
        """Pose and shape a batch of hands. Differentiable in all three arguments.

        pose: `(B, 16, 3)` axis-angle in radians, each bone relative to its parent in the frame of the rest
        pose; `pose[:, 0]` turns the whole hand about the wrist bone. shape: `(B, K)` coefficients, K up to
        10, None for the mean hand. translation: `(B, 3)` metres, added last. All must have the model's dtype
        and device. Raises TypeError for a wrong dtype, ValueError for a wrong shape.
        """
        self._check("pose", pose, (16, 3))
        rest = self.template.expand(len(pose), -1, -1)
        if shape is not None:
            self._check("shape", shape, None)
            _same_batch("shape", shape, pose)
            rest = rest + torch.einsum("bk,nck->bnc", shape, self.shape_basis[..., : shape.shape[1]])
        if translation is not None:
            self._check("translation", translation, (3,))
            _same_batch("translation", translation, pose)
        rotations = axis_angle_to_matrix(pose)
        bones = self.bone_regressor @ rest
        if self.pose_basis is not None:
            change = rotations[:, 1:] - torch.eye(3, dtype=pose.dtype, device=pose.device)
            rest = rest + torch.einsum("bp,ncp->bnc", change.flatten(1), self.pose_basis)
        turns, heads = self._chain(rotations, bones)
        offsets = heads - (turns @ bones[..., None])[..., 0]
        transforms = torch.cat([turns, offsets[..., None]], -1).flatten(2)
        blended = (self.skinning_weights @ transforms).unflatten(-1, (3, 4))
        vertices = (blended[..., :3] @ rest[..., None])[..., 0] + blended[..., 3]
        if translation is not None:
            vertices = vertices + translation[:, None]
        return HandOutput(vertices, self.joint_regressor @ vertices)

    def bones(self, shape: Tensor | None = None) -> Tensor:
        """Rest-pose bone positions: `(16, 3)` for the mean hand or `(B, 16, 3)` for shapes `(B, K)`."""
        if shape is None:
            return self.bone_regressor @ self.template
        self._check("shape", shape, None)
        rest = self.template + torch.einsum("bk,nck->bnc", shape, self.shape_basis[..., : shape.shape[1]])
        return self.bone_regressor @ rest

    def _chain(self, rotations: Tensor, bones: Tensor) -> tuple[Tensor, Tensor]:
        """World rotations `(B, 16, 3, 3)` and positions `(B, 16, 3)` of the bones."""
        turns, heads = [rotations[:, 0]], [bones[:, 0]]
        for j, parent in enumerate(self.parents[1:], start=1):
            step = (bones[:, j] - bones[:, parent])[..., None]
            heads.append(heads[parent] + (turns[parent] @ step)[..., 0])
            turns.append(turns[parent] @ rotations[:, j])
        return torch.stack(turns, 1), torch.stack(heads, 1)

    def _check(self, name: str, value: Tensor, tail: tuple[int, ...] | None) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype != self.template.dtype:
            raise TypeError(f"{name} must be {self.template.dtype} like the hand, got {value.dtype}")
        if tail is None:
            limit = self.shape_basis.shape[2]
            if value.ndim != 2 or value.shape[1] > limit:
                raise ValueError(f"{name} must have shape (B, K) with K <= {limit}, got {tuple(value.shape)}")
        elif value.ndim != 1 + len(tail) or value.shape[1:] != tail:
            wanted = ", ".join(["B", *map(str, tail)])
            raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")


def _same_batch(name: str, value: Tensor, pose: Tensor) -> None:
    if len(value) != len(pose):
        raise ValueError(f"{name} must have pose's batch of {len(pose)}, got {len(value)}")
