"""Trains the network (section 3.4): one call and one folder, on any number of processes."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, RichProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.layer_sync import LayerSync
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.utils.data import DataLoader

from pahm.config import Config
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.data.loading import Batch, Batches, EvaluationKeys, FolderImages, Images, TrainingKeys, loader
from pahm.data.shards import ShardImages, find_shards
from pahm.hand.topology import HandTopology
from pahm.model.checkpoint import load_checkpoint
from pahm.score.evaluation import check_meshes, evaluate, mean_hand, print_scores
from pahm.train.module import READ_EVERY, HandTraining, WarmupCosine
from pahm.train.run_folder import (
    BEST,
    EXPORT,
    LAST,
    KeepBest,
    KeepLast,
    Place,
    WholeFiles,
    describe_run,
    export,
    resume_place,
)

__all__ = ["BEST", "EXPORT", "LAST", "HandTraining", "WarmupCosine", "train"]

LOG = logging.getLogger("pahm")


@contextmanager
def _without_notices() -> Iterator[None]:
    """Silence Lightning's advertisements and its notices about each device, but keep its warnings."""
    log = logging.getLogger("pytorch_lightning")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


@_without_notices()
def train(
    config: Config,
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Images,
    out: str | os.PathLike[str],
    *,
    topology: HandTopology | None = None,
    initial: str | os.PathLike[str] | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    progress: bool = True,
    nodes: int = 1,
    eval_data: str | os.PathLike[str] | None = None,
    strict: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> dict[str, float]:
    """Train a network, or resume an interrupted run in the same folder.

    `out` receives `last.ckpt` (everything needed to resume; saved after each epoch and within it, see
    `TrainConfig`), `best.safetensors` (the network of the epoch with the lowest PA-MPJPE), TensorBoard's
    event files, `config.json`, `run.json` (the data's location and the run's provenance) and, at the end,
    `model.safetensors` (the network after the last epoch). `load_checkpoint` reads either network. If
    `last.ckpt` exists, the run resumes from it. On a CPU, with the same number of processes, the result is
    bit for bit that of an uninterrupted run.

    Args:
        data: a folder in FreiHAND's layout; or tar shards of `pahm.data.shards.write_shards` (see
            `find_shards`), in one place or several; or your own images, as `Images` describes.
        topology: a hand other than the shipped one (see `HandTopology.from_hand`).
        initial: a checkpoint of the same network. A new run starts from its weights.
        accelerator, devices, strategy: as in Lightning's Trainer. `train.batch_size` is divided over the
            devices of all nodes.
        nodes: number of participating machines, each started by torchrun or SLURM.
        eval_data: a folder in FreiHAND's layout whose evaluation images are scored. The default is `data`, if
            that is a folder.
        progress: show a progress bar, and at the end the table of scores that `pahm eval` prints.
        strict: an unreadable image ends the run instead of being named and replaced.
        callbacks: your own Lightning callbacks. `EarlyStopping` and `ModelCheckpoint` can monitor the scores
            of each evaluation, logged as `eval/pa_mpjpe`, `eval/pa_mpvpe` and so on.
        loggers: Lightning loggers in addition to TensorBoard's, e.g. `WandbLogger()`.

    Returns:
        the scores on the evaluation images (see `Evaluation.record`), empty if there are none.

    Raises:
        FileNotFoundError, ValueError: `data` is not in FreiHAND's layout (see `FreiHand`).
        ValueError: `out` holds a run with another configuration, or `initial` a network with another one (the
            first difference is named); `out` holds a run on other images; a network or images have another
            hand; a batch cannot be divided; with `strict`, an unreadable image.
        FloatingPointError: the loss is not finite; its images are named.
    """
    out = Path(out)
    place = resume_place(out, config)
    start = place or Place()
    pl.seed_everything(config.train.seed, verbose=False)
    trainer = _trainer(
        config, out, start, accelerator, devices, nodes, strategy, progress, callbacks, loggers
    )
    if isinstance(data, Images):
        images, parts, source = data, [], type(data).__name__
    else:
        parts = [Path(part) for part in ([data] if isinstance(data, str | os.PathLike) else data)]
        images, source = _images(parts, config, strict), str(parts[0])
    scored = Path(eval_data) if eval_data is not None else parts[0] if parts else None
    hands = images.vertices(2000)
    known_by = f"{len(images)} images, {hashlib.sha256(hands.tobytes()).hexdigest()}"
    if place is not None and place.images != known_by:
        raise ValueError(
            f"resume: {out / LAST} was made from other training images; use another output folder"
        )
    training = training_loader(config, images, trainer, start)
    trainer.log_every_n_steps = min(READ_EVERY, len(training))  # type: ignore[attr-defined]
    held_out = None if scored is None else evaluation_loader(config, scored, trainer)
    module = HandTraining(
        config, topology, load_backbone=place is None and initial is None, strict=strict, images=known_by
    )
    if place is None and initial is not None:
        module.network.load_state_dict(_weights(initial, config, module.network.topology))
    _check_hand(images, module.network.topology, source)
    if held_out is not None:
        assert scored is not None
        check_meshes(FreiHand(scored, "evaluation"), module.network.topology)
    module.network.mean_hand.copy_(mean_hand(hands))
    if trainer.is_global_zero:
        if config.model.cues and config.loss.silhouette and not images.has_masks:
            LOG.warning("data: %s has no masks: silhouettes are not trained", source)
        where = None if eval_data is None else str(Path(eval_data).resolve())
        describe_run(out, config, [str(part.resolve()) for part in parts], where)
    # These warn about intended behaviour (a run resumes in its folder) or about Lightning's own code.
    for message in (
        "Checkpoint directory .* exists",
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "You're resuming from a checkpoint that ended before the epoch ended",
    ):
        warnings.filterwarnings("ignore", message)
    last = None if place is None else str(out / LAST)
    trainer.fit(module, training, held_out, ckpt_path=last, weights_only=True)
    if not trainer.is_global_zero:
        return {}
    export(out / EXPORT, module.average or module.network, config)
    if held_out is None:
        return {}
    assert scored is not None
    # Score the rounded weights in the file.
    network = load_checkpoint(out / EXPORT)
    result = evaluate(
        network,
        scored,
        device=trainer.strategy.root_device,
        batch_size=config.train.batch_size,
        workers=config.train.workers,
        progress=progress,
    )
    export(out / EXPORT, network, config, result.record())
    if progress:
        print_scores(result)
    return result.record()


def _images(parts: Sequence[Path], config: Config, strict: bool) -> Images:
    """The training images of a folder, or of all tar shards that `parts` name."""
    found = [find_shards(part) for part in parts]
    if all(found):
        return ShardImages([path for paths in found for path in paths], config.train.shuffle_buffer, strict)
    if len(parts) > 1:
        raise ValueError(
            f"data: {parts[found.index([])]} holds no tar shards, expected them in each of several"
        )
    return FolderImages(FreiHand(parts[0], "training"))


def _weights(initial: str | os.PathLike[str], config: Config, topology: HandTopology) -> dict[str, Tensor]:
    """The weights of a checkpoint of the same network and hand."""
    network = load_checkpoint(initial, expect=config)
    found, expected = (t.to_arrays() for t in (network.topology, topology))
    same = found.keys() == expected.keys() and all(
        found[name].shape == value.shape and np.allclose(found[name], value, atol=1e-6)
        for name, value in expected.items()
    )
    if not same:
        raise ValueError(
            f"init: {os.fspath(initial)} is a network of another hand, whose vertices do not correspond "
            "(MANO's comes with --mano)"
        )
    return network.state_dict()


def training_loader(config: Config, images: Images, trainer: pl.Trainer, start: Place) -> DataLoader[Batch]:
    """This process's part of the training batches, augmented.

    Raises ValueError for a batch size that the processes cannot share, or that exceeds the number of images.
    """
    train, processes = config.train, trainer.world_size
    if train.batch_size % processes:
        raise ValueError(
            f"train.batch_size: {train.batch_size} images cannot be split over {processes} devices"
        )
    if len(images) < train.batch_size:
        raise ValueError(
            f"train.batch_size: the data has {len(images)} images, expected at least {train.batch_size}"
        )
    keys = TrainingKeys(
        images,
        train.seed,
        train.batch_size,
        processes,
        lambda: trainer.global_rank,
        start=(start.epoch, start.step),
    )
    transform = CropTransform(config.model.image_size, config.augment, train.seed, config.model.crop)
    return loader(Batches(images, transform), keys, train.workers, _pins(trainer))


def evaluation_loader(config: Config, data: Path, trainer: pl.Trainer) -> DataLoader[Batch] | None:
    """This process's part of the evaluation images; None if the folder has no annotated ones."""
    if not any((data / "evaluation" / "rgb").glob("*.jpg")):
        return None
    dataset = FreiHand(data, "evaluation")
    if not dataset.annotated:
        return None
    size = config.train.batch_size
    keys = EvaluationKeys(len(dataset), size, trainer.world_size, lambda: trainer.global_rank)
    transform = CropTransform(config.model.image_size, share=config.model.crop)
    images = FolderImages(dataset)
    batches = Batches(images, transform, instead=images.black)
    return loader(batches, keys, config.train.workers, _pins(trainer))


def _pins(trainer: pl.Trainer) -> bool:
    return bool(trainer.strategy.root_device.type == "cuda")


def _check_hand(images: Images, topology: HandTopology, source: str) -> None:
    """Reject images with another hand's mesh, such as FreiHAND's if `--mano` was forgotten."""
    for index in range(min(len(images), 100)):
        try:
            sample = images[index]
        except (ValueError, FileNotFoundError):
            continue  # training handles unreadable images
        topology.check_joints(sample["vertices"], sample["joints"], f"data: {source}")
        return


def _trainer(
    config: Config,
    out: Path,
    start: Place,
    accelerator: str,
    devices: int | str,
    nodes: int,
    strategy: str,
    progress: bool,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> pl.Trainer:
    train = config.train
    ours: list[pl.Callback] = [
        KeepLast(out / LAST, train.save_every, train.save_minutes),
        KeepBest(out / BEST),
        LearningRateMonitor(),
    ]
    if progress:
        ours.append(_ProgressBar())
    plugins: list[Any] = [WholeFiles()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # On a signal, Lightning would save its own checkpoint and prefer it to `last.ckpt`.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    if train.sync_batchnorm:
        plugins.append(_SynchronisedLayers())
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=train.precision,
        max_epochs=train.epochs,
        gradient_clip_val=train.gradient_clip or None,
        callbacks=[*ours, *callbacks],
        plugins=plugins,
        default_root_dir=out,
        # TensorBoard drops what the interrupted run logged after the point at which it resumes.
        logger=[TensorBoardLogger(out, name=None, version="tensorboard", purge_step=start.total), *loggers],
        use_distributed_sampler=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class _ProgressBar(RichProgressBar):
    """Shows the loss every `READ_EVERY` steps. Lightning's own bar reads it from the device in each step."""

    def __init__(self) -> None:
        super().__init__()
        self._loss: dict[str, float] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        if not self._loss or trainer.global_step % READ_EVERY == 0:
            logged = trainer.callback_metrics
            self._loss = {"loss": float(logged["loss"])} if "loss" in logged else {}
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the end of the logger's folder name
        return self._loss | metrics


class _SynchronisedLayers(LayerSync):
    """Batch normalisation over the GPUs of all processes. PyTorch's kernels for it only take GPU tensors.

    The conversion is timm's. PyTorch's own, which Lightning uses, drops the activation of timm's layers.
    """

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        assert isinstance(model, HandTraining)
        if model.trainer.world_size > 1 and model.trainer.strategy.root_device.type == "cuda":
            convert_sync_batchnorm(model.network)
        return model

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model
