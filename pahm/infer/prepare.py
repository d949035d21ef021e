"""Prepares a network once for many pictures on a CPU."""

from __future__ import annotations

import torch

from pahm.infer.fold import folded
from pahm.model.network import HandNet


def prepare(network: HandNet) -> HandNet:
    """A copy of a float32 network on the CPU that gives the same predictions in less time.

    `network` itself stays as it is. Results agree to a micrometre.
    """
    return folded(network).to(memory_format=torch.channels_last)
