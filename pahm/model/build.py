"""From a configuration to its network: the paper's, or one that the paper compares with."""

from __future__ import annotations

from torch import nn

from pahm.config import Config, ModelConfig
from pahm.hand.topology import HandTopology
from pahm.model.backbone import create_backbone, map_channels
from pahm.model.baselines.extractors import HeadlessExtractor, StackedExtractor
from pahm.model.baselines.mappings import GlobalMLP, GlobalRepeat, NoSkip
from pahm.model.baselines.metro import AlignedMetroDecoder, MetroDecoder
from pahm.model.baselines.refined import RefinedDecoder
from pahm.model.network import (
    Extractor,
    FeatureMapping,
    HandNet,
    Hourglass,
    MeshDecoder,
    PixelAligned,
)


def build_network(
    config: Config, topology: HandTopology | None = None, load_backbone: bool = True
) -> HandNet:
    """The network of a configuration, for the shipped hand or that of `topology`.

    `load_backbone=False` skips pretrained weights that will be overwritten.

    Raises:
        ValueError: values of `config.model` that exclude each other, or that no backbone fits.
        FileNotFoundError, ConnectionError: as `pahm.model.backbone.create_backbone`.
    """
    if not load_backbone:
        config = config.override({"model.pretrained": False, "model.backbone_weights": None})
    topology = topology or HandTopology.load()
    _check(config.model)
    return HandNet(config.model, topology, _extractor(config.model), _decoder(config.model, topology))


def _check(model: ModelConfig) -> None:
    if model.stacks == 2 and not model.cues:
        raise ValueError("model.stacks: two hourglasses need model.cues, which join them, got cues false")
    if model.decoder == "metro":
        if model.mapping == "mlp":
            raise ValueError(
                "model.mapping: METRO's queries take 'repeat' (as published) or 'pixel_aligned', got 'mlp'"
            )
        if model.refinements:
            raise ValueError(f"model.decoder: METRO has no model.refinements, got {model.refinements}")
        if not all(model.skips):
            raise ValueError(
                f"model.skips: METRO's blocks have all of them or, with 'repeat', none, got {model.skips}"
            )
    elif model.refinements and model.mapping != "pixel_aligned":
        raise ValueError(
            f"model.refinements: {model.refinements} need model.mapping pixel_aligned, got {model.mapping!r}"
        )


def _extractor(model: ModelConfig) -> Hourglass:
    backbone = create_backbone(model.backbone, model.pretrained, model.backbone_weights)
    encoder, channels = map_channels(backbone), model.feature_channels
    if not model.cues:
        return HeadlessExtractor(backbone, encoder, channels[: _maps_read(model)])
    if model.stacks == 2:
        return StackedExtractor(backbone, encoder, channels)
    return Extractor(backbone, encoder, channels)


def _maps_read(model: ModelConfig) -> int:
    """How many of Q_32, Q_16, Q_8, Q_4 the decoder reads."""
    if model.refinements:
        return len(model.feature_channels)
    if model.mapping != "pixel_aligned":
        return 1
    if model.decoder == "metro":
        return len(model.transformer_channels)
    return max((i + 1 for i, skip in enumerate(model.skips) if skip), default=1)


def _decoder(model: ModelConfig, topology: HandTopology) -> nn.Module:
    if model.decoder == "metro":
        metro = AlignedMetroDecoder if model.mapping == "pixel_aligned" else MetroDecoder
        return metro(model, topology)
    mappings = [_mapping(model, topology, place) for place in range(len(model.skips))]
    if model.refinements:
        return RefinedDecoder(model, topology, mappings)
    return MeshDecoder(model, topology, mappings)


def _mapping(model: ModelConfig, topology: HandTopology, place: int) -> FeatureMapping:
    """Of the level at `place`, 0 for M4."""
    own, coarsest = model.feature_channels[place], model.feature_channels[0]
    if not model.skips[place]:
        return NoSkip()
    if model.mapping == "pixel_aligned":
        return PixelAligned([place], own)
    if model.mapping == "mlp":
        return GlobalMLP(coarsest, topology.hierarchy.sizes[::-1][place], own)
    return GlobalRepeat(coarsest)
