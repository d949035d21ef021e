"""The hand model: template, skeleton, shape space, joints, and left and right hands."""

from pahm.hand.joints import BONE_NAMES, FREIHAND_TIPS, JOINT_NAMES, JOINT_ORDER, MANO_TIPS, PARENTS
from pahm.hand.left import mirror, mirror_faces, mirror_pose
from pahm.hand.model import HandModel, HandOutput
from pahm.hand.rotation import axis_angle_to_matrix

__all__ = [
    "BONE_NAMES",
    "FREIHAND_TIPS",
    "JOINT_NAMES",
    "JOINT_ORDER",
    "MANO_TIPS",
    "PARENTS",
    "HandModel",
    "HandOutput",
    "axis_angle_to_matrix",
    "mirror",
    "mirror_faces",
    "mirror_pose",
]
