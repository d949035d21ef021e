"""The 2D feature extractor: an hourglass over a timm backbone (section 3.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pahm.config import ModelConfig

STRIDES = (32, 16, 8, 4)
JOINTS = 21


def create_backbone(name: str, pretrained: bool = False, weights: str | None = None) -> nn.Module:
    """A timm feature extractor returning maps at strides 4, 8, 16 and 32.

    `weights` is a local file of the timm model's weights and wins over `pretrained`, which downloads them.

    Raises:
        ValueError: timm has no such model, or it has no features at these strides.
        FileNotFoundError: `weights` does not exist.
        ConnectionError: `pretrained` weights could not be had; the sentence says what to do without a
        network.
    """
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm {timm.__version__} has no model named {name!r}")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"backbone weights: no file at {weights}")
    try:
        reductions = feature_info(timm.create_model(name, features_only=True)).reduction()
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"backbone: {name!r} gives no feature maps ({error})") from error
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ValueError(f"backbone: {name!r} has features at strides {reductions}, but not at {missing}")
    # The last map of a stride is the deepest one.
    indices = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in reversed(STRIDES))
    overlay = {"file": weights} if weights else None
    try:
        return timm.create_model(
            name,
            features_only=True,
            out_indices=indices,
            pretrained=pretrained or weights is not None,
            pretrained_cfg_overlay=overlay,
        )
    except Exception as error:
        if weights is not None:
            raise ValueError(f"backbone weights: {weights} does not fit {name!r} ({error})") from error
        if pretrained:
            raise ConnectionError(
                f"backbone: the pretrained weights of {name!r} could not be downloaded "
                f"({type(error).__name__}); give a local file as model.backbone_weights, or set "
                "model.pretrained to false"
            ) from error
        raise


def feature_info(backbone: nn.Module) -> Any:
    """timm's description of a feature extractor's maps: `reduction()` and `channels()` of each."""
    return backbone.feature_info


def conv_block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; the size of the map is kept."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def expected_position(logits: Tensor) -> Tensor:
    """Where each map of `(B, J, h, w)` has its mass after a softmax over the map: `(B, J, 2)`, float32.

    Normalised coordinates (x, y), -1 and 1 at the map's outer edges (soft-argmax; Sun et al., ECCV 2018).
    """
    height, width = logits.shape[-2:]
    mass = logits.float().flatten(2).softmax(-1).unflatten(-1, (height, width))
    x = (2 * torch.arange(width, device=logits.device, dtype=torch.float32) + 1) / width - 1
    y = (2 * torch.arange(height, device=logits.device, dtype=torch.float32) + 1) / height - 1
    return torch.stack([mass.sum(2) @ x, mass.sum(3) @ y], dim=-1)


class Fusion(nn.Module):
    """Q_s = Conv(F_s (+) H_s), equation 1: concatenation along channels, then a 1 x 1 convolution."""

    def __init__(self, encoder_channels: int, upsampled_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = conv_block(encoder_channels + upsampled_channels, channels, 1)

    def forward(self, encoder: Tensor, upsampled: Tensor) -> Tensor:
        return self.conv(torch.cat([encoder, upsampled], dim=1))


class Cues(NamedTuple):
    """The 2D predictions of the auxiliary supervision (section 3.4)."""

    pose_logits: Tensor
    """`(B, 21, S/4, S/4)`; their sigmoid is the heatmap of each joint."""
    silhouette_logits: Tensor
    """`(B, 1, S/4, S/4)`; their sigmoid is the probability of the hand."""


class Hourglass(nn.Module):
    """An encoder's features to the fused maps Q_s at strides 32, 16, 8, 4, and to the 2D pose and silhouette.

    The encoder's features F_s are kept. On the way up, H_32 is a convolution of F_32 and
    H_s at the finer strides is the upsampled Q_{2s} after a 3 x 3 convolution, so that the fusion of
    equation 1 is the hourglass's skip connection at the same time. The two heads of the 2D supervision
    (section 3.4) read Q_4, the finest map.

    `backbone` gives four maps at strides 4, 8, 16, 32 (of the image) with `encoder_channels`. Only the first
    `depth` maps of Q_32, Q_16, Q_8, Q_4 are made; heads need all four.

    Forward: the backbone's input to `(maps, cues)`: maps `(B, C_s, S/s, S/s)`; cues None without heads.
    """

    def __init__(
        self,
        backbone: nn.Module,
        encoder_channels: Sequence[int],
        channels: Sequence[int],
        depth: int = 4,
        heads: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        encoder = list(encoder_channels)[::-1]
        self.bottom = conv_block(encoder[0], channels[0], 1)
        self.up = nn.ModuleList(conv_block(channels[i], channels[i + 1], 3) for i in range(depth - 1))
        self.fuse = nn.ModuleList(Fusion(encoder[i], channels[i], channels[i]) for i in range(depth))
        self.pose_head: nn.Module | None = None
        self.silhouette_head: nn.Module | None = None
        if heads:
            to_joints = nn.Conv2d(channels[3], JOINTS, 1)
            # A pixel belongs to a joint's peak about once in a thousand: start the logits there.
            nn.init.constant_(to_joints.bias, -6.0)  # type: ignore[arg-type]
            self.pose_head = nn.Sequential(conv_block(channels[3], channels[3], 3), to_joints)
            self.silhouette_head = nn.Sequential(conv_block(channels[3], 32, 3), nn.Conv2d(32, 1, 1))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Cues | None]:
        features = self.backbone(x)[::-1]
        maps = [self.fuse[0](features[0], self.bottom(features[0]))]
        for feature, up, fuse in zip(features[1:], self.up, self.fuse[1:], strict=False):
            upsampled = F.interpolate(
                up(maps[-1]), size=feature.shape[-2:], mode="bilinear", align_corners=False
            )
            maps.append(fuse(feature, upsampled))
        if self.pose_head is None or self.silhouette_head is None:
            return maps, None
        return maps, Cues(self.pose_head(maps[-1]), self.silhouette_head(maps[-1]))


class CueEncoder(nn.Module):
    """The way down of the second hourglass: residual blocks at strides 4, 8, 16, 32.

    Its input is CMR's aggregation of 2D cues (Chen et al., CVPR 2021, section 3.2): the first hourglass's
    finest map, pose heatmaps and silhouette, concatenated and fused by a 1 x 1 convolution. The paper says
    only that the extractor is re-designed as CMR; ResNet's basic blocks and the widths of the maps Q_s are
    our choice.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        widths = list(channels)[::-1]
        self.fuse = conv_block(widths[0] + JOINTS + 1, widths[0], 1)
        blocks = [_residual(widths[0], widths[0], 1)]
        blocks += [_residual(a, b, 2) for a, b in pairwise(widths)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.blocks[0](self.fuse(x))]
        for block in self.blocks[1:]:
            features.append(block(features[-1]))
        return features


def _residual(inputs: int, outputs: int, stride: int) -> nn.Module:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


class Extractor(Hourglass):
    """The 2D feature extractor (section 3.1): an hourglass over the backbone, or two stacked ones.

    The second one reads the first one's finest map and 2D cues (see `CueEncoder`), and each has 2D heads,
    which are all supervised.

    Forward: images `(B, 3, S, S)`, S a multiple of 32, to `(maps, cues)`: the last hourglass's maps, and the
    2D cues of each hourglass, first to last; no cues where `config.cues` is off.

    Raises:
        ValueError: two hourglasses without cues.
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.stacks == 2 and not config.cues:
            raise ValueError("model.stacks: two hourglasses need model.cues, which join them, got cues false")
        backbone = create_backbone(config.backbone, config.pretrained, config.backbone_weights)
        info = feature_info(backbone)
        encoder: dict[int, int] = dict(zip(info.reduction(), info.channels(), strict=True))
        channels = config.feature_channels
        depth = maps_needed(config)
        super().__init__(backbone, [encoder[s] for s in STRIDES[::-1]], channels, depth, config.cues)
        self.second: Hourglass | None = None
        if config.stacks == 2:
            self.second = Hourglass(CueEncoder(channels), channels[::-1], channels)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Cues]]:  # type: ignore[override]
        maps, cues = super().forward(images)
        if cues is None or self.second is None:
            return maps, [] if cues is None else [cues]
        seen = [maps[-1], cues.pose_logits.sigmoid(), cues.silhouette_logits.sigmoid()]
        maps, better = self.second(torch.cat([x.to(maps[-1].dtype) for x in seen], dim=1))
        assert better is not None
        return maps, [cues, better]


def maps_needed(config: ModelConfig) -> int:
    """How many of Q_32, Q_16, Q_8, Q_4 are made: all for the 2D cues, else those that the decoder reads."""
    if config.cues or config.refinements:
        return len(STRIDES)
    if config.mapping != "pixel_aligned":
        return 1
    if config.decoder == "metro":
        return len(config.transformer_channels)
    return max((i + 1 for i, skip in enumerate(config.skips) if skip), default=1)
