"""The paper's network: extractor, feature mapping, mesh decoder."""

from pahm.model.checkpoint import load_checkpoint, read_metadata, save_checkpoint, shipped_checkpoint
from pahm.model.network import HandNet, Prediction

__all__ = [
    "HandNet",
    "Prediction",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "shipped_checkpoint",
]
