"""The paper's network, to be read beside its figure 1.

From left to right: a backbone and an hourglass make the maps Q_32, Q_16, Q_8, Q_4, the 2D pose and the
silhouette (section 3.1). A perceptron lifts the 2D pose to the first mesh and the camera. Each level of the
decoder projects its mesh into its map and samples it there (section 3.2), convolves on the mesh and predicts
offsets (section 3.3): M4 with 98 vertices, M3 with 195, M2 with 389, M1 with 778.

The networks that the paper compares with are built from these parts in `pahm.model.baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pahm.config import ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.backbone import create_backbone, map_channels
from pahm_ops import MeshPool, SpiralConv, vertex_sample
from pahm_ops.constant_buffers import ConstantBuffers
from pahm_ops.mesh import spiral_indices

JOINTS = 21

UNIT = 0.2
"""Decoders work in units of 0.2 m, as CMR does, so that a hand is about one unit long."""

# What the network gives


class Cues(NamedTuple):
    """The 2D predictions of an hourglass, which the auxiliary losses of section 3.4 supervise."""

    pose_logits: Tensor
    """`(B, 21, S/4, S/4)`; their sigmoid is the heatmap of each joint."""
    silhouette_logits: Tensor
    """`(B, 1, S/4, S/4)`; their sigmoid is the probability of the hand."""


class Prediction(NamedTuple):
    """What `HandNet` gives for `B` images."""

    meshes: list[Tensor]
    """M4, M3, M2, M1: `(B, 98 | 195 | 389 | 778, 3)` in metres, camera axes, relative to the root joint.
    METRO has other meshes on the way, and refinements add meshes of 778. The last mesh is the result.
    """
    camera: Tensor
    """`(B, 3)` weak perspective [s, tx, ty]: x_n = s * (X + tx), y_n = s * (Y + ty), -1 and 1 at the image's
    edges.
    """
    cues: list[Cues]
    """2D pose and silhouette of each hourglass, at inference too; empty without `config.cues`."""
    joints: list[Tensor]
    """What METRO's joint queries predict, `(B, 21, 3)` each, as `meshes`; empty for graph convolutions."""


# The 2D feature extractor (section 3.1)


def conv_block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; the size of the map is kept."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Fusion(nn.Module):
    """Q_s = Conv(F_s (+) H_s), equation 1: concatenation along channels, then a 1 x 1 convolution."""

    def __init__(self, encoder_channels: int, upsampled_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = conv_block(encoder_channels + upsampled_channels, channels, 1)

    def forward(self, encoder: Tensor, upsampled: Tensor) -> Tensor:
        return self.conv(torch.cat([encoder, upsampled], dim=1))


class Hourglass(nn.Module):
    """The maps Q_s at strides 32, 16, 8, 4 of an encoder's features F_s.

    H_32 is a convolution of F_32. At the finer strides H_s is the upsampled Q_{2s} after a 3 x 3 convolution,
    so that the fusion of equation 1 is also the hourglass's skip connection.

    backbone: gives maps at strides 4, 8, 16, 32 with `encoder_channels`.
    channels: of Q_32, Q_16, Q_8, Q_4; with fewer entries the finer maps are not made.
    """

    def __init__(self, backbone: nn.Module, encoder_channels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        encoder = encoder_channels[::-1]
        depth = len(channels)
        self.bottom = conv_block(encoder[0], channels[0], 1)
        self.up = nn.ModuleList(conv_block(channels[i], channels[i + 1], 3) for i in range(depth - 1))
        self.fuse = nn.ModuleList(Fusion(encoder[i], channels[i], channels[i]) for i in range(depth))

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The backbone's input to the maps `(B, C_s, S/s, S/s)`, coarse to fine."""
        features = self.backbone(x)[::-1]
        maps = [self.fuse[0](features[0], self.bottom(features[0]))]
        for feature, up, fuse in zip(features[1:], self.up, self.fuse[1:], strict=False):
            upsampled = F.interpolate(
                up(maps[-1]), size=feature.shape[-2:], mode="bilinear", align_corners=False
            )
            maps.append(fuse(feature, upsampled))
        return maps


class Features(NamedTuple):
    """What an extractor gives to the decoder, and its 2D predictions."""

    maps: list[Tensor]
    """Q_32, Q_16, Q_8, Q_4: `(B, C_s, S/s, S/s)`."""
    joints_2d: Tensor
    """`(B, 21, 2)` in normalised coordinates, float32; `(B, 0, 2)` from an extractor without heads."""
    cues: list[Cues]


class Extractor(Hourglass):
    """The hourglass with the two heads of the 2D supervision (section 3.4), which read Q_4.

    Forward: images `(B, 3, S, S)`, S a multiple of 32, to `Features`.
    """

    def __init__(self, backbone: nn.Module, encoder_channels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__(backbone, encoder_channels, channels)
        finest = channels[-1]
        to_joints = nn.Conv2d(finest, JOINTS, 1)
        # A pixel belongs to a joint's peak about once in a thousand: start the logits there.
        nn.init.constant_(to_joints.bias, -6.0)  # type: ignore[arg-type]
        self.pose_head = nn.Sequential(conv_block(finest, finest, 3), to_joints)
        self.silhouette_head = nn.Sequential(conv_block(finest, 32, 3), nn.Conv2d(32, 1, 1))

    def forward(self, images: Tensor) -> Features:
        maps = self.pyramid(images)
        cues = Cues(self.pose_head(maps[-1]), self.silhouette_head(maps[-1]))
        return Features(maps, expected_position(cues.pose_logits), [cues])


def expected_position(logits: Tensor) -> Tensor:
    """Where each map of `(B, J, h, w)` has its mass after a softmax over the map: `(B, J, 2)`, float32.

    Normalised coordinates (x, y), -1 and 1 at the map's outer edges (soft-argmax; Sun et al., ECCV 2018).
    """
    y, x = (
        (2 * torch.arange(size, device=logits.device, dtype=torch.float32) + 1) / size - 1
        for size in logits.shape[-2:]
    )
    places = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))]).flatten(1)
    mass = logits.float().flatten(2).softmax(-1)
    # Autocast would round the factors of a matrix product, and so move a joint by a third of a pixel.
    return (mass[:, :, None] * places).sum(-1)


# The pixel-aligned feature mapping (section 3.2)


class FeatureMapping(nn.Module):
    """From image feature maps to `channels` features of each vertex.

    Forward: maps Q_32, Q_16, ... `(B, C_s, h_s, w_s)`, vertices `(B, N, 3)` in metres relative to the root
    joint, and camera `(B, 3)` [s, tx, ty], to `(B, N, channels)`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels


class PixelAligned(FeatureMapping):
    """G_s = f(Q_s, pi(M_s)), equation 2: bilinear samples of maps at the projected vertices.

    places: which of Q_32, Q_16, Q_8, Q_4 are sampled, 0 to 3.

    The camera pi is weak perspective, predicted by the network itself: x_n = s * (X + tx) in normalised
    coordinates (-1 and 1 are the image's outer edges, `align_corners=False`). The paper leaves the camera
    open. This one needs no intrinsics at inference, so any image can be reconstructed. The projections of the
    true vertices supervise it (`pahm.train.losses.projection_loss`). Vertices outside the image read the
    nearest border pixel, as in MobRecon, so that a bad first guess still gets a gradient.
    """

    def __init__(self, places: Sequence[int], channels: int) -> None:
        super().__init__(channels)
        self.places = tuple(places)

    def forward(self, maps: Sequence[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
        seen = [maps[place] for place in self.places]
        return vertex_sample(seen, vertices, camera, align_corners=False, padding_mode="border")


# The first mesh and the camera


class FirstMesh(nn.Sequential, ConstantBuffers):
    """The mesh of the first projection, and the weak-perspective camera.

    The paper does not say where the first projection takes place. Here a small perceptron reads the mean of
    Q_32 and the 2D pose. It regresses the camera and offsets of the 98 vertices of M4 from the template.

    template: `(98, 3)` metres, relative to the root joint.
    """

    template: Tensor

    def __init__(self, config: ModelConfig, template: NDArray[np.float64]) -> None:
        super().__init__(*perceptron(config, 3 + 3 * len(template)))
        self.crop = config.crop
        scaled = torch.as_tensor(template, dtype=torch.float32, device="cpu") / UNIT
        self.register_constant("template", scaled, cast=True)

    def mesh_and_camera(self, maps: Sequence[Tensor], joints_2d: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, 98, 3)` in units of 0.2 m relative to the root joint and `(B, 3)` [s, tx, ty], both at least
        float32.
        """
        found = self(global_feature(maps, joints_2d))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return self.template + found[:, 3:].unflatten(1, (-1, 3)), weak_perspective(found[:, :3], self.crop)


def global_feature(maps: Sequence[Tensor], joints_2d: Tensor) -> Tensor:
    """The mean of Q_32 and the 2D pose `(B, J, 2)`, concatenated: `(B, C_32 + 2 J)`."""
    mean = maps[0].mean(dim=(2, 3))
    return torch.cat([mean, joints_2d.flatten(1).to(mean.dtype)], dim=1)


def perceptron(config: ModelConfig, outputs: int) -> nn.Sequential:
    """From the global feature to `outputs` numbers, which are near 0 before training."""
    hidden = 256
    last = nn.Linear(hidden, outputs)
    nn.init.normal_(last.weight, std=1e-3)
    nn.init.zeros_(last.bias)
    inputs = config.feature_channels[0] + (2 * JOINTS if config.cues else 0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last)


def weak_perspective(found: Tensor, crop: float) -> Tensor:
    """The camera `(B, 3)` [s, tx, ty] of three predicted numbers; `crop` is `ModelConfig.crop`."""
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    log_scale, shift = found[:, :1].clamp(-3, 3), 0.1 * found[:, 1:]
    # Zeros show a hand of about 0.18 m at about 60 % of an image's side.
    return torch.cat([(6.0 / crop) * log_scale.exp(), shift], dim=1)


# The mesh decoder (section 3.3)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the vertices (equation 4), `(B, N, C)` to `(B, N, C)`.

    Raises ValueError where the channels cannot be split over the heads.
    """

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

    spirals: int64 `(N, L)`. Forward: `(B, N, C)` to `(B, N, C)`. Each branch starts with a normalisation.
    `heads=0` leaves the attention out.
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

    inputs: channels of the features that come from the level before.

    Forward: maps Q_32, Q_16, ..., the level's mesh so far `(B, N, 3)` in units of 0.2 m, camera `(B, 3)`, and
    features `(B, N, inputs)`, to `(mesh + offsets, features (B, N, channels))`.
    """

    def __init__(
        self, mapping: FeatureMapping, inputs: int, channels: int, spirals: Tensor, heads: int
    ) -> None:
        super().__init__()
        self.mapping = mapping
        self.merge = nn.Linear(mapping.channels + inputs + 3, channels)
        self.mesh_conv = MeshConv(channels, spirals, heads)
        self.norm = nn.LayerNorm(channels)
        self.offset = SpiralConv(channels, 3, spirals)
        nn.init.normal_(self.offset.layer.weight, std=1e-3)

    def forward(
        self, maps: Sequence[Tensor], mesh: Tensor, camera: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = [self.mapping(maps, mesh * UNIT, camera), features, mesh]
        # The mesh is float32 in a network of half precision, too.
        inputs = torch.cat([part.to(features.dtype) for part in parts], dim=-1)
        features = self.mesh_conv(F.gelu(self.merge(inputs)))
        return mesh + self.offset(self.norm(features)), features


class MeshDecoder(nn.Module):
    """Maps Q_32 ... Q_4 and the 2D pose to the meshes M4 (98 vertices) ... M1 (778) and the camera.

    Each level starts from the mesh and the features that the level before predicted, unpooled to its own
    vertices, and samples its own map there. A learned vector for each vertex of M4 tells the vertices apart.

    mappings: how M4, M3, M2, M1 see the maps; by default each samples its own at the projected vertices.

    Forward: the maps and the 2D joints `(B, 21, 2)` in normalised coordinates, to `(meshes, camera, [])`:
    `(B, N_s, 3)` in metres relative to the root joint, coarse to fine, and `(B, 3)` [s, tx, ty]. The empty
    list stands for the joints that only METRO's decoder predicts.
    """

    def __init__(
        self, config: ModelConfig, topology: HandTopology, mappings: Sequence[FeatureMapping] | None = None
    ) -> None:
        super().__init__()
        if mappings is None:
            mappings = [PixelAligned([i], count) for i, count in enumerate(config.feature_channels)]
        channels, heads = config.decoder_channels, config.attention_heads
        coarsest = len(topology.hierarchy.vertices) - 1
        template = topology.relative_vertices(coarsest, config.root_joint)
        self.lift = FirstMesh(config, template)
        self.embedding = nn.Parameter(0.1 * torch.randn(len(template), channels[0]))
        self.levels = nn.ModuleList()
        self.unpool = nn.ModuleList()
        for i, mapping in enumerate(mappings):
            spirals = level_spirals(topology, coarsest - i, config.spiral_length)
            self.levels.append(MeshLevel(mapping, channels[max(i - 1, 0)], channels[i], spirals, heads[i]))
            if i:
                self.unpool.append(MeshPool(topology.hierarchy.up[coarsest - i].astype(np.float32)))

    def coarse_to_fine(
        self, maps: Sequence[Tensor], joints_2d: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The meshes in units of 0.2 m, the features of M1's vertices `(B, 778, C)`, and the camera."""
        mesh, camera = self.lift.mesh_and_camera(maps, joints_2d)
        features = self.embedding.expand(mesh.shape[0], -1, -1)
        meshes = []
        for i, level in enumerate(self.levels):
            if i:
                mesh, features = self.unpool[i - 1](mesh), self.unpool[i - 1](features)
            mesh, features = level(maps, mesh, camera, features)
            meshes.append(mesh)
        return meshes, features, camera

    def forward(self, maps: Sequence[Tensor], joints_2d: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        meshes, _, camera = self.coarse_to_fine(maps, joints_2d)
        return [mesh * UNIT for mesh in meshes], camera, []


def level_spirals(topology: HandTopology, level: int, length: int) -> Tensor:
    """The spirals of a level, 0 for M1: int64 `(N, length)`."""
    hierarchy = topology.hierarchy
    table = spiral_indices(hierarchy.faces[level], length, vertices=hierarchy.vertices[level])
    return torch.from_numpy(table)


# The whole network (figure 1)


class HandNet(ConstantBuffers):
    """Pixel-aligned, non-parametric hand mesh reconstruction (section 3, figure 1).

    topology: which hand: the shipped one by default, or MANO's (`HandTopology.from_hand`).
    extractor, decoder: parts of a baseline, called as `Extractor` and `MeshDecoder` are. Where `config` asks
    for a baseline, `pahm.model.build_network` gives them.

    Forward: `images (B, 3, S, S)`, RGB normalised with ImageNet's mean and deviation, to `Prediction`.

    Raises ValueError for images of another shape, and for a baseline's `config` without its parts.
    """

    joint_regressor: Tensor
    mean_hand: Tensor
    """`(778, 3)` metres: the mean of the training hands, to which scores are compared."""

    def __init__(
        self,
        config: ModelConfig,
        topology: HandTopology | None = None,
        extractor: Hourglass | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if extractor is None or decoder is None:
            _check_is_papers(config)
        self.config = config
        self.topology = topology or HandTopology.load()
        regressor = torch.as_tensor(self.topology.joint_regressor, dtype=torch.float32, device="cpu")
        self.register_constant("joint_regressor", regressor, cast=True)
        mean_hand = self.topology.relative_vertices(0, config.root_joint)
        self.register_buffer("mean_hand", torch.as_tensor(mean_hand, dtype=torch.float32))
        if extractor is None:
            backbone = create_backbone(config.backbone, config.pretrained, config.backbone_weights)
            extractor = Extractor(backbone, map_channels(backbone), config.feature_channels)
        self.extractor = extractor
        self.decoder = MeshDecoder(config, self.topology) if decoder is None else decoder

    @property
    def faces(self) -> NDArray[np.int64]:
        """`(F, 3)` int64 numpy array, the triangles of M1."""
        return self.topology.hierarchy.faces[0]

    def forward(self, images: Tensor) -> Prediction:
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected (B, 3, {size}, {size}), got {tuple(images.shape)}")
        maps, joints_2d, cues = self.extractor(images)
        meshes, camera, joints = self.decoder(maps, joints_2d)
        return Prediction(meshes, camera, cues, joints)

    def joints(self, vertices: Tensor) -> Tensor:
        """The 21 joints `(B, 21, 3)` of meshes `(B, 778, 3)`, in the same unit and frame."""
        return torch.matmul(self.joint_regressor.to(vertices.dtype), vertices)


def _check_is_papers(config: ModelConfig) -> None:
    papers = ModelConfig()
    for name in ("stacks", "cues", "mapping", "skips", "refinements", "decoder"):
        value, expected = getattr(config, name), getattr(papers, name)
        if value != expected:
            raise ValueError(
                f"model.{name}: HandNet by itself is the paper's network, with {expected!r}; "
                f"pahm.model.build_network builds one with {value!r}"
            )
