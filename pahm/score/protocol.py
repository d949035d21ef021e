"""FreiHAND's protocol: its scores of a submission `pred.json` against the evaluation annotations."""

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

    xyz, true_xyz: (N, 21, 3) joints; verts, true_verts: (N, 778, 3) vertices, or None to score the joints
    alone; float64 numpy, metres, camera space. Returns the dict of `HandMetrics(raw=True)`, lengths in
    millimetres, without scores that are undefined, and `images`, which is N. Alignment may mirror, as in the
    script. Raises ValueError for other shapes, N = 0 and points that are not finite.
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
    """The annotation files of the evaluation images that scoring needs, whether they exist or not."""
    kinds = ("xyz",) if joints_only else ("xyz", "verts")
    return [Path(freihand) / f"evaluation_{kind}.json" for kind in kinds]


def score_submission(
    submission: str | os.PathLike[str],
    freihand: str | os.PathLike[str],
    *,
    joints_only: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """Score a `pred.json` as FreiHAND's evaluation script does; returns as `score_predictions`.

    freihand: the folder with `evaluation_xyz.json` and `evaluation_verts.json`, which are read in float64,
    as the script reads them. joints_only: leave the vertices out; `evaluation_verts.json` is not needed
    then, and the submission's vertices may be of another mesh or none.

    Raises FileNotFoundError naming a missing file, ValueError naming a file that is malformed, and for a
    submission of another number of hands than the annotations have.
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
    """Write the scores beside the submission, to `pred.scores.json` for `pred.json`; returns that path."""
    path = Path(submission).with_suffix(".scores.json")
    with whole_file(path) as partial:
        partial.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return path


def print_submission_scores(scores: dict[str, float], console: Console | None = None) -> None:
    """A table of the scores of `score_submission`, raw and aligned, with a dash for what was not scored."""
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
    """Refuse to compare vertices where a network's mesh is not the one that the folder's hands have.

    The hands of `pahm synth` have the package's own mesh, and its manifest tells its folders; all others
    have MANO's. Vertices of two meshes do not correspond, though both have 778. Raises ValueError;
    a folder without evaluation images is left for the reader to refuse.
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
