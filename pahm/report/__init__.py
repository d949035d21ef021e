"""Writes the report page of a training run: curves, scores, hands and failures in one HTML file."""

from pahm.report.page import make_report as make_report

__all__ = ["make_report"]
