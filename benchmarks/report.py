"""A Markdown table and a roofline plot of a benchmark run with `--benchmark-json FILE`.

python benchmarks/report.py FILE [ROOFLINE.png]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _fastest_other(row: Row) -> str:
    others = list(row["seconds"])[1:]
    return min(others, key=lambda name: row["seconds"][name])


def ratio(row: Row) -> float:
    """How many times faster ours is than the fastest of the others."""
    return row["seconds"][_fastest_other(row)] / next(iter(row["seconds"].values()))


def efficiency(row: Row) -> float | None:
    """The fraction of the machine's ceiling that ours reaches; None if the row has no ceiling."""
    ours = next(iter(row["seconds"].values()))
    return row["least_seconds"] / ours if "least_seconds" in row else None


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown: a row for each case and a mean for each group."""
    lines = [
        "| case | ours ms | fastest other ms | which | ratio | of ceiling | result MB | ours MB | other MB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        other, ours = _fastest_other(row), next(iter(row["seconds"]))
        times = " | ".join(f"{row['seconds'][name] * 1e3:.3g}" for name in (ours, other))
        held = (row["result_bytes"], *(row["peak_bytes"][name] for name in (ours, other)))
        memory = " | ".join(map(_megabytes, held))
        part = _percent(efficiency(row))
        lines.append(f"| {row['case']} | {times} | {other} | {ratio(row):.1f}x | {part} | {memory} |")
        groups.setdefault(row["group"], []).append(row)
    for name, group in groups.items():
        if len(group) > 1:
            parts = [part for part in map(efficiency, group) if part is not None]
            part = _percent(geometric_mean(parts) if parts else None)
            mean = geometric_mean(map(ratio, group))
            lines.append(f"| **{name}: mean of {len(group)}** | | | | {mean:.1f}x | {part} | | | |")
    return lines


def engines_table(rows: list[Row]) -> list[str]:
    """Lines of Markdown for rows with a spread: milliseconds of each, and how much faster ours is."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = [
        f"| case | {' | '.join(names)} | fastest other / ours |",
        "|---" + "|---:" * (len(names) + 1) + "|",
    ]
    for row in rows:
        cells = []
        for name in names:
            if name not in row["seconds"]:
                cells.append("")
                continue
            low, high = (f"{1e3 * seconds:.3g}" for seconds in row["spread"][name])
            cells.append(f"{1e3 * row['seconds'][name]:.3g} ({low} to {high})")
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {ratio(row):.2f}x |")
    return lines


def tables(rows: list[Row]) -> list[str]:
    """`table` of the rows without a spread, and `engines_table` of those with one."""
    engines = [row for row in rows if "spread" in row]
    others = [row for row in rows if "spread" not in row]
    both = [table(others) if others else [], engines_table(engines) if engines else []]
    return [line for part in both if part for line in (*part, "")]


def roofline(rows: list[Row], title: str, path: Path) -> None:
    """Operations per second over operations per byte: ours, the fastest other, the machine's two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = [row for row in rows if row.get("operations") and row["operations_per_second"]]
    copy = float(np.median([row["bytes_per_second"] for row in rows]))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    x = np.geomspace(0.05, 2000, 200)
    for bfloat16, style in ((False, "-"), (True, "--")):
        rates = [row["operations_per_second"] for row in rows if row["bfloat16"] == bfloat16]
        if rates:
            ceiling = np.minimum(float(np.median(rates)), x * copy) / 1e9
            kind = "FMA rate in bfloat16" if bfloat16 else "FMA rate"
            axes.loglog(x, ceiling, style, color="black", label=f"ceiling: copy rate, then {kind}")
    colours = {}
    for row in rows:
        op = row["case"].split("[")[0] + (", bfloat16" if row["bfloat16"] else "")
        colour = colours.setdefault(op, f"C{len(colours)}")
        intensity = row["operations"] / row["bytes"]
        ours = next(iter(row["seconds"]))
        for name, marker in ((ours, "o"), (_fastest_other(row), "x")):
            rate = row["operations"] / row["seconds"][name] / 1e9
            label = f"{op}, {'ours' if name == ours else 'fastest other'}"
            seen = label in axes.get_legend_handles_labels()[1]
            axes.plot(intensity, rate, marker, color=colour, label=None if seen else label)
    axes.set(xlabel="operations a byte, at the least possible traffic", ylabel="GFLOP/s", title=title)
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        sys.exit("usage: python benchmarks/report.py FILE.json [ROOFLINE.png]")
    content = json.loads(Path(arguments[0]).read_text())
    rows = [b["extra_info"] for b in content["benchmarks"] if "seconds" in b["extra_info"]]
    machine = content["machine_info"]["pahm"]
    print(f"{machine}\n\n" + "\n".join(tables(rows)))
    if len(arguments) == 2:
        roofline(rows, machine, Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
