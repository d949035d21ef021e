"""The whole network: image in, four meshes, camera, 2D pose and silhouette out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.decoder import MeshDecoder
from pahm.model.extractor import Hourglass, expected_position


class Prediction(NamedTuple):
    """What `HandNet` gives for `B` images."""

    meshes: list[Tensor]
    """M4, M3, M2, M1: `(B, 98 | 195 | 389 | 778, 3)` in metres, camera axes, relative to the root joint."""
    camera: Tensor
    """`(B, 3)` weak perspective [s, tx, ty]: x_n = s * (X + tx), y_n = s * (Y + ty), -1 and 1 at the image's
    edges.
    """
    pose_logits: Tensor
    """`(B, 21, S/4, S/4)`; their sigmoid is the heatmap of each joint."""
    silhouette_logits: Tensor
    """`(B, 1, S/4, S/4)`; their sigmoid is the probability of the hand."""


class HandNet(nn.Module):
    """Pixel-aligned, non-parametric hand mesh reconstruction (section 3, figure 1).

    `topology` says which hand: the shipped one by default, or MANO's (`HandTopology.from_hand`).

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
        regressor = torch.as_tensor(self.topology.joint_regressor, dtype=torch.float32)
        self.register_buffer("joint_regressor", regressor, persistent=False)
        template = self.topology.hierarchy.vertices[0]
        root = self.topology.joint_regressor[config.root_joint] @ template
        self.register_buffer("mean_hand", torch.as_tensor(template - root, dtype=torch.float32))
        self.extractor = Hourglass(config)
        self.decoder = MeshDecoder(config, self.topology.hierarchy, root)

    @property
    def faces(self) -> NDArray[np.int64]:
        """`(F, 3)` int64 numpy array, the triangles of M1."""
        return self.topology.hierarchy.faces[0]

    def forward(self, images: Tensor) -> Prediction:
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (B, 3, {size}, {size}), got {tuple(images.shape)}")
        maps, pose_logits, silhouette_logits = self.extractor(images)
        meshes, camera = self.decoder(maps, expected_position(pose_logits))
        return Prediction(meshes, camera, pose_logits, silhouette_logits)

    def joints(self, vertices: Tensor) -> Tensor:
        """The 21 joints `(B, 21, 3)` of meshes `(B, 778, 3)`, in the same unit and frame."""
        return torch.matmul(self.joint_regressor.to(vertices.dtype), vertices)
