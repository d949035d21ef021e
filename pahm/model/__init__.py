"""The paper's network, the baselines of its tables, and their checkpoints."""

from pahm.model.build import build_network
from pahm.model.checkpoint import load_checkpoint, read_metadata, save_checkpoint, shipped_checkpoint
from pahm.model.network import HandNet, Prediction

__all__ = [
    "HandNet",
    "Prediction",
    "build_network",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "shipped_checkpoint",
]
