"""Training the network (section 3.4): one call, one folder, on any number of processes."""

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
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.layer_sync import LayerSync
from torch import Tensor
from torch.utils.data import DataLoader

from pahm.config import Config
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.data.loading import Batch, Batches, EvaluationKeys, FolderImages, Images, TrainingKeys, loader
from pahm.data.shards import ShardImages, find_shards
from pahm.hand.topology import HandTopology
from pahm.model.batch_norm import synchronise
from pahm.model.checkpoint import load_checkpoint, save_checkpoint
from pahm.score.evaluation import check_meshes, evaluate, mean_hand
from pahm.train.module import HandTraining, WarmupCosine
from pahm.train.provenance import provenance
from pahm.train.run_folder import LAST, KeepLast, Place, WholeFiles, describe_run, resume_place

__all__ = ["EXPORT", "LAST", "HandTraining", "WarmupCosine", "train"]

EXPORT = "model.safetensors"
LOG = logging.getLogger("pahm")


@contextmanager
def _without_notices() -> Iterator[None]:
    """Lightning's warnings stay; its advertisements and what it says of each device do not."""
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
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
) -> dict[str, float]:
    """Train a network, or go on with a stopped run in the same folder.

    `out` receives `last.ckpt` (everything to go on from; saved after each epoch and within it, see
    `TrainConfig`), TensorBoard's event files, `config.json`, `run.json` (where the data lies, and the run's
    provenance) and, at the end, `model.safetensors` for `load_checkpoint`. A run whose `last.ckpt` exists
    goes on from there, and ends with the bits that it would have had without a stop, on a CPU and with the
    same number of processes.

    Args:
        data: a folder in FreiHAND's layout, or tar shards of `pahm.data.shards.write_shards` (see
            `find_shards`), which have no evaluation images and may be named in several parts.
        topology: another hand than the shipped one (see `HandTopology.from_hand`).
        initial: a checkpoint of the same network whose weights a new run starts from.
        accelerator, devices, strategy: as Lightning's Trainer takes them; `train.batch_size` is divided over
            the devices of all nodes.
        nodes: machines that take part, each started by torchrun or SLURM.
        eval_data: a folder in FreiHAND's layout whose evaluation images are scored, instead of `data`'s.
        strict: an image that cannot be read ends the run, instead of being named and replaced.

    Returns:
        the scores on the evaluation images (see `Evaluation.record`), empty where there are none.

    Raises:
        FileNotFoundError, ValueError: `data` is not in FreiHAND's layout (see `FreiHand`).
        ValueError: `out` holds a run of another configuration, or `initial` a network of another one (the
            first difference is named); a run on other images, a network or images of another hand; a batch
            that cannot be divided; with `strict`, an unreadable image.
        FloatingPointError: the loss is not finite; its images are named.
    """
    parts = [Path(part) for part in ([data] if isinstance(data, str | os.PathLike) else data)]
    out, scored = Path(out), Path(parts[0] if eval_data is None else eval_data)
    place = resume_place(out, config)
    start = place or Place()
    pl.seed_everything(config.train.seed, verbose=False)
    trainer = _trainer(config, out, start, accelerator, devices, nodes, strategy, progress)
    images = _images(parts, config, strict)
    hands = images.vertices(2000)
    known_by = f"{len(images)} images, {hashlib.sha256(hands.tobytes()).hexdigest()}"
    if place is not None and place.images != known_by:
        raise ValueError(
            f"resume: {out / LAST} was made from other training images; use another output folder"
        )
    training = training_loader(config, images, trainer, start)
    trainer.log_every_n_steps = min(20, len(training))  # type: ignore[attr-defined]
    held_out = evaluation_loader(config, scored, trainer)
    module = HandTraining(
        config, topology, load_backbone=place is None and initial is None, strict=strict, images=known_by
    )
    if place is None and initial is not None:
        module.network.load_state_dict(_weights(initial, config, module.network.topology))
    _check_hand(images, module.network.topology, parts[0])
    if held_out is not None:
        check_meshes(FreiHand(scored, "evaluation"), module.network.topology)
    module.network.mean_hand.copy_(mean_hand(hands))
    if trainer.is_global_zero:
        if config.model.cues and config.loss.silhouette and not images.has_masks:
            LOG.warning("data: %s has no masks: silhouettes are not trained", parts[0])
        where = None if eval_data is None else str(scored.resolve())
        describe_run(out, config, [str(part.resolve()) for part in parts], where)
    # What these say is either meant (a run goes on in its folder) or about Lightning's own code.
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
    dtype = torch.float16 if config.train.export == "float16" else torch.float32
    save_checkpoint(out / EXPORT, module.network, config, dtype=dtype, provenance=provenance())
    if held_out is None:
        return {}
    # The scores are those of the weights in the file, rounded as they are.
    network = load_checkpoint(out / EXPORT)
    workers = config.train.workers
    scores = evaluate(
        network,
        scored,
        device=trainer.strategy.root_device,
        batch_size=config.train.batch_size,
        workers=workers,
        progress=progress,
    ).record()
    save_checkpoint(out / EXPORT, network, config, scores=scores, dtype=dtype, provenance=provenance())
    return scores


def _images(parts: Sequence[Path], config: Config, strict: bool) -> Images:
    """The training images of a folder, or of all the tar shards that `parts` name."""
    found = [find_shards(part) for part in parts]
    if all(found):
        return ShardImages([path for paths in found for path in paths], config.train.shuffle_buffer, strict)
    if len(parts) > 1:
        raise ValueError(
            f"data: {parts[found.index([])]} holds no tar shards, expected them in each of several"
        )
    return FolderImages(FreiHand(parts[0], "training"))


def _weights(initial: str | os.PathLike[str], config: Config, topology: HandTopology) -> dict[str, Tensor]:
    """Those of a checkpoint of the same network and hand."""
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

    Raises ValueError for a batch size that cannot be divided over the processes, or is more than the images.
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
    """This process's part of the evaluation images; None where the folder has none or no annotations."""
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


def _check_hand(images: Images, topology: HandTopology, data: Path) -> None:
    """Refuse images whose mesh is another hand's, as FreiHAND's are where `--mano` was forgotten."""
    for index in range(min(len(images), 100)):
        try:
            sample = images[index]
        except (ValueError, FileNotFoundError):
            continue  # the training says what it makes of an unreadable image
        topology.check_joints(sample["vertices"], sample["joints"], f"data: {data}")
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
) -> pl.Trainer:
    train = config.train
    callbacks: list[pl.Callback] = [
        KeepLast(out / LAST, train.save_every, train.save_minutes),
        LearningRateMonitor(),
    ]
    if progress:
        callbacks.append(_ProgressBar())
    plugins: list[Any] = [WholeFiles()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning would save a checkpoint of its own at a signal, and prefer that one to `last.ckpt`.
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
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=out,
        # TensorBoard drops what the stopped run had logged beyond the point that it goes on from.
        logger=TensorBoardLogger(out, name=None, version="tensorboard", purge_step=start.total),
        use_distributed_sampler=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class _ProgressBar(RichProgressBar):
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the end of the name of the logger's folder
        return metrics


class _SynchronisedLayers(LayerSync):
    """Batch normalisation over all processes, where there are several."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        assert isinstance(model, HandTraining)
        if model.trainer.world_size > 1:
            synchronise(model.network, model.trainer.strategy.root_device.type)
        return model

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model
