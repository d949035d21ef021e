"""The networks of the paper's tables, small enough for a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pahm.ablation.tables import configuration
from pahm.config import Config, preset
from pahm.hand.topology import HandTopology
from pahm.model import HandNet, build_network
from pahm.train.losses import Targets

SIZES = (98, 195, 389, 778)
BASE = preset("tiny").override(
    {
        "model.pretrained": False,
        "model.backbone": "test_resnet",
        "model.image_size": 64,
        "model.transformer_channels": [32, 16, 8],
        "model.transformer_layers": 1,
    }
)


def variant_config(variant: str | None = None, **changes: Any) -> Config:
    """A variant of the tables by name, or the base, with changes of `model`."""
    config = configuration(BASE, variant) if variant else BASE
    return config.override({f"model.{name}": value for name, value in changes.items()})


def build(topology: HandTopology, variant: str | None = None, **changes: Any) -> HandNet:
    """The network of `variant_config`; its weights are moved off their small first values."""
    torch.manual_seed(0)
    network = build_network(variant_config(variant, **changes), topology)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def random_targets(count: int = 2, seed: int = 2) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return Targets(
        [0.1 * torch.randn(count, n, 3, generator=generator) for n in SIZES],
        [torch.rand(count, n, 2, generator=generator) for n in SIZES],
        0.1 * torch.randn(count, 21, 3, generator=generator),
        torch.rand(count, 21, 2, generator=generator),
        torch.rand(count, 1, 64, 64, generator=generator).round(),
        torch.ones(count, dtype=torch.bool),
    )
