"""Reproduces the paper's tables: their rows, running them, and writing them next to the paper's numbers."""

from pahm.ablation.run import SCALES, ablate
from pahm.ablation.tables import TABLES

__all__ = ["SCALES", "TABLES", "ablate"]
