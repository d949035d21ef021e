"""Reproduces the paper's tables: defines their rows, runs them, and compares them with the paper's numbers."""

from pahm.ablation.run import SCALES, ablate
from pahm.ablation.tables import TABLES

__all__ = ["SCALES", "TABLES", "ablate"]
