"""The inputs that all rows of a table share: images, hand and initial weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pahm.config import Config
from pahm.data.freihand import FreiHand
from pahm.hand.topology import HandTopology
from pahm.score.evaluation import check_meshes
from pahm.text_files import read_json
from pahm.whole_file import whole_file

RECORD = "inputs.json"
_NAMES = {"data": "images (--data)", "hand": "hands (--mano)", "weights": "first weights"}


def check_inputs(
    out: Path, data: str | os.PathLike[str], topology: HandTopology | None, config: Config
) -> None:
    """Record in `out` the inputs of its runs, or compare them with those recorded for earlier runs.

    Images are identified by the cameras and positions of their hands, not by the folder's path.

    Raises FileNotFoundError or ValueError if the images cannot be used for training and scoring: not in
    FreiHAND's layout, no annotations, or meshes of another hand. Raises ValueError naming what differs.
    """
    topology = topology or HandTopology.load()
    for split in ("training", "evaluation"):
        dataset = FreiHand(data, split)
        if not dataset.annotated:
            raise ValueError(f"data: {data} has no {split} annotations, which the rows are scored by")
        check_meshes(dataset, topology)
    weights = config.model.backbone_weights
    found = {
        "data": _digest(sorted(Path(data).glob("*_K.json")) + sorted(Path(data).glob("*_xyz.json"))),
        "hand": hashlib.sha256(
            topology.hierarchy.faces[0].tobytes() + topology.joint_regressor.tobytes()
        ).hexdigest(),
        "weights": _digest([Path(weights)]) if weights else f"pretrained: {config.model.pretrained}",
    }
    path = out / RECORD
    if not path.exists() or not any(any(out.glob(f"{folder}/*")) for folder in ("results", "runs")):
        with whole_file(path, shared=True) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    try:
        before = read_json(path)
        other = [title for name, title in _NAMES.items() if before[name] != found[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {path} is not a record of pahm ablate ({error!r})") from error
    if other:
        raise ValueError(
            f"out: the runs in {out} were made with other {' and '.join(other)}; use another output folder"
        )


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
