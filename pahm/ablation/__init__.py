"""The paper's tables as runs: their rows, running them, and writing them beside the paper's numbers."""

from pahm.ablation.run import SCALES, ablate
from pahm.ablation.tables import TABLES

__all__ = ["SCALES", "TABLES", "ablate"]
