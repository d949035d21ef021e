"""Writes a table of the paper next to our own runs: Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from pahm.ablation.tables import RESULT, SCORES, TABLES, Row, Table
from pahm.config import from_dict
from pahm.text_files import read_json, shown
from pahm.whole_file import whole_file

Results = dict[str, list[dict[str, Any]]]


def write_table(out: Path, name: str, seeds: Sequence[int]) -> Path:
    """Write `<name>.md`, `.csv` and `.png` into `out` from its results. Returns the Markdown file's path.

    Rows without a result have a dash.
    """
    table = TABLES[name]
    results = load_results(out, table, seeds)
    path = out / f"{name}.md"
    with whole_file(path, shared=True) as written:
        written.write_text(markdown(table, name, results), encoding="utf-8")
    with whole_file(out / f"{name}.csv", shared=True) as written:
        written.write_text(as_csv(table, results), encoding="utf-8")
    with whole_file(out / f"{name}.png", shared=True) as written:
        _plot(table, results).savefig(written, dpi=120, format="png")
    return path


def load_results(out: Path, table: Table, seeds: Sequence[int]) -> Results:
    """The results of each of a table's networks, as a list over the available seeds."""
    results: Results = {}
    for row in table.rows:
        if row.variant is None:
            continue
        paths = [out / "results" / RESULT.format(variant=row.variant, seed=seed) for seed in seeds]
        results[row.variant] = [_record(path, table.scores) for path in paths if path.exists()]
    return results


def _record(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read the record that `pahm ablate` wrote for a run with these scores; ValueError for any other file."""
    try:
        record: dict[str, Any] = read_json(path)
        from_dict(record["config"])
        scores = {name: record["scores"][name] for name in names}
        counts = {name: record[name] for name in ("threads", "training_images")}
        if record["seconds"] is not None:
            counts["seconds"] = record["seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of pahm ablate ({error})") from error
    for name, value in (scores | counts).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
            raise ValueError(
                f"{path} is not a result of pahm ablate: {name} is {shown(value)}, expected a number"
            )
    return record


def scores_of(results: Results, row: Row, score: str) -> list[float]:
    """A row's values of a score, one per seed; empty for rows without a run."""
    return [record["scores"][score] for record in results.get(row.variant or "", [])]


def pairs_that_hold(table: Table, results: Results, score: str = "pa_mpjpe") -> list[tuple[Row, Row, bool]]:
    """For each pair of consecutive rows with results, whether their means have the paper's order."""
    pairs = []
    for a, b in pairwise(row for row in table.rows if row.variant is not None):
        ours = scores_of(results, a, score), scores_of(results, b, score)
        if ours[0] and ours[1]:
            place = table.scores.index(score)
            holds = (a.paper[place] > b.paper[place]) == (mean(ours[0]) > mean(ours[1]))
            pairs.append((a, b, holds))
    return pairs


def markdown(table: Table, name: str, results: Results) -> str:
    """The table, its budget, and which of the paper's orderings hold."""
    titles = [*table.columns]
    for score in table.scores:
        titles += [f"{SCORES[score]}, paper", "ours"]
    titles += ["minutes"]
    lines = [f"# {name.replace('table', 'Table ')}: {table.title}", ""]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in table.rows:
        cells = list(row.cells)
        for score, paper in zip(table.scores, row.paper, strict=True):
            places = 2 if score.startswith("pa_") else 3
            cells += [f"{paper:g}", _spread(scores_of(results, row, score), places)]
        seconds = [r["seconds"] for r in results.get(row.variant or "", []) if r["seconds"] is not None]
        cells += [_spread([value / 60 for value in seconds], 1)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Ours: {_budget(results)}. The paper's: FreiHAND."]
    lines += _mean_hand(table, results)
    for score in table.scores[:2]:
        pairs = pairs_that_hold(table, results, score)
        if pairs:
            held = sum(holds for *_, holds in pairs)
            lines += [
                "",
                f"Order of rows by {SCORES[score].split()[0]}: {held} of {len(pairs)} pairs as in the paper.",
            ]
            lines += [
                f"- {' '.join(a.cells)} / {' '.join(b.cells)}: {'holds' if holds else 'does not hold'}, "
                f"{_difference(scores_of(results, a, score), scores_of(results, b, score))}"
                for a, b, holds in pairs
            ]
    return "\n".join(lines) + "\n"


def _budget(results: Results) -> str:
    """The settings that the runs share, from their records."""
    records = [record for found in results.values() for record in found]
    if not records:
        return "no runs yet"
    budgets = {
        f"{r['training_images']:,} images of {r['config']['model']['image_size']} pixels a side, "
        f"epochs: {r['config']['train']['epochs']}, batch size: {r['config']['train']['batch_size']}"
        for r in records
    }
    seeds = sorted({r["config"]["train"]["seed"] for r in records})
    listed = f"mean and standard deviation of seeds {', '.join(map(str, seeds))}"
    return f"{'; '.join(sorted(budgets))}; {listed if len(seeds) > 1 else f'seed {seeds[0]}'}"


def _mean_hand(table: Table, results: Results) -> list[str]:
    """The scores of predicting the mean training hand for every image. A worse row has learnt nothing."""
    for record in (record for found in results.values() for record in found):
        scores = [(SCORES[name], record["scores"].get(f"mean_hand_{name}")) for name in table.scores[:2]]
        if all(value is not None for _, value in scores):
            text = ", ".join(f"{title} {value:.2f}" for title, value in scores)
            return ["", f"The mean hand, predicted for every image: {text}."]
    return []


def _difference(one: Sequence[float], two: Sequence[float]) -> str:
    """The difference between two rows' means, and how much of it may be chance."""
    text = f"{abs(mean(one) - mean(two)):.2f} apart"
    if min(len(one), len(two)) < 2:
        return text
    deviation = math.sqrt((stdev(one) ** 2 + stdev(two) ** 2) / 2)
    return f"{text}, {deviation:.2f} between seeds"


def _spread(values: Sequence[float], places: int) -> str:
    if not values:
        return "-"
    text = f"{mean(values):.{places}f}"
    return f"{text} ± {stdev(values):.{places}f}" if len(values) > 1 else text


def as_csv(table: Table, results: Results) -> str:
    """One line per row and seed, and one per row that the paper quotes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = list(table.scores)
    writer.writerow(
        [
            *table.columns,
            "variant",
            "seed",
            *names,
            *(f"paper_{name}" for name in names),
            "seconds",
            "threads",
        ]
    )
    for row in table.rows:
        records: list[dict[str, Any] | None] = [*results.get(row.variant or "", [])] or [None]
        for record in records:
            ours = [f"{record['scores'][name]:.6g}" if record else "" for name in names]
            rest = [record["seconds"], record["threads"]] if record else ["", ""]
            seed = record["config"]["train"]["seed"] if record else ""
            writer.writerow([*row.cells, row.variant or "", seed, *ours, *row.paper, *rest])
    return stream.getvalue()


def _plot(table: Table, results: Results) -> Figure:
    """Plot the paper's scores and ours side by side. The data differ, so each has its own axis."""
    rows = [row for row in table.rows if row.variant is not None]
    figure = Figure(figsize=(9, 1.3 + 0.4 * len(rows)), layout="constrained")
    paper, here = figure.subplots(1, 2, sharey=True)
    score, title = table.scores[0], SCORES[table.scores[0]]
    places = range(len(rows))
    paper.scatter([row.paper[0] for row in rows], places, marker="D", color="#b05a2a", zorder=3)
    paper.set_title("paper, FreiHAND", fontsize="medium")
    for place, row in zip(places, rows, strict=True):
        ours = scores_of(results, row, score)
        if ours:
            here.plot([min(ours), max(ours)], [place, place], color="#2a6ab0", zorder=2)
            here.scatter(ours, [place] * len(ours), color="#2a6ab0", s=18, zorder=3)
            here.scatter([mean(ours)], [place], marker="|", color="#2a6ab0", s=150, zorder=3)
    records = (record for found in results.values() for record in found)
    constant = next((c for r in records if (c := r["scores"].get(f"mean_hand_{score}")) is not None), None)
    if constant is not None:
        here.axvline(constant, color="#777777", linestyle=":", label="the mean hand for every image")
        figure.legend(loc="outside lower right", fontsize="small", frameon=False)
    here.set_title("ours, each seed and mean", fontsize="medium")
    paper.set_yticks(places, [_label(table, row) for row in rows])
    paper.set_ylim(len(rows) - 0.5, -0.5)
    for axes in (paper, here):
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
    return figure


def _label(table: Table, row: Row) -> str:
    """A short label for a row. A cell that only says yes or no gets its column's title."""
    cells = zip(table.columns, row.cells, strict=True)
    return ", ".join(f"{column.lower()}: {cell}" if cell in ("yes", "no") else cell for column, cell in cells)
