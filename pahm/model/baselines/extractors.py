"""Other extractors than one hourglass with heads: two stacked ones (Table 4), and one without heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pahm.model.network import JOINTS, Extractor, Features, Hourglass, conv_block


class HeadlessExtractor(Hourglass):
    """An hourglass that predicts neither the 2D pose nor the silhouette.

    Forward: images `(B, 3, S, S)` to `Features` without 2D joints and cues.
    """

    def forward(self, images: Tensor) -> Features:
        return Features(self.pyramid(images), images.new_zeros(images.shape[0], 0, 2), [])


class StackedExtractor(Extractor):
    """Two hourglasses, each with 2D heads; the second one reads the first one's finest map and 2D cues.

    Forward: images `(B, 3, S, S)` to the second one's `Features`, with the cues of both.
    """

    def __init__(self, backbone: nn.Module, encoder_channels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__(backbone, encoder_channels, channels)
        self.second = Extractor(CueEncoder(channels), channels[::-1], channels)

    def forward(self, images: Tensor) -> Features:
        maps, _, cues = super().forward(images)
        (first,) = cues
        seen = [maps[-1], first.pose_logits.sigmoid(), first.silhouette_logits.sigmoid()]
        better: Features = self.second(torch.cat([x.to(maps[-1].dtype) for x in seen], dim=1))
        return better._replace(cues=[first, *better.cues])


class CueEncoder(nn.Module):
    """The way down of the second hourglass: residual blocks at strides 4, 8, 16, 32.

    Its input is CMR's aggregation of 2D cues (Chen et al., CVPR 2021, section 3.2): the first hourglass's
    finest map, pose heatmaps and silhouette, concatenated and fused by a 1 x 1 convolution. The paper says
    only that the extractor is re-designed as CMR. ResNet's basic blocks and the widths of the maps Q_s are
    our choice.

    channels: of Q_32, Q_16, Q_8, Q_4. Forward: `(B, C_4 + 21 + 1, h, w)` to four maps, fine to coarse.
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
