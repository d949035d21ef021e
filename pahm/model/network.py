"""The whole network: image in, four meshes, camera, 2D pose and silhouette out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.decoder import MeshDecoder
from pahm.model.extractor import Cues, Extractor, expected_position
from pahm.model.metro import MetroDecoder
from pahm_ops.constant_buffers import ConstantBuffers


class Prediction(NamedTuple):
    """What `HandNet` gives for `B` images."""

    meshes: list[Tensor]
    """M4, M3, M2, M1: `(B, 98 | 195 | 389 | 778, 3)` in metres, camera axes, relative to the root joint.
    Other decoders have other meshes on the way (see `MetroDecoder` and `config.refinements`), each with the
    number of vertices of a level; the last is the result.
    """
    camera: Tensor
    """`(B, 3)` weak perspective [s, tx, ty]: x_n = s * (X + tx), y_n = s * (Y + ty), -1 and 1 at the image's
    edges.
    """
    cues: list[Cues]
    """2D pose and silhouette of each hourglass; empty where `config.cues` is off."""
    joints: list[Tensor]
    """What METRO's joint queries predict, `(B, 21, 3)` each, as `meshes`; empty for graph convolutions."""


class HandNet(ConstantBuffers):
    """Pixel-aligned, non-parametric hand mesh reconstruction (section 3, figure 1).

    `topology` says which hand: the shipped one by default, or MANO's (`HandTopology.from_hand`).

    `config` selects the paper's network or one that it is compared with, see `ModelConfig`.

    Forward: `images (B, 3, S, S)`, RGB normalised with ImageNet's mean and deviation, to `Prediction`.
    Raises ValueError for another shape.
    """

    joint_regressor: Tensor
    mean_hand: Tensor
    """`(778, 3)` metres: the mean of the training hands, the constant prediction that scores are compared
    with.
    """

    def __init__(self, config: ModelConfig, topology: HandTopology | None = None) -> None:
        super().__init__()
        self.config = config
        self.topology = topology or HandTopology.load()
        regressor = torch.as_tensor(self.topology.joint_regressor, dtype=torch.float32, device="cpu")
        self.register_constant("joint_regressor", regressor, cast=True)
        template = self.topology.hierarchy.vertices[0]
        root = self.topology.joint_regressor[config.root_joint] @ template
        self.register_buffer("mean_hand", torch.as_tensor(template - root, dtype=torch.float32))
        self.extractor = Extractor(config)
        decoder = MetroDecoder if config.decoder == "metro" else MeshDecoder
        self.decoder = decoder(config, self.topology, root)

    @property
    def faces(self) -> NDArray[np.int64]:
        """`(F, 3)` int64 numpy array, the triangles of M1."""
        return self.topology.hierarchy.faces[0]

    def forward(self, images: Tensor) -> Prediction:
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (B, 3, {size}, {size}), got {tuple(images.shape)}")
        maps, cues = self.extractor(images)
        joints_2d = expected_position(cues[-1].pose_logits) if cues else None
        meshes, camera, joints = self.decoder(maps, joints_2d)
        return Prediction(meshes, camera, cues, joints)

    def joints(self, vertices: Tensor) -> Tensor:
        """The 21 joints `(B, 21, 3)` of meshes `(B, 778, 3)`, in the same unit and frame."""
        return torch.matmul(self.joint_regressor.to(vertices.dtype), vertices)
