"""The mesh decoder (section 3.3): four coarse-to-fine levels of pixel-aligned mesh convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.first_mesh import UNIT, FirstMesh
from pahm.model.mapping import GlobalMLP, GlobalRepeat, PixelAligned
from pahm_ops import MeshPool, SpiralConv
from pahm_ops.mesh import MeshHierarchy, spiral_indices

REFINED_MAPS: dict[int, list[tuple[int, ...]]] = {0: [], 1: [(1, 2, 3)], 3: [(1,), (2,), (3,)]}
"""Which of Q_32, Q_16, Q_8, Q_4 each refinement of the full mesh samples, by the number of refinements."""


class SelfAttention(nn.Module):
    """Multi-head self-attention over the vertices (equation 4), `(B, N, C)` to `(B, N, C)`."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention: {channels} channels cannot be split over {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, vertices, channels = x.shape
        q, k, v = self.qkv(x).view(batch, vertices, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, vertices, channels))


class MeshConv(nn.Module):
    """A mesh-conv layer (figure 2): spiral convolution, self-attention, spiral convolution, each residual.

    `(B, N, C)` to `(B, N, C)`. Normalisation comes first in each branch; `heads=0` leaves the attention out.
    """

    def __init__(self, channels: int, spirals: Tensor, heads: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.conv_in = SpiralConv(channels, channels, spirals, activation="gelu")
        self.norm_attention = nn.LayerNorm(channels) if heads else None
        self.attention = SelfAttention(channels, heads) if heads else None
        self.norm_out = nn.LayerNorm(channels)
        self.conv_out = SpiralConv(channels, channels, spirals, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv_in(self.norm_in(x))
        if self.attention is not None and self.norm_attention is not None:
            x = x + self.attention(self.norm_attention(x))
        return x + self.conv_out(self.norm_out(x))


class MeshLevel(nn.Module):
    """One level of the decoder: map image features to the vertices, convolve on the mesh, predict offsets.

    Without a `mapping` the level sees the image only through the features of the coarser one.

    Forward: `feature_map` (one or several `(B, C_q, H, W)`, what the mapping takes), `mesh (B, N, 3)` (the
    level's mesh so far, units of 0.2 m), `camera (B, 3)`, `features (B, N, C_in)` (unpooled from the coarser
    level), to `(mesh + offsets, features (B, N, C))`.
    """

    def __init__(
        self,
        mapping: nn.Module | None,
        map_channels: int,
        inputs: int,
        channels: int,
        spirals: Tensor,
        heads: int,
    ) -> None:
        super().__init__()
        self.mapping = mapping
        self.merge = nn.Linear((map_channels if mapping is not None else 0) + inputs + 3, channels)
        self.mesh_conv = MeshConv(channels, spirals, heads)
        self.norm = nn.LayerNorm(channels)
        self.offset = SpiralConv(channels, 3, spirals)
        nn.init.normal_(self.offset.layer.weight, std=1e-3)

    def forward(
        self, feature_map: Tensor | Sequence[Tensor], mesh: Tensor, camera: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen = [features, mesh]
        if self.mapping is not None:
            seen.insert(0, self.mapping(feature_map, mesh * UNIT, camera))
        # The mesh is float32 in a network of half precision, too.
        inputs = torch.cat([part.to(features.dtype) for part in seen], dim=-1)
        features = self.mesh_conv(F.gelu(self.merge(inputs)))
        return mesh + self.offset(self.norm(features)), features


class MeshDecoder(nn.Module):
    """Maps Q_32 ... Q_4 to the meshes M4 (98 vertices) ... M1 (778) and the camera.

    Each level maps image features to the vertices of the mesh that the previous level predicted, unpooled to
    its own vertices, and predicts offsets from it; `config.skips` says which levels do, `config.mapping` how.
    The first mesh and the camera come from `FirstMesh`. A learned vector for each vertex of M4, unpooled
    along with the features, tells the vertices apart.

    With `config.refinements` (Table 3), further levels at M1 follow, each of which samples finer maps at the
    full mesh as Tang et al. (ICCV 2021) refine a rough mesh: one level that reads Q_16, Q_8 and Q_4 together,
    or three that read one each.

    Forward: four maps and the 2D joints `(B, 21, 2)` in normalised coordinates (None without 2D cues), to
    `(meshes, camera, [])`: `(B, N_s, 3)` in metres relative to the root joint, coarse to fine, and `(B, 3)`
    weak perspective [s, tx, ty], see `PixelAligned`.

    Raises:
        ValueError: refinements by another mapping than the pixel-aligned one.
    """

    def __init__(self, config: ModelConfig, topology: HandTopology, root: NDArray[np.float64]) -> None:
        super().__init__()
        if config.refinements and config.mapping != "pixel_aligned":
            raise ValueError(
                f"model.refinements: {config.refinements} need model.mapping pixel_aligned, "
                f"got {config.mapping!r}"
            )
        hierarchy = topology.hierarchy
        channels, maps = config.decoder_channels, config.feature_channels
        self.pixel_aligned = config.mapping == "pixel_aligned"
        self.lift = FirstMesh(config, hierarchy.vertices[-1] - root)
        self.embedding = nn.Parameter(0.1 * torch.randn(len(hierarchy.vertices[-1]), channels[0]))
        self.levels = nn.ModuleList()
        self.unpool = nn.ModuleList()
        for i, level in enumerate(range(len(hierarchy.vertices) - 1, -1, -1)):
            mapping, seen = _mapping(config, i, len(hierarchy.vertices[level]))
            spirals = _spirals(hierarchy, level, config.spiral_length)
            inputs = channels[max(i - 1, 0)]
            self.levels.append(
                MeshLevel(mapping, seen, inputs, channels[i], spirals, config.attention_heads[i])
            )
            if level:
                self.unpool.append(MeshPool(hierarchy.up[level - 1]))
        self.refine = nn.ModuleList()
        for places in REFINED_MAPS[config.refinements]:
            seen, last, heads = sum(maps[i] for i in places), channels[-1], config.attention_heads[-1]
            self.refine.append(MeshLevel(PixelAligned(), seen, last, last, spirals, heads))

    def forward(
        self, maps: Sequence[Tensor], joints_2d: Tensor | None
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        mesh, camera = self.lift(maps[0], joints_2d)
        features = self.embedding.expand(mesh.shape[0], -1, -1)
        meshes = []
        for i, level in enumerate(self.levels):
            if i:
                mesh, features = self.unpool[i - 1](mesh), self.unpool[i - 1](features)
            # A level without a skip connection may stand beyond the last map that was made.
            seen = maps[min(i, len(maps) - 1) if self.pixel_aligned else 0]
            mesh, features = level(seen, mesh, camera, features)
            meshes.append(mesh * UNIT)
        for places, level in zip(REFINED_MAPS[len(self.refine)], self.refine, strict=True):
            mesh, features = level([maps[i] for i in places], mesh, camera, features)
            meshes.append(mesh * UNIT)
        return meshes, camera, []


def _mapping(config: ModelConfig, level: int, vertices: int) -> tuple[nn.Module | None, int]:
    """The feature mapping of a level, 0 for M4, and the channels that it gives."""
    own, glob = config.feature_channels[level], config.feature_channels[0]
    if not config.skips[level]:
        return None, 0
    if config.mapping == "pixel_aligned":
        return PixelAligned(), own
    if config.mapping == "mlp":
        return GlobalMLP(glob, vertices, own), own
    return GlobalRepeat(), glob


def _spirals(hierarchy: MeshHierarchy, level: int, length: int) -> Tensor:
    table = spiral_indices(hierarchy.faces[level], length, vertices=hierarchy.vertices[level])
    return torch.from_numpy(table)
