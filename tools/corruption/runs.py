"""Small valid data sets and runs, and how to read each."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kind import SHARED, digest, finite, require

# Data sets.


def make_folder(folder: Path) -> None:
    shutil.copytree(SHARED["data"], folder, dirs_exist_ok=True)
    for cache in folder.glob("*.npy"):
        cache.unlink()


def make_cached(folder: Path) -> None:
    make_folder(folder)
    samples(folder)


def read_cached(folder: Path) -> Any:
    for cache in folder.glob("*.npy"):  # caches go by file times, which differ in a copy of the folder
        annotations = folder / f"{cache.name.partition('.')[0]}.json"
        status = annotations.stat()
        cache.rename(annotations.with_name(f"{annotations.stem}.{status.st_size}-{status.st_ctime_ns}.npy"))
    return samples(folder)


def samples(folder: Path) -> Any:
    from pahm.data.freihand import FreiHand

    read: list[Any] = []
    for split in ("training", "evaluation"):
        dataset = FreiHand(folder, split)
        for i in range(len(dataset)):
            sample = dataset[i]
            finite(*(sample[key] for key in ("K", "joints", "vertices", "scale")))
            read.append(
                [np.asarray(sample["image"]), *(sample[key] for key in ("K", "joints", "vertices", "scale"))]
            )
    return read


def make_shards(folder: Path) -> None:
    from pahm.data.shards import write_shards

    write_shards(SHARED["data"], folder, size=3)


def read_shards(folder: Path) -> Any:
    from pahm.data.freihand import FreiHand
    from pahm.data.shards import ShardImages, find_shards

    whole = FreiHand(SHARED["data"], "training")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pahm").addHandler(handler)
    paths = find_shards(folder)
    require(len(paths) == 2 or bool(said), f"{len(paths)} of 2 shards without a word")
    images = ShardImages(paths, 10)
    require(len(images) == 6 or bool(said), f"{len(images)} of 6 images without a word")
    read = []
    for i in range(len(images)):
        try:
            sample = images[i]
        except ValueError as error:
            said.append(str(error))
            continue
        values = [np.asarray(sample[key]) for key in ("image", "K", "joints", "vertices", "scale")]
        other = whole[sample["index"]]
        expected = [np.asarray(other[key]) for key in ("image", "K", "joints", "vertices", "scale")]
        require(digest(values) == digest(expected), "an image or its annotations are other than before")
        read.append(values)
    return read


# Files that training writes.


def make_weights(folder: Path) -> None:
    shutil.copy(SHARED["place"] / "model.safetensors", folder)


def read_weights(folder: Path) -> Any:
    from pahm.infer.predictor import Predictor
    from pahm.model import load_checkpoint

    network = load_checkpoint(folder / "model.safetensors")
    hand = Predictor(network, "cpu").predict(SHARED["picture"])
    finite(hand.vertices)
    return [network.state_dict(), network.topology.to_arrays()]


def make_run(folder: Path) -> None:
    """A run of two steps."""
    from pahm.config import preset
    from pahm.train.trainer import train

    changes = {"model.pretrained": False, "train.batch_size": 3, "train.epochs": 1, "train.workers": 0}
    train(preset("tiny").override(changes), SHARED["data"], folder / "run", accelerator="cpu", progress=False)


def read_last(folder: Path) -> Any:
    from pahm.config import from_file
    from pahm.train.run_folder import resume_place

    run = folder / "run"
    place = resume_place(run, from_file(run / "config.json"))
    require(place is not None, "the run is begun anew without a word")
    stored = torch.load(run / "last.ckpt", map_location="cpu", weights_only=True)
    return [list(place or ()), stored["state_dict"], stored["optimizer_states"]]


def read_report(folder: Path) -> Any:
    from pahm.report import make_report

    page = make_report(
        folder / "run", SHARED["data"], count=1, failures=0, images=1, device="cpu", progress=False
    )
    return page.stat().st_size > 0


def make_submission(folder: Path) -> None:
    from pahm.score.metrics import write_submission

    for kind in ("xyz", "verts"):
        shutil.copy(SHARED["data"] / f"evaluation_{kind}.json", folder)
    hands = [np.array(json.loads((folder / f"evaluation_{k}.json").read_text())) for k in ("xyz", "verts")]
    write_submission(folder / "pred.json", *hands)


def read_submission(folder: Path) -> Any:
    from pahm.score.protocol import score_submission

    scores = score_submission(folder / "pred.json", folder)
    finite(*scores.values())
    return scores


def make_table(folder: Path) -> None:
    records = Path(__file__).parents[2] / "docs" / "results" / "results"
    (folder / "results").mkdir()
    for row in ("repeat", "mlp", "ours"):
        for path in records.glob(f"{row}-seed*.json"):
            shutil.copy(path, folder / "results")


def read_table(folder: Path) -> Any:
    from pahm.ablation.tables import TABLES
    from pahm.ablation.write import as_csv, load_results, markdown

    results = load_results(folder, TABLES["table1"], (0, 1))
    text = markdown(TABLES["table1"], "table1", results)
    require("nan" not in text and "inf" not in text, "a table with numbers that are not finite")
    return [text, as_csv(TABLES["table1"], results)]
