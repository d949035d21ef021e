"""METRO's transformer (Lin et al., CVPR 2021), as published and with the paper's pixel-aligned mapping.

21 joint queries and 195 vertex queries pass three encoder blocks of falling width (Table 4). In training up
to 30 % of the queries are hidden. A linear layer takes the 195 vertices to 778; it starts from the
hierarchy's up transforms, where METRO's starts at random. METRO's own camera head is replaced by the one that
all our networks have.

Both decoders are called as `MeshDecoder` is, and give `(meshes, camera, joints)`: meshes of 195 vertices
(one, or one a block) and of 778, `(B, N, 3)` metres relative to the root joint; camera `(B, 3)`; and the
points `(B, 21, 3)` of the joint queries, in the same unit, for each mesh of 195. They raise ValueError where
a width cannot be split over the heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.baselines.mappings import GlobalRepeat
from pahm.model.network import (
    JOINTS,
    UNIT,
    FirstMesh,
    PixelAligned,
    global_feature,
    perceptron,
    weak_perspective,
)
from pahm_ops import MeshPool
from pahm_ops.constant_buffers import ConstantBuffers

MASKED = 0.3
"""Largest share of queries that masked vertex modelling hides in training."""


class EncoderBlock(nn.Module):
    """One of METRO's blocks: reduce the width, add position embeddings, a transformer encoder, reduce again.

    `(B, Q, inputs)` to `(B, Q, outputs)`, with a linear shortcut around it. Layers are BERT's (normalised
    after each branch, GELU, dropout 0.1) with feed-forward layers of twice the width, as METRO's code has it.
    """

    def __init__(self, inputs: int, width: int, outputs: int, queries: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"model.transformer_heads: {width} channels cannot be split over {heads} heads")
        self.embed = nn.Linear(inputs, width)
        self.position = nn.Parameter(0.02 * torch.randn(queries, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        # torch copies one layer; each starts from weights of its own, drawn as BERT's.
        for module in self.encoder.modules():
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.reduce = nn.Linear(width, outputs)
        self.shortcut = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.encoder(self.embed(x) + self.position)) + self.shortcut(x)


class MetroDecoder(ConstantBuffers):
    """METRO as published: each query is the global feature and the template's coordinates of its joint or
    vertex, and the last block gives all coordinates.

    The global feature is the mean of Q_32; METRO's is its backbone's own. The image reaches the vertices by
    the queries only, so there is no first mesh, and the camera merely places the result.
    """

    template: Tensor
    """`(216, 3)` joints and vertices in units of 0.2 m."""

    def __init__(self, config: ModelConfig, topology: HandTopology) -> None:
        super().__init__()
        up, regressor = _coarsened(topology)
        vertices = topology.relative_vertices(2, config.root_joint)
        points = np.concatenate([regressor @ vertices, vertices]) / UNIT
        template = torch.as_tensor(points, dtype=torch.float32, device="cpu")
        self.register_constant("template", template, cast=True)
        self.crop = config.crop
        self.lift = perceptron(config, 3)
        self.mapping = GlobalRepeat(config.feature_channels[0])
        between = [width // 2 for width in config.transformer_channels[:-1]]
        self.blocks = nn.ModuleList(
            EncoderBlock(
                inputs, width, outputs, len(points), config.transformer_layers, config.transformer_heads
            )
            for inputs, width, outputs in zip(
                [self.mapping.channels + 3, *between],
                config.transformer_channels,
                [*between, 3],
                strict=True,
            )
        )
        self.upsample = _upsample(up)

    def forward(self, maps: Sequence[Tensor], joints_2d: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        camera = weak_perspective(self.lift(global_feature(maps, joints_2d)), self.crop)
        points = self.template.expand(camera.shape[0], -1, -1)
        x = torch.cat([self.mapping(maps, points, camera), points], dim=-1)
        x = hide_queries(x, self.training)
        for block in self.blocks:
            x = block(x)
        meshes, joints = _results([x], self.upsample)
        return meshes, camera, joints


class AlignedMetroDecoder(ConstantBuffers):
    """METRO with the pixel-aligned mapping: before each block Q_32, Q_16, Q_8 are sampled at the queries'
    points so far and joined with those points and the features of the block before (the skip connections),
    and each block predicts offsets.

    The points start from `FirstMesh`, unpooled to 195 vertices, and its joints. The paper leaves these
    details to an appendix that its text does not hold; they follow our own decoder.
    """

    to_joints: Tensor
    """`(21, 195)`: joints = to_joints @ vertices."""

    def __init__(self, config: ModelConfig, topology: HandTopology) -> None:
        super().__init__()
        up, regressor = _coarsened(topology)
        to_joints = torch.as_tensor(regressor, dtype=torch.float32, device="cpu")
        self.register_constant("to_joints", to_joints, cast=True)
        self.lift = FirstMesh(config, topology.relative_vertices(3, config.root_joint))
        self.unpool = MeshPool(topology.hierarchy.up[2].astype(np.float32))
        self.mappings = nn.ModuleList()
        self.blocks = nn.ModuleList()
        self.offsets = nn.ModuleList()
        layers, heads = config.transformer_layers, config.transformer_heads
        carried, queries = 0, sum(regressor.shape)
        for i, width in enumerate(config.transformer_channels):
            mapping = PixelAligned([i], config.feature_channels[i])
            seen, carried = carried + mapping.channels + 3, width // 2
            offset = nn.Linear(carried, 3)
            nn.init.normal_(offset.weight, std=1e-3)
            nn.init.zeros_(offset.bias)
            self.mappings.append(mapping)
            self.blocks.append(EncoderBlock(seen, width, carried, queries, layers, heads))
            self.offsets.append(offset)
        self.upsample = _upsample(up)

    def forward(self, maps: Sequence[Tensor], joints_2d: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        mesh, camera = self.lift.mesh_and_camera(maps, joints_2d)
        mesh = self.unpool(mesh)
        points = torch.cat([self.to_joints.to(mesh.dtype) @ mesh, mesh], dim=1)
        features: list[Tensor] = []
        stages: list[Tensor] = []
        for mapping, block, offset in zip(self.mappings, self.blocks, self.offsets, strict=True):
            seen = mapping(maps, points * UNIT, camera)
            inputs = torch.cat([*features, seen, points.to(seen.dtype)], dim=-1)
            x = block(hide_queries(inputs, self.training))
            points = points + offset(x)
            features = [x]
            stages.append(points)
        meshes, joints = _results(stages, self.upsample)
        return meshes, camera, joints


def hide_queries(queries: Tensor, training: bool) -> Tensor:
    """Masked vertex modelling: in training a random share of the queries `(B, Q, C)` becomes a constant.

    METRO hides exactly that share of an image's queries; here it is the chance of each.
    """
    if not training:
        return queries
    share = MASKED * torch.rand(queries.shape[0], 1, 1, device=queries.device)
    hidden = torch.rand(*queries.shape[:2], 1, device=queries.device) < share
    return queries.masked_fill(hidden, 0.01)


def _coarsened(topology: HandTopology) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(778, 195)` from the vertices of M3 to those of M1, and `(21, 195)` from them to the joints."""
    up = (topology.hierarchy.up[0] @ topology.hierarchy.up[1]).toarray()
    return up, topology.joint_regressor @ up


def _upsample(up: NDArray[np.float64]) -> nn.Linear:
    layer = nn.Linear(up.shape[1], up.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(up, dtype=torch.float32, device="cpu"))
        layer.bias.zero_()
    return layer


def _results(stages: list[Tensor], upsample: nn.Linear) -> tuple[list[Tensor], list[Tensor]]:
    """Of points `(B, 216, 3)` in units of 0.2 m: the meshes, the last of them with 778 vertices, and the
    joints, in metres.
    """
    coarse = stages[-1][:, JOINTS:].transpose(1, 2).to(upsample.weight.dtype)
    fine = upsample(coarse).transpose(1, 2)
    meshes = [points[:, JOINTS:] * UNIT for points in stages]
    return [*meshes, fine * UNIT], [points[:, :JOINTS] * UNIT for points in stages]
