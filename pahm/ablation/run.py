"""Trains and scores the rows of a table with the same budget and seeds."""

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
"""The seed of the rendered images. The shipped checkpoint's images have seed 0."""
_NOT_COMPARED = ("backbone_weights", "workers", "save_minutes", "save_every")  # none affects the result
_METRO_ONLY = ("transformer_channels", "transformer_layers", "transformer_heads")


@dataclass(frozen=True)
class Scale:
    """The settings that all rows of a table share."""

    base: Callable[[str], Config]
    """Returns the configuration that rows modify, given the table's name."""
    images: tuple[int, int] | None
    """Numbers of training and evaluation images to render; with None the caller gives a folder."""


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
    # METRO's published network uses HRNet-W64; tables 1 to 3 are the paper's ablations with ResNet-18.
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
    """Train and score the rows of one of the paper's tables, and write it next to the paper's numbers.

    `out` receives a run folder for each network and seed (`runs/`, see `pahm.train.trainer.train`), a small
    JSON file of its scores (`results/`), and `<table>.md`, `.csv` and `.png`, rewritten after each run. Runs
    that already have a result are skipped, even if the result came from another table. An interrupted run
    resumes.

    The jobs of a cluster can share `out` and `data`, each with its own `only` and `seeds`. A final call
    without `only` writes the whole table.

    Args:
        table: a name in `TABLES`. scale: a name in `SCALES`.
        data: a folder in FreiHAND's layout. None renders one into `out` if the scale defines its size. Its
            seed differs from that of the shipped checkpoint's training images.
        seeds: seeds of the weights, the order of the images and their augmentation; each row runs with each.
        only: names in `VARIANTS` to run from this table; empty for all.
        changes: dotted configuration names and their values, the same for all rows.
        topology, accelerator: as in `pahm.train.trainer.train`. A run uses one device.
        report: called with each line of progress.

    Returns:
        the path of the Markdown table.

    Raises:
        ValueError: an unknown table, scale or row; no data, or data that cannot be used for training and
            scoring; a change to a value in which rows differ; or `out` has runs with another configuration
            (the first difference is named), other images, another hand or other initial weights.
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
    """Train and score one row. Returns the time taken in seconds."""
    from pahm.train.trainer import train

    resumed = (folder / LAST).exists()
    started = time.monotonic()
    scores = train(config, data, folder, topology=topology, accelerator=accelerator)
    seconds = time.monotonic() - started
    recorded = config.override({"model.backbone_weights": None})
    record = {
        "scores": scores,
        "seconds": None if resumed else round(seconds, 1),  # only the last part of a resumed run is timed
        "threads": torch.get_num_threads(),
        "training_images": len(FreiHand(data, "training")),
        "config": json.loads(recorded.to_json()),
        "provenance": provenance(),
    }
    with whole_file(result) as written:
        written.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return seconds


def _check_same(path: Path, config: Config) -> None:
    """Raise ValueError if the result in `path` was made with a configuration other than `config`."""
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
    """Write the shipped checkpoint's backbone weights to a file. All rows of `tiny` start from them.

    Starting from ImageNet's weights, no row beats the mean hand in a quarter of an hour on two cores. The
    shipped network is pixel-aligned and has 2D supervision, so rows without either start from features that
    were trained with both. The rows therefore compare how the rest of each network uses the same features.
    """
    path = out / "backbone.safetensors"
    if not path.exists():
        weights = load_checkpoint().extractor.backbone.state_dict()
        with whole_file(path, shared=True) as partial_file:
            partial_file.write_bytes(save({name: value.contiguous() for name, value in weights.items()}))
    return path
