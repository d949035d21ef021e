"""The image encoder of the hourglass: a timm model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

STRIDES = (4, 8, 16, 32)
"""Of the maps that a backbone gives, in pixels of the image."""


def create_backbone(name: str, pretrained: bool = False, weights: str | None = None) -> nn.Module:
    """A timm feature extractor that returns maps at `STRIDES`.

    `weights` is a local file of the timm model's weights. It wins over `pretrained`, which downloads them.

    Raises:
        ValueError: timm has no such model, it has no features at these strides, or `weights` does not fit.
        FileNotFoundError: `weights` does not exist.
        ConnectionError: the `pretrained` weights could not be downloaded; the sentence says what to do
            without a network.
    """
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm {timm.__version__} has no model named {name!r}")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"backbone weights: no file at {weights}")
    try:
        reductions = _info(timm.create_model(name, features_only=True)).reduction()
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"backbone: {name!r} gives no feature maps ({error})") from error
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ValueError(f"backbone: {name!r} has features at strides {reductions}, but not at {missing}")
    # The last map of a stride is the deepest one.
    indices = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES)
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


def map_channels(backbone: nn.Module) -> list[int]:
    """The channels of the maps that a backbone of `create_backbone` gives, in the order of `STRIDES`."""
    channels: list[int] = _info(backbone).channels()
    return channels


def _info(backbone: nn.Module) -> Any:
    """timm's description of a feature extractor's maps."""
    return backbone.feature_info
