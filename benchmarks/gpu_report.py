"""A Markdown table of the results of bench_gpu*.py, from a file of `--benchmark-json`, with modelled times.

python benchmarks/gpu_report.py FILE
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from report import geometric_mean

Row = dict[str, Any]
HEADS = (
    "case, served by",
    "ours us",
    "fastest other us",
    "which",
    "ratio",
    "cuda us",
    "triton us",
    "modelled us",
    "wall: ours us",
    "other us",
    "result MB",
    "ours MB",
    "other MB",
)


def _ours_and_fastest(row: Row, clock: str) -> tuple[str, str]:
    ours, *others = row[clock]
    return ours, min(others, key=lambda name: row[clock][name])


def ratio(row: Row) -> float:
    """How many times faster ours is than the fastest of the others."""
    ours, other = _ours_and_fastest(row, "device_seconds")
    return row["device_seconds"][other] / row["device_seconds"][ours]


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e6:.1f}"


def _cells(row: Row, model: dict[str, float]) -> list[str]:
    ours, other = _ours_and_fastest(row, "device_seconds")
    _, at_the_wall = _ours_and_fastest(row, "wall_seconds")
    megabytes = [row["result_bytes"], row["peak_bytes"][ours], row["peak_bytes"][other]]
    return [
        f"{row['gpu_case']}, {row['served']}",
        _microseconds(row["device_seconds"][ours]),
        _microseconds(row["device_seconds"][other]),
        other,
        f"{ratio(row):.2f}x",
        *(_microseconds(row["path_seconds"].get(path)) for path in ("cuda", "triton")),
        _microseconds(model.get(row["gpu_case"])),
        _microseconds(row["wall_seconds"][ours]),
        _microseconds(row["wall_seconds"][at_the_wall]),
        *(f"{count / 1e6:.2f}" for count in megabytes),
    ]


def group(case: str) -> str:
    """The group of a case over all levels, such as "spiral_conv forward float32 batch 32"."""
    op, tail = case.split()[0], re.search(r"(forward|inference|training).*", case)
    assert tail is not None
    layout = next((f", {name}," for name in ("NCHW", "channels_last") if name in case), "")
    return f"{op}{layout} {tail[0]}"


def table(rows: list[Row], model: dict[str, float]) -> list[str]:
    """Lines of Markdown: a row for each case, a mean for each group, and which contenders were left out."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---:|---:|---|" + "---:|" * (len(HEADS) - 4)]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        lines.append(f"| {' | '.join(_cells(row, model))} |")
        groups.setdefault(group(row["gpu_case"]), []).append(row)
    lines += ["", "| mean of | cases | ratio | least |", "|---|---:|---:|---:|"]
    for name, found in groups.items():
        ratios = [ratio(row) for row in found]
        lines.append(f"| {name} | {len(found)} | {geometric_mean(ratios):.2f}x | {min(ratios):.2f}x |")
    left_out = {
        f"- {name} is left out of some cases of {row['gpu_case'].split()[0]}: {reason}"
        for row in rows
        for name, reason in row["left_out"].items()
    }
    return [*lines, "", *sorted(left_out)] if left_out else lines


def modelled(device: str) -> dict[str, float]:
    """Seconds by case; empty if the model cannot be computed. It needs a C++ compiler."""
    if importlib.util.find_spec("gpu_model") is None or shutil.which("g++") is None:
        return {}
    from gpu_model import model_times

    return model_times(device)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        sys.exit("usage: python benchmarks/gpu_report.py FILE.json")
    content = json.loads(Path(arguments[0]).read_text())
    rows = [b["extra_info"] for b in content["benchmarks"] if "gpu_case" in b["extra_info"]]
    if not rows:
        sys.exit(f"{arguments[0]} has no results of bench_gpu*.py")
    print("\n".join(table(rows, modelled(rows[0]["device"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
