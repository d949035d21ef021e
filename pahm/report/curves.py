"""Reads the curves of a training run from TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_POINTS = 1000  # maximum points per curve on the page


class Curve(NamedTuple):
    """A logged scalar: `steps` (n,) int64, ascending, and `values` (n,) float64."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


def read_curves(run: Path) -> dict[str, Curve]:
    """Read every scalar, by tag, from the event files in a run folder's `tensorboard`; empty without files.

    A resumed run may log a step twice; the later value counts.
    """
    if not any((run / "tensorboard").glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False
    ).Reload()
    return {tag: _in_order(events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def _in_order(events: list[Any]) -> Curve:
    kept: list[Any] = []
    for event in events:
        while kept and kept[-1].step >= event.step:
            kept.pop()
        kept.append(event)
    steps, values = [event.step for event in kept], [event.value for event in kept]
    return Curve(np.array(steps, np.int64), np.array(values, np.float64))


def charts(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """The page's charts of a run, as JSON values: losses and learning rate per step, scores per epoch.

    A chart has `id`, `title`, `x`, `y` (titles of the axes), `log` (whether y is logarithmic) and `traces`,
    each with `name`, `x` and `y`. Charts without a curve are left out.
    """
    start = "train/"
    losses = {tag.removeprefix(start): curve for tag, curve in curves.items() if tag.startswith(start)}
    if "loss" in curves:
        losses = {"total, weighted": curves["loss"], **losses}
    rates = {tag: curve for tag, curve in curves.items() if tag.startswith("lr-")}
    names = {"eval/pa_mpjpe": "PA-MPJPE", "eval/pa_mpvpe": "PA-MPVPE"}
    scores = {name: _by_epoch(curves[tag], curves) for tag, name in names.items() if tag in curves}
    if len({curve.values.tobytes() for curve in rates.values()}) == 1:
        # Parameter groups with the same rate need only one line.
        rates = {"learning rate": next(iter(rates.values()))}
    found = [
        _chart("losses", "Parts of the loss", "step", "loss", losses, log=True),
        _chart("evaluation", "Error on the evaluation images", "epoch", "mm, after alignment", scores),
        _chart("rate", "Learning rate", "step", "", rates),
    ]
    return [chart for chart in found if chart["traces"]]


def _by_epoch(curve: Curve, curves: dict[str, Curve]) -> Curve:
    """Replace the curve's steps by the number of finished epochs, which Lightning logs as another curve."""
    if "epoch" not in curves:
        return Curve(np.arange(1, len(curve.steps) + 1), curve.values)
    epochs = curves["epoch"]
    at = np.searchsorted(epochs.steps, curve.steps, side="right") - 1
    return Curve(epochs.values[at.clip(0)].astype(np.int64) + 1, curve.values)


def _chart(
    name: str, title: str, x: str, y: str, curves: dict[str, Curve], *, log: bool = False
) -> dict[str, Any]:
    traces = []
    for label, curve in curves.items():
        finite = np.flatnonzero(np.isfinite(curve.values) & ((curve.values > 0) | (not log)))
        if not finite.size:
            continue
        kept = finite[
            np.unique(np.linspace(0, finite.size - 1, min(finite.size, _POINTS)).round().astype(int))
        ]
        values = [float(f"{value:.5g}") for value in curve.values[kept]]
        traces.append({"name": label, "x": curve.steps[kept].tolist(), "y": values})
    return {"id": name, "title": title, "x": x, "y": y, "log": log, "traces": traces}
