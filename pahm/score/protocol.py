"""FreiHAND's protocol: scores a submission `pred.json` against the evaluation annotations."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pahm.data.annotations import parse_table
from pahm.hand.topology import HandTopology
from pahm.score.metrics import HandMetrics, load_joints, load_submission
from pahm.synth.folder import MANIFEST
from pahm.whole_file import whole_file

Array = npt.NDArray[np.float64]

_ROWS = {"raw": ("raw_", "raw_"), "aligned": ("pa_", "")}
_COLUMNS = {
    "mpjpe": "MPJPE",
    "mpvpe": "MPVPE",
    "f5": "F@5",
    "f15": "F@15",
    "auc_joints": "AUC J",
    "auc_vertices": "AUC V",
}
_BATCH = 32


def score_predictions(
    xyz: Array,
    verts: Array | None,
    true_xyz: Array,
    true_verts: Array | None,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """The scores of FreiHAND's evaluation script, without alignment ("raw") and after alignment with scale.

    xyz, true_xyz: (N, 21, 3) joints; verts, true_verts: (N, 778, 3) vertices, or None to score only the
    joints; float64 numpy, metres, camera space. Returns the dict of `HandMetrics(raw=True)` without undefined
    scores, with lengths in millimetres, and with `images`, which is N. Alignment may mirror, as in the
    script. Raises ValueError for wrong shapes, N = 0 and points that are not finite.
    """
    if len(xyz) == 0 or len(xyz) != len(true_xyz):
        raise ValueError(f"xyz: expected {len(true_xyz)} hands as in true_xyz, at least 1, got {len(xyz)}")
    metrics = HandMetrics(raw=True, sync_on_compute=False)
    arrays = [array for array in (xyz, true_xyz, verts, true_verts) if array is not None]
    starts = range(0, len(xyz), _BATCH)
    for start in track(starts, "scoring", disable=not progress, console=Console(stderr=True)):
        metrics.update(*(torch.as_tensor(array[start : start + _BATCH]) for array in arrays))
    scores = {name: float(value) for name, value in metrics.compute().items()}
    return {"images": len(xyz)} | {name: value for name, value in scores.items() if math.isfinite(value)}


def truth_paths(freihand: str | os.PathLike[str], *, joints_only: bool = False) -> list[Path]:
    """The paths of the evaluation annotations that scoring needs, whether they exist or not."""
    kinds = ("xyz",) if joints_only else ("xyz", "verts")
    return [Path(freihand) / f"evaluation_{kind}.json" for kind in kinds]


def score_submission(
    submission: str | os.PathLike[str],
    freihand: str | os.PathLike[str],
    *,
    joints_only: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Score a `pred.json` as FreiHAND's evaluation script does. Returns what `score_predictions` returns.

    freihand: the folder with `evaluation_xyz.json` and `evaluation_verts.json`, which are read in float64,
    as in the script. joints_only: leave out the vertices; then `evaluation_verts.json` is not needed, and the
    submission's vertices may be missing or belong to another mesh.

    Raises FileNotFoundError naming a missing file, and ValueError naming a malformed file or if the
    submission and the annotations have different numbers of hands.
    """
    paths = truth_paths(freihand, joints_only=joints_only)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"freihand: {path} is missing, there is nothing to score against")
    xyz, verts = (load_joints(submission), None) if joints_only else load_submission(submission)
    true_xyz = _truth(paths[0], 21, len(xyz), submission)
    true_verts = None if verts is None else _truth(paths[1], 778, len(verts), submission)
    return score_predictions(xyz, verts, true_xyz, true_verts, progress=progress)


def _truth(path: Path, points: int, count: int, submission: str | os.PathLike[str]) -> Array:
    truth = parse_table(path, (points, 3), np.float64)
    if len(truth) != count:
        raise ValueError(
            f"submission: expected {len(truth)} hands as in {path}, got {count} in {os.fspath(submission)}"
        )
    return np.asarray(truth, np.float64)


def write_scores(submission: str | os.PathLike[str], scores: dict[str, float]) -> Path:
    """Write the scores next to the submission (`pred.scores.json` for `pred.json`) and return the path."""
    path = Path(submission).with_suffix(".scores.json")
    with whole_file(path) as partial:
        partial.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return path


def print_submission_scores(scores: dict[str, float], console: Console | None = None) -> None:
    """Print a table of the scores of `score_submission`, raw and aligned, with a dash for missing ones."""
    table = Table(caption="lengths in mm; raw in camera space, aligned with rotation and scale")
    table.add_column(f"{scores['images']:.0f} images")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right")
    for label, (mean, other) in _ROWS.items():
        cells = []
        for name in _COLUMNS:
            is_length = name in ("mpjpe", "mpvpe")
            value = scores.get((mean if is_length else other) + name)
            cells.append("-" if value is None else f"{value:.{2 if is_length else 3}f}")
        table.add_row(label, *cells)
    (console or Console()).print(table)


def check_mesh(topology: HandTopology, freihand: str | os.PathLike[str]) -> None:
    """Raise ValueError if a network's mesh differs from that of the folder's hands.

    Folders of `pahm synth`, recognised by their manifest, have the package's own mesh; all others have
    MANO's. Both have 778 vertices, but they do not correspond. A folder without evaluation images passes
    here; the reader rejects it.
    """
    if not (Path(freihand) / "evaluation" / "rgb").is_dir():
        return
    shipped = HandTopology.load()
    own = np.array_equal(topology.hierarchy.faces[0], shipped.hierarchy.faces[0]) and np.allclose(
        topology.joint_regressor, shipped.joint_regressor
    )
    synthetic = (Path(freihand) / MANIFEST).is_file()
    if own != synthetic:
        theirs, ours = "the package's own hand", "MANO's"
        if own:
            theirs, ours = ours, theirs
        raise ValueError(
            f"checkpoint: its mesh is {ours}, while the hands of {os.fspath(freihand)} have {theirs} "
            f"({'no' if own else 'a'} {MANIFEST} of pahm synth is there), so that vertices do not "
            "correspond; score the joints alone (--joints-only) or take another checkpoint"
        )
