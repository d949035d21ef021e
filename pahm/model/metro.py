"""METRO's transformer (Lin et al., CVPR 2021), as published and with the paper's pixel-aligned mapping."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.extractor import JOINTS
from pahm.model.first_mesh import UNIT, FirstMesh
from pahm.model.mapping import GlobalRepeat, PixelAligned
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
    """21 joint queries and 195 vertex queries through three encoder blocks of falling width (Table 4).

    As published (`config.mapping` "repeat"): a query is the global feature (the mean of Q_32; METRO's is its
    backbone's own) and the template's coordinates of its joint or vertex; the last block gives all
    coordinates. In training up to 30 % of the queries are
    hidden. A linear layer takes the 195 vertices to 778; it starts from the hierarchy's up transforms, where
    METRO's starts at random. METRO's own camera head is replaced by the one that all our networks have.

    With "pixel_aligned": the first mesh is `FirstMesh`'s, unpooled to 195 vertices, and its joints; before
    each block Q_32, Q_16, Q_8 are sampled at the queries' points so far and joined with those points and the
    features of the block before (the skip connections), and each block predicts offsets. The paper leaves
    these details to an appendix that its text does not hold; they follow our own decoder.

    Forward: maps and the 2D joints as `MeshDecoder`, to `(meshes, camera, joints)`: meshes of 195 vertices
    (one, or one a block) and of 778, `(B, N, 3)` metres relative to the root joint; camera `(B, 3)`; the
    points `(B, 21, 3)` of the joint queries, in the same unit, for each mesh of 195.

    Raises:
        ValueError: the mapping is "mlp", there are refinements or fewer skip connections, or a width cannot
            be split over the heads.
    """

    template: Tensor
    to_joints: Tensor

    def __init__(self, config: ModelConfig, topology: HandTopology, root: NDArray[np.float64]) -> None:
        super().__init__()
        if config.mapping == "mlp":
            raise ValueError(
                "model.mapping: METRO's queries take 'repeat' (as published) or 'pixel_aligned', got 'mlp'"
            )
        if config.refinements:
            raise ValueError(f"model.decoder: METRO has no model.refinements, got {config.refinements}")
        if not all(config.skips):
            raise ValueError(
                f"model.skips: METRO's blocks have all of them or, with 'repeat', none, got {config.skips}"
            )
        hierarchy = topology.hierarchy
        self.pixel_aligned = config.mapping == "pixel_aligned"
        up = (hierarchy.up[0] @ hierarchy.up[1]).toarray()
        vertices = hierarchy.vertices[2] - root
        joints = topology.joint_regressor @ up
        points = np.concatenate([joints @ vertices, vertices]) / UNIT
        for name, values in (("template", points), ("to_joints", joints)):
            constant = torch.as_tensor(values, dtype=torch.float32, device="cpu")
            self.register_constant(name, constant, cast=True)
        self.lift = FirstMesh(config, hierarchy.vertices[3] - root)
        self.unpool = MeshPool(hierarchy.up[2])
        self.mapping: nn.Module = PixelAligned() if self.pixel_aligned else GlobalRepeat()
        self.blocks = nn.ModuleList()
        self.offsets = nn.ModuleList()
        carried, count = 0, len(config.transformer_channels)
        for i, width in enumerate(config.transformer_channels):
            seen = carried
            if self.pixel_aligned or i == 0:
                seen += config.feature_channels[i] + 3
            carried = width // 2 if self.pixel_aligned or i < count - 1 else 3
            layers, heads = config.transformer_layers, config.transformer_heads
            self.blocks.append(EncoderBlock(seen, width, carried, len(points), layers, heads))
            if self.pixel_aligned:
                offset = nn.Linear(carried, 3)
                nn.init.normal_(offset.weight, std=1e-3)
                nn.init.zeros_(offset.bias)
                self.offsets.append(offset)
        self.upsample = nn.Linear(up.shape[1], up.shape[0])
        with torch.no_grad():
            self.upsample.weight.copy_(torch.as_tensor(up))
            self.upsample.bias.zero_()

    def forward(
        self, maps: Sequence[Tensor], joints_2d: Tensor | None
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        first, camera = self.lift(maps[0], joints_2d)
        if self.pixel_aligned:
            stages = self._refine(maps, first, camera)
        else:
            points = self.template.expand(len(first), -1, -1)
            x = self._hide(torch.cat([self.mapping(maps[0], points, camera), points], dim=-1))
            for block in self.blocks:
                x = block(x)
            stages = [x]
        coarse = stages[-1][:, JOINTS:].transpose(1, 2).to(self.upsample.weight.dtype)
        fine = self.upsample(coarse).transpose(1, 2)
        meshes = [points[:, JOINTS:] * UNIT for points in stages]
        return [*meshes, fine * UNIT], camera, [points[:, :JOINTS] * UNIT for points in stages]

    def _refine(self, maps: Sequence[Tensor], first: Tensor, camera: Tensor) -> list[Tensor]:
        mesh = self.unpool(first)
        points = torch.cat([self.to_joints.to(mesh.dtype) @ mesh, mesh], dim=1)
        features: list[Tensor] = []
        stages: list[Tensor] = []
        for feature_map, block, offset in zip(maps, self.blocks, self.offsets, strict=False):
            seen = self.mapping(feature_map, points * UNIT, camera)
            inputs = torch.cat([*features, seen, points.to(seen.dtype)], dim=-1)
            x = block(self._hide(inputs))
            points = points + offset(x)
            features = [x]
            stages.append(points)
        return stages

    def _hide(self, queries: Tensor) -> Tensor:
        """Masked vertex modelling: in training a random share of the queries becomes a constant.

        METRO hides exactly that share of an image's queries; here it is the chance of each.
        """
        if not self.training:
            return queries
        share = MASKED * torch.rand(len(queries), 1, 1, device=queries.device)
        hidden = torch.rand(*queries.shape[:2], 1, device=queries.device) < share
        return queries.masked_fill(hidden, 0.01)
