"""Training and scoring the rows of a table under one budget and one set of seeds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from pahm.ablation.inputs import check_inputs
from pahm.ablation.tables import RESULT, TABLES, VARIANTS, configuration
from pahm.ablation.write import write_table
from pahm.config import Config, from_dict, preset
from pahm.data.freihand import FreiHand
from pahm.hand.topology import HandTopology
from pahm.model.checkpoint import load_checkpoint
from pahm.synth.generate import generate
from pahm.text_files import read_json
from pahm.train.provenance import provenance
from pahm.train.run_folder import LAST
from pahm.whole_file import whole_file

DATA_SEED = 1
"""Of the images that are rendered; those of the shipped checkpoint have 0."""
_NOT_COMPARED = ("backbone_weights", "workers", "save_minutes", "save_every")  # which decide no result
_METRO_ONLY = ("transformer_channels", "transformer_layers", "transformer_heads")


@dataclass(frozen=True)
class Scale:
    """What all rows of a table have in common."""

    base: Callable[[str], Config]
    """The configuration that rows change, by the table's name."""
    images: tuple[int, int] | None
    """Training and evaluation images of the package's own data set; None needs a folder."""


def _tiny(table: str) -> Config:
    changes = {
        "model.image_size": 64,
        "model.transformer_channels": [128, 64, 32],
        "model.transformer_layers": 2,
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.workers": 0,
        "loss.heatmap_sigma": 14.0,  # one pixel of the 16 x 16 heatmaps
        "train.export": "float32",
    }
    return preset("tiny").override(changes)


def _paper(table: str) -> Config:
    # METRO's published network stands on HRNet-W64; tables 1 to 3 are the paper's ablations with ResNet-18.
    return preset("hrnet_w64" if table == "table4" else "resnet18")


SCALES: dict[str, Scale] = {
    "tiny": Scale(_tiny, (10000, 1000)),
    "paper": Scale(_paper, None),
}


def ablate(
    table: str,
    out: str | os.PathLike[str],
    *,
    scale: str = "tiny",
    data: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    only: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
    topology: HandTopology | None = None,
    accelerator: str = "auto",
    report: Callable[[str], None] = print,
) -> Path:
    """Train and score the rows of one of the paper's tables, and write it beside the paper's numbers.

    `out` receives a run folder for each network and seed (`runs/`, see `pahm.train.trainer.train`), a small
    JSON of its scores (`results/`), and `<table>.md`, `.csv` and `.png`, written anew after each run. Runs
    whose result is there are skipped, also where another table made it. An interrupted run resumes.

    The jobs of a cluster can share `out` and `data`, each with its own `only` and `seeds`. A last call
    without `only` writes the whole table.

    Args:
        table: a name of `TABLES`. scale: a name of `SCALES`.
        data: a folder in FreiHAND's layout; None renders one into `out` for a scale that says how large,
            with another seed than the images that the shipped checkpoint was trained on.
        seeds: of the weights, the order of the images and their augmentation; each row runs with each.
        only: names of `VARIANTS` in this table to run; empty for all of them.
        changes: dotted names of the configuration and values, for all rows alike.
        topology, accelerator: as `pahm.train.trainer.train`. A run has one device.
        report: takes a line of progress.

    Returns:
        the path of the Markdown table.

    Raises:
        ValueError: no such table, scale or row; no data, or data that cannot be trained and scored on; a
            change of what rows differ in; or `out` has runs of another configuration (the first difference is
            named), or of other images, another hand or other first weights.
    """
    if table not in TABLES:
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")
    if scale not in SCALES:
        raise ValueError(f"preset: expected one of {', '.join(SCALES)}, got {scale!r}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected different numbers, got {list(seeds)}")
    variants = [row.variant for row in TABLES[table].rows if row.variant is not None]
    for name in only:
        if name not in variants:
            raise ValueError(f"only: expected rows of {table}, {', '.join(variants)}, got {name!r}")
    decided = {name for _, differences in VARIANTS.values() for name in differences}
    if taken := sorted(decided & set(changes or {})):
        raise ValueError(f"{taken[0]} is what the rows differ in, expected values that all rows share")
    out = Path(out)
    images = SCALES[scale].images
    if data is None and images is None:
        raise ValueError(f"data: preset {scale!r} needs a folder in FreiHAND's layout, got none")
    base = SCALES[scale].base(table).override(changes or {})
    (out / "results").mkdir(parents=True, exist_ok=True)
    if scale == "tiny" and base.model.backbone_weights is None:
        base = base.override({"model.backbone_weights": str(_shipped_backbone(out))})
    waiting = []
    for seed in seeds:
        for variant in only or variants:
            config = configuration(base, variant).override({"train.seed": seed})
            path = out / "results" / RESULT.format(variant=variant, seed=seed)
            if path.exists():
                _check_same(path, config)
                report(f"{variant}, seed {seed}: done before")
            else:
                waiting.append((config, path))
    given = data is not None
    if data is None and images is not None:
        data = out / "data"
        if waiting:
            generate(data, *images, seed=DATA_SEED)
    if data is not None and (waiting or given):
        check_inputs(out, data, topology, base)
    for config, path in waiting:
        assert data is not None
        seconds = _run(config, data, out / "runs" / path.stem, path, topology, accelerator)
        report(f"{config.name}, seed {config.train.seed}: {seconds / 60:.1f} min")
        write_table(out, table, seeds)
    return write_table(out, table, seeds)


def _run(
    config: Config,
    data: str | os.PathLike[str],
    folder: Path,
    result: Path,
    topology: HandTopology | None,
    accelerator: str,
) -> float:
    """Train and score one row; returns the seconds that this took."""
    from pahm.train.trainer import train

    resumed = (folder / LAST).exists()
    started = time.monotonic()
    scores = train(config, data, folder, topology=topology, accelerator=accelerator)
    seconds = time.monotonic() - started
    recorded = config.override({"model.backbone_weights": None})
    record = {
        "scores": scores,
        "seconds": None if resumed else round(seconds, 1),  # of a resumed run only the last part is known
        "threads": torch.get_num_threads(),
        "training_images": len(FreiHand(data, "training")),
        "config": json.loads(recorded.to_json()),
        "provenance": provenance(),
    }
    with whole_file(result) as written:
        written.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return seconds


def _check_same(path: Path, config: Config) -> None:
    """Raise ValueError where the result in `path` is of another configuration than `config`."""
    try:
        found = from_dict(read_json(path)["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {path} is not a result of pahm ablate ({error!r})") from error
    passed_over = _NOT_COMPARED if config.model.decoder == "metro" else _NOT_COMPARED + _METRO_ONLY
    for part in ("model", "loss", "train", "augment"):
        for name, value in vars(getattr(config, part)).items():
            before = getattr(getattr(found, part), name)
            if name not in passed_over and before != value:
                raise ValueError(
                    f"out: {path} was made with {part}.{name} = {before!r}, now {value!r}; "
                    "use another output folder or the same configuration"
                )


def _shipped_backbone(out: Path) -> Path:
    """The backbone of the shipped checkpoint as a file of weights, from which all rows of `tiny` start.

    From ImageNet's weights no row leaves the mean hand behind in a quarter of an hour on two cores. The
    shipped network is the pixel-aligned one with 2D supervision, so rows without them start from features
    that had them: what the rows show is what the rest of each network makes of the same features.
    """
    path = out / "backbone.safetensors"
    if not path.exists():
        weights = load_checkpoint().extractor.backbone.state_dict()
        with whole_file(path, shared=True) as partial_file:
            partial_file.write_bytes(save({name: value.contiguous() for name, value in weights.items()}))
    return path
