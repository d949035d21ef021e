"""The mesh decoder (section 3.3): four coarse-to-fine levels of pixel-aligned mesh convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.model.extractor import JOINTS
from pahm.model.mapping import PixelAligned
from pahm_ops import MeshPool, SpiralConv
from pahm_ops.mesh import MeshHierarchy, spiral_indices

UNIT = 0.2
"""The decoder works in units of 0.2 m, as CMR does, so that a hand is about one unit long."""


LIFT_CHANNELS = 256
"""Hidden width of the perceptron that lifts the 2D pose to the first mesh."""


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
    """One level of the decoder: sample the map at the vertices so far, convolve on the mesh, predict offsets.

    Forward: `feature_map (B, C_q, H, W)`, `mesh (B, N, 3)` (the level's mesh so far, units of 0.2 m), `camera
    (B, 3)`, `features (B, N, C_in)` (unpooled from the coarser level), to `(mesh + offsets, features (B, N,
    C))`.
    """

    def __init__(self, map_channels: int, inputs: int, channels: int, spirals: Tensor, heads: int) -> None:
        super().__init__()
        self.mapping = PixelAligned()
        self.merge = nn.Linear(map_channels + inputs + 3, channels)
        self.mesh_conv = MeshConv(channels, spirals, heads)
        self.norm = nn.LayerNorm(channels)
        self.offset = SpiralConv(channels, 3, spirals)
        nn.init.normal_(self.offset.layer.weight, std=1e-3)

    def forward(
        self, feature_map: Tensor, mesh: Tensor, camera: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        image_features = self.mapping(feature_map, mesh * UNIT, camera)
        merged = torch.cat([image_features, features, mesh], dim=-1)
        features = self.mesh_conv(F.gelu(self.merge(merged)))
        return mesh + self.offset(self.norm(features)), features


class MeshDecoder(nn.Module):
    """Maps Q_32 ... Q_4 to the meshes M4 (98 vertices) ... M1 (778) and the camera.

    The paper does not say where the first projection takes place. Here a small perceptron lifts the 2D pose,
    which the extractor is supervised to predict, together with the globally pooled Q_32 to a first mesh of 98
    vertices (offsets from the template) and to the camera. Each level then samples its map at the mesh that
    the previous level predicted, unpooled to its own vertices, and predicts offsets from it. A learned
    vector for each vertex of M4, unpooled along with the features, tells the vertices apart.

    Forward: four maps and the 2D joints `(B, 21, 2)` in normalised coordinates, to `(meshes, camera)`:
    `(B, N_s, 3)` in metres relative to the root joint, coarse to fine, and `(B, 3)` weak perspective
    [s, tx, ty], see `PixelAligned`.
    """

    template: Tensor
    mean_camera: Tensor

    def __init__(self, config: ModelConfig, hierarchy: MeshHierarchy, root: Sequence[float]) -> None:
        super().__init__()
        coarse_to_fine = range(len(hierarchy.vertices) - 1, -1, -1)
        channels = config.decoder_channels
        coarsest = torch.as_tensor(hierarchy.vertices[-1] - root, dtype=torch.float32) / UNIT
        self.register_buffer("template", coarsest, persistent=False)
        # A hand of about 0.18 m fills about 60 % of the image.
        self.register_buffer("mean_camera", torch.tensor([6.0, 0.0, 0.0]), persistent=False)
        self.embedding = nn.Parameter(0.1 * torch.randn(len(coarsest), channels[0]))
        to_mesh = nn.Linear(LIFT_CHANNELS, 3 * len(coarsest) + 3)
        nn.init.normal_(to_mesh.weight, std=1e-3)
        nn.init.zeros_(to_mesh.bias)
        inputs = config.feature_channels[0] + 2 * JOINTS
        self.lift = nn.Sequential(
            nn.Linear(inputs, LIFT_CHANNELS),
            nn.GELU(),
            nn.Linear(LIFT_CHANNELS, LIFT_CHANNELS),
            nn.GELU(),
            to_mesh,
        )
        self.levels = nn.ModuleList()
        self.unpool = nn.ModuleList()
        for i, level in enumerate(coarse_to_fine):
            spirals = spiral_indices(
                hierarchy.faces[level], config.spiral_length, vertices=hierarchy.vertices[level]
            )
            inputs = channels[max(i - 1, 0)]
            self.levels.append(
                MeshLevel(
                    config.feature_channels[i],
                    inputs,
                    channels[i],
                    torch.from_numpy(spirals),
                    config.attention_heads[i],
                )
            )
            if level:
                self.unpool.append(MeshPool(hierarchy.up[level - 1]))

    def forward(self, maps: Sequence[Tensor], joints_2d: Tensor) -> tuple[list[Tensor], Tensor]:
        pooled = maps[0].mean(dim=(2, 3))
        initial = self.lift(torch.cat([pooled, joints_2d.flatten(1).to(pooled.dtype)], dim=1)).float()
        log_scale, shift = initial[:, :1].clamp(-3, 3), 0.1 * initial[:, 1:3]
        camera = torch.cat([self.mean_camera[:1] * log_scale.exp(), self.mean_camera[1:] + shift], dim=1)
        mesh = self.template + initial[:, 3:].unflatten(1, (-1, 3))
        features = self.embedding.expand(mesh.shape[0], -1, -1)
        meshes = []
        for i, (level, feature_map) in enumerate(zip(self.levels, maps, strict=True)):
            if i:
                mesh, features = self.unpool[i - 1](mesh), self.unpool[i - 1](features)
            mesh, features = level(feature_map, mesh, camera, features)
            meshes.append(mesh * UNIT)
        return meshes, camera
