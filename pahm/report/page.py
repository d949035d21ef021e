"""Collects the content of a run's report page and writes the page."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pahm.config import from_dict
from pahm.infer.predictor import Predictor
from pahm.model.checkpoint import check_same_network, load_checkpoint, read_metadata, read_provenance
from pahm.model.network import HandNet
from pahm.report.curves import charts, read_curves
from pahm.report.per_image import Scored, annotated, find_readable, reasons_of, score
from pahm.report.rows import Photographer, Row
from pahm.score.evaluation import COLUMNS
from pahm.score.failures import LIMITS, NONE, Reasons, dominant
from pahm.text_files import read_json
from pahm.train.run_folder import CONFIG, RECORD
from pahm.whole_file import whole_file

_MODEL = "model.safetensors"
_PACKAGES = ("pahm", "torch", "timm", "pytorch-lightning", "numpy", "embreex", "plotly")
_LARGEST = 1000  # maximum number of images scored by default


def make_report(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    baseline: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    count: int = 8,
    failures: int = 6,
    images: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Path:
    """Write an offline HTML report of a `pahm train` run folder and return the file's path.

    Evaluation images are left out if the image or its mask cannot be read. The page says so, and standard
    error names them. A hand is out of frame if the run's network does not see it: it is outside the image, or
    outside the square that `ModelConfig.crop` sets. The page outlines that square in the input pictures.

    Args:
        data: a folder in FreiHAND's layout whose evaluation images are annotated; by default the one that
            the run's `run.json` names.
        baseline: a run folder or checkpoint to show next to the run's.
        out: the file, `report.html` in the run folder by default.
        count: hands in the grid, evenly spread over the scored images.
        failures: how many hands with the largest errors to show.
        images: how many evaluation images to score, starting with the first and including unreadable ones;
            by default all, but at most 1,000.

    Raises:
        ValueError: plotly is not installed; a number is out of range; `data` is not given and not recorded,
            or is not annotated, or its meshes are not those of the checkpoint's hand, or none of its images
            can be read; the checkpoint does not belong to the run's `config.json`; the baseline has a
            different hand.
        FileNotFoundError, IsADirectoryError: there is no checkpoint; `out` is a folder.
    """
    start = time.monotonic()
    run = Path(run)
    data = _recorded_data(run) if data is None else os.fspath(data)
    out = run / "report.html" if out is None else Path(out)
    _check_arguments(out, count, failures, images)
    network = _own_network(run)
    other = None if baseline is None else _baseline_network(Path(baseline), network)
    dataset = annotated(data)
    available, first = len(dataset), dataset.record(0)
    network.topology.check_joints(first["vertices"], first["joints"], f"--data: {data}")
    total = min(available, _LARGEST if images is None else images)
    kept, unreadable = find_readable(data, total, progress=progress)
    for sentence in unreadable.values():
        print(sentence, file=sys.stderr)
    if unreadable:
        print(f"{len(unreadable)} of {total} images cannot be read and are left out", file=sys.stderr)

    ours, constant = score(network, data, kept, device=device, progress=progress)
    theirs = None if other is None else score(other, data, kept, device=device, progress=progress)[0]
    reasons = reasons_of(data, kept, network.faces, network.config.crop, progress=progress)

    photographer = Photographer(
        Predictor(network, device), None if other is None else Predictor(other, device)
    )
    samples = annotated(data)
    spread = np.unique(np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)).tolist()
    worst = np.argsort(-ours.vertices, kind="stable")[:failures].tolist()
    every = [("grid", kept[i]) for i in spread] + [("failure", kept[i]) for i in worst]
    drawn: dict[str, list[Row]] = {"grid": [], "failure": []}
    for kind, i in track(every, "drawing", disable=not progress, console=Console(stderr=True)):
        drawn[kind].append(photographer.row(samples[i], kind))

    named = {"ours": ours} | ({} if theirs is None else {"baseline": theirs}) | {"mean hand": constant}
    levels = network.topology.hierarchy
    shown = [*charts(read_curves(run)), _distribution(named)]
    payload = {
        "charts": shown,
        "hands": [
            {"kind": kind, "index": hand.index, "meshes": hand.meshes}
            for kind, hands in drawn.items()
            for hand in hands
        ],
        "faces": {str(n): faces.tolist() for n, faces in zip(levels.sizes, levels.faces, strict=True)},
    }
    values = {
        "name": run.resolve().name,
        "baseline": None if baseline is None else os.fspath(baseline),
        "data": data,
        "images": len(kept),
        "available": available,
        "unreadable": list(unreadable),
        "crop": network.config.crop,
        "has_curves": len(shown) > 1,
        "charts": shown,
        "columns": COLUMNS,
        "scores": {label: _score_row(scored) for label, scored in named.items()},
        "grid": _table(drawn["grid"], kept, ours, theirs, reasons, "g"),
        "failures": _table(drawn["failure"], kept, ours, theirs, reasons, "f"),
        "limits": LIMITS,
        "none": NONE,
        "masks": any(not math.isnan(found.occlusion) for found in reasons),
        "by_reason": _by_reason(ours, theirs, reasons),
        "provenance": _provenance(run, data, baseline, network),
        "configuration": _configuration(run),
        "payload": json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": importlib.import_module("plotly.offline").get_plotlyjs(),
        "seconds": round(time.monotonic() - start),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out, shared=True) as partial:
        # File names may not be valid text.
        partial.write_text(_render(values), encoding="utf-8", errors="backslashreplace")
    return out


def _recorded_data(run: Path) -> str:
    """The folder of the evaluation images that the run was scored on."""
    path = run / RECORD
    if not path.is_file():
        raise ValueError(f"--data: {path} does not exist to name the run's data, give the folder")
    try:
        record = read_json(path)
        places = record["eval_data"] or record["data"]
        return str(places[0] if isinstance(places, list) else places)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"DIR: {path} is not a record of pahm train ({error!r})") from error


def _check_arguments(out: Path, count: int, failures: int, images: int | None) -> None:
    missing = [name for name in ("plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the page needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    for name, value, least in (("--count", count, 1), ("--failures", failures, 0), ("--images", images, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected a number of at least {least}, got {value}")
    if out.is_dir():
        raise IsADirectoryError(f"--out: {out} is a folder, expected the name of a file")


def _own_network(run: Path) -> HandNet:
    if not (run / _MODEL).is_file():
        raise FileNotFoundError(f"DIR: {run} has no {_MODEL}, expected a finished run folder of pahm train")
    recorded = run / CONFIG
    if recorded.is_file():
        try:
            expected = from_dict(read_json(recorded))
        except ValueError as error:
            raise ValueError(f"DIR: {recorded} is not a configuration ({error})") from error
        check_same_network(read_metadata(run / _MODEL)[0], expected, f"{run / _MODEL}, beside {recorded},")
    return load_checkpoint(run / _MODEL)


def _baseline_network(baseline: Path, network: HandNet) -> HandNet:
    path = baseline / _MODEL if baseline.is_dir() else baseline
    if not path.is_file():
        raise FileNotFoundError(f"--baseline: {path} does not exist, expected a run folder or a checkpoint")
    other = load_checkpoint(path)
    if not np.array_equal(other.faces, network.faces):
        raise ValueError(f"--baseline: the hand of {path} has other triangles than the run's")
    return other


def _score_row(scored: Scored) -> list[str]:
    places = {name: 2 if name.startswith("pa_") else 3 for name in COLUMNS}
    return [f"{scored.summary[name]:.{places[name]}f}" for name in COLUMNS]


def _distribution(named: dict[str, Scored]) -> dict[str, Any]:
    """Chart the share of images with a PA-MPVPE of at most x mm (see `charts`)."""
    traces = []
    for label, scored in named.items():
        ordered = np.sort(scored.vertices)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        traces.append({"name": label, "x": ordered.round(2).tolist(), "y": share.round(4).tolist()})
    axes = {"x": "PA-MPVPE, mm", "y": "share of images below"}
    return {"id": "distribution", "title": "Error of single images", **axes, "log": False, "traces": traces}


def _table(
    hands: list[Row],
    images: list[int],
    ours: Scored,
    theirs: Scored | None,
    reasons: list[Reasons],
    prefix: str,
) -> dict[str, Any]:
    """Titles and rows of pictures, each with its numbers; `None` for a hand's missing picture.

    images: indices of the images that the scores and reasons refer to.
    """
    longest = max(hands, key=lambda hand: len(hand.pictures), default=None)
    titles = [picture.title for picture in longest.pictures] if longest else []
    rows = []
    for position, hand in enumerate(hands):
        pictures = {picture.title: picture for picture in hand.pictures}
        at = images.index(hand.index)
        why = reasons[at]
        shares = [
            {"name": name, "share": None if math.isnan(share) else share, "over": share >= limit.named}
            for (name, limit), share in zip(LIMITS.items(), why, strict=True)
        ]
        rows.append(
            {
                "id": f"{prefix}{position}",
                "index": hand.index,
                "joints": ours.joints[at],
                "vertices": ours.vertices[at],
                "baseline": None if theirs is None else theirs.vertices[at],
                "pictures": [pictures.get(title) for title in titles],
                "shares": shares,
                "dominant": dominant(why),
            }
        )
    return {"titles": titles, "rows": rows}


def _by_reason(ours: Scored, theirs: Scored | None, reasons: list[Reasons]) -> list[dict[str, Any]]:
    """Count the images with each dominant reason and average their errors. The number is None if the reason
    is unknown in all images.
    """
    names = np.array([dominant(found) for found in reasons])
    shares = zip(LIMITS, zip(*reasons, strict=True), strict=True)
    unknown = [name for name, found in shares if all(map(math.isnan, found))]
    rows = []
    for name in (*LIMITS, NONE):
        chosen = names == name
        count = None if name in unknown else int(chosen.sum())
        row = {"name": name, "count": count, "ours": None, "baseline": None}
        if chosen.any():
            row["ours"] = ours.vertices[chosen].mean()
            row["baseline"] = None if theirs is None else theirs.vertices[chosen].mean()
        rows.append(row)
    return rows


def _provenance(run: Path, data: str, baseline: object, network: HandNet) -> list[tuple[str, str]]:
    path = run / _MODEL
    config, recorded = read_metadata(path)
    made = read_provenance(path)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in recorded.items())
    rows = [
        ("made", datetime.datetime.now().astimezone().isoformat(timespec="seconds")),
        ("run", str(run.resolve())),
        ("configuration", config.name),
        ("checkpoint", f"{_MODEL}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"),
        ("parameters", f"{sum(p.numel() for p in network.parameters()):,}"),
        ("scores recorded with it", scores or "none"),
        ("trained with", ", ".join(f"{name} {value}" for name, value in made.items() if value) or "unknown"),
        ("data", str(Path(data).resolve())),
        ("baseline", "none" if baseline is None else str(Path(str(baseline)).resolve())),
    ]
    rows += [("Python", f"{platform.python_version()} on {platform.platform()}")]
    return rows + [(name, _version(name)) for name in _PACKAGES]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _configuration(run: Path) -> list[tuple[str, str]]:
    """Every value of the checkpoint's configuration, by dotted name."""
    config, _ = read_metadata(run / _MODEL)
    return [(name, json.dumps(value)) for name, value in _leaves(asdict(config), "")]


def _leaves(tree: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _render(values: dict[str, Any]) -> str:
    jinja2 = importlib.import_module("jinja2")
    assets = resources.files("pahm") / "assets"
    kinds = ("html", "css", "js")
    texts = {kind: (assets / f"report.{kind}").read_text(encoding="utf-8") for kind in kinds}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(texts["html"]).render(**values, css=texts["css"], js=texts["js"])
    return str(page)
