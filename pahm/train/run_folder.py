"""The folder of a training run: the networks, their history and `last.ckpt`, which is never half written."""

from __future__ import annotations

import json
import math
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from pahm.config import Config, from_json
from pahm.data.loading import Batch
from pahm.model.checkpoint import check_same_network, save_checkpoint
from pahm.model.network import HandNet
from pahm.train.module import READ_EVERY, HandTraining
from pahm.train.provenance import provenance
from pahm.whole_file import whole_file

LAST = "last.ckpt"
BEST = "best.safetensors"
EXPORT = "model.safetensors"
CONFIG = "config.json"
RECORD = "run.json"

_FREE = ("workers", "export", "save_minutes", "save_every")
"""Values of `train` that may change when a run resumes."""


class Place(NamedTuple):
    """The progress of a run: epoch, finished steps of that epoch, and finished steps of all epochs. It also
    identifies the training images, independently of their path.
    """

    epoch: int = 0
    step: int = 0
    total: int = 0
    images: str = ""


def resume_place(folder: Path, config: Config) -> Place | None:
    """The place at which the run in `folder` resumes, or None if nothing has been saved yet.

    Raises ValueError if `last.ckpt` was made with another configuration (the first value that differs is
    named) or is not a checkpoint of `pahm.train.trainer.train`.
    """
    last = folder / LAST
    if not last.exists():
        return None
    try:
        _check_sums(last)
        stored = torch.load(last, map_location="cpu", weights_only=True, mmap=True)
        found = from_json(stored["pahm_config"])
        epoch, step = stored["pahm_place"]
        place = Place(epoch, step, stored["global_step"], stored["pahm_images"])
    except Exception as error:
        raise ValueError(
            f"resume: {last} is not a checkpoint of pahm train ({error}); remove it to begin the run anew"
        ) from error
    check_same_network(found, config, str(last))
    for part in ("loss", "train", "augment"):
        for name, value in vars(getattr(config, part)).items():
            before = getattr(getattr(found, part), name)
            if before != value and not (part == "train" and name in _FREE):
                raise ValueError(
                    f"resume: {last} was made with {part}.{name} = {before!r}, now {value!r}; "
                    "use another output folder or the same configuration"
                )
    return place


def _check_sums(path: Path) -> None:
    """Raise ValueError if a file of torch.save is damaged; torch.load would not notice."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if not parts or any(part.file_size != part.compress_size for part in parts):  # compressed
                raise ValueError("its parts do not have the sizes that torch writes")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its part {damaged} is damaged")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error, RuntimeError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def describe_run(folder: Path, config: Config, data: Sequence[str], eval_data: str | None) -> None:
    """Write `config.json`, which `pahm train --config` reads, and `run.json`: the data's paths on this
    machine (empty for images given from Python), the configuration, and `provenance`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(config.to_json())
    record = {
        "data": data[0] if len(data) == 1 else list(data) or None,
        "eval_data": eval_data,
        "config": values,
        "provenance": provenance(),
    }
    for name, content in ((CONFIG, values), (RECORD, record)):
        with whole_file(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it once it is completely on disk."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        with whole_file(path) as partial, partial.open("wb") as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:
                # torch closes its archive after a failed write. The error of closing hides the first one: a
                # full disk, or the signal that ends the run.
                first = error.__context__
                hidden = isinstance(first, OSError) or not isinstance(first, Exception | None)
                raise first if first is not None and hidden else error from None
            stream.flush()
            os.fsync(stream.fileno())


class KeepLast(pl.callbacks.Checkpoint):
    """Saves `last.ckpt` at the end of every epoch, and within it every `every` steps and every `minutes`
    minutes (0: never). If a loss or the weights are not finite, it saves nothing and raises
    FloatingPointError.
    """

    def __init__(self, path: Path, every: int, minutes: float) -> None:
        self.path, self.every, self.minutes = path, every, minutes
        self._time = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        images = f", images {', '.join(batch['name'])}"
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._check(trainer, pl_module, images)  # the end of the epoch saves, after the evaluation
            return
        due = self.every > 0 and trainer.global_step % self.every == 0
        asked = trainer.world_size == 1 or trainer.global_step % READ_EVERY == 0
        if self.minutes > 0 and asked and not due:
            # Clocks differ, but all processes must save together, so they wait for each other to agree.
            due = time.monotonic() - self._time >= 60 * self.minutes
            due = trainer.strategy.reduce_boolean_decision(due, all=False)
        if due:
            self._check(trainer, pl_module, images)
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, images: str) -> None:
        assert isinstance(module, HandTraining)
        module.check_losses()
        for name, value in module.named_parameters():
            if not torch.isfinite(value).all():
                raise FloatingPointError(
                    f"weights of {name} are not finite after step {trainer.global_step - 1}{images}; "
                    f"{self.path} stays as it was"
                )

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self._time = time.monotonic()


class KeepBest(pl.Callback):
    """Saves `best.safetensors`, with its scores, after each evaluation with the lowest PA-MPJPE so far.

    The scores are those of the weights before rounding to `TrainConfig.export`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.score = math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, HandTraining)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        logged = trainer.callback_metrics.items()
        scores = {name[5:]: float(value) for name, value in logged if name.startswith("eval/")}
        if not scores["pa_mpjpe"] < self.score:
            return
        self.score = scores["pa_mpjpe"]
        if trainer.is_global_zero:
            held_out: Any = trainer.val_dataloaders
            scores = {"images": float(held_out.sampler.count), **scores}
            export(self.path, pl_module.network, pl_module.config, scores)

    def state_dict(self) -> dict[str, float]:
        return {"score": self.score}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.score = state_dict["score"]


def export(path: Path, network: HandNet, config: Config, scores: dict[str, float] | None = None) -> None:
    """Write a network for `load_checkpoint`, with weights in the type that the configuration names."""
    dtype = torch.float16 if config.train.export == "float16" else torch.float32
    save_checkpoint(path, network, config, scores=scores, dtype=dtype, provenance=provenance())
