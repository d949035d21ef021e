"""Training and scoring the network with PyTorch Lightning (section 3.4)."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from pahm.config import Config, from_json
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.evaluation import evaluate, mean_hand
from pahm.hand.topology import HandTopology
from pahm.losses import Targets, total_loss
from pahm.metrics import HandMetrics
from pahm.model.checkpoint import build_network, check_same_network, load_checkpoint, save_checkpoint

Batch = dict[str, Tensor]
LAST = "last.ckpt"
EXPORT = "model.safetensors"


class HandTraining(pl.LightningModule):
    """The network, its losses and its optimiser; logs every loss, and the scores on the evaluation images."""

    faces: Tensor

    def __init__(
        self, config: Config, topology: HandTopology | None = None, load_backbone: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(config, topology, load_backbone)
        if config.train.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.register_buffer("faces", torch.as_tensor(self.network.faces), persistent=False)
        hierarchy = self.network.topology.hierarchy
        for i, level in enumerate(reversed(range(len(hierarchy.vertices)))):
            self.register_buffer(
                f"selection_{i}", torch.as_tensor(hierarchy.selection(level)), persistent=False
            )
        self.levels = len(hierarchy.vertices)
        self.metrics = HandMetrics()

    def targets(self, batch: Batch) -> Targets:
        """The truth of a batch of `CropTransform` samples, in the form that the losses take."""
        vertices, joints = batch["vertices"], batch["joints"]
        size = self.config.model.image_size
        root = joints[:, self.config.model.root_joint, None]
        projected = torch.einsum("bij,bnj->bni", batch["K"], vertices)
        vertices_2d = _normalise(projected[..., :2] / projected[..., 2:], size)
        selections = [self.get_buffer(f"selection_{i}") for i in range(self.levels)]
        mask = batch.get("mask")
        blank = torch.zeros(len(vertices), 1, size, size, device=vertices.device)
        has_mask = torch.full((len(vertices),), mask is not None, device=vertices.device)
        return Targets(
            meshes=[(vertices - root).index_select(1, s) for s in selections],
            vertices_2d=[vertices_2d.index_select(1, s) for s in selections],
            joints_2d=_normalise(batch["joints_2d"], size),
            mask=blank if mask is None else mask,
            has_mask=has_mask,
        )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images = batch["image"]
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        prediction = self.network(images)
        loss, parts = total_loss(prediction, self.targets(batch), self.faces, self.config.loss)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.global_step}, images {batch['index'].tolist()}: "
                + ", ".join(f"{name} {value.item():.3g}" for name, value in parts.items())
            )
        self.log("loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        vertices = self.network(batch["image"]).meshes[-1]
        self.metrics.update(self.network.joints(vertices), batch["joints"], vertices, batch["vertices"])

    def on_validation_epoch_end(self) -> None:
        scores = {name: float(value) for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        # The metric has already added up over the processes; sync_dist says so to Lightning.
        self.log_dict({f"eval/{name}": value for name, value in scores.items()}, sync_dist=True)
        self.log("pa_mpjpe", scores["pa_mpjpe"], prog_bar=True, logger=False, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pahm_config"] = self.config.to_json()

    def configure_optimizers(self) -> Any:
        train = self.config.train
        # One pass over all parameters; Lightning cannot clip gradients for it under mixed precision.
        options: dict[str, Any] = {"lr": train.learning_rate, "fused": train.precision == "32-true"}
        if train.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.network.parameters(), weight_decay=train.weight_decay, **options
            )
        else:
            # Vectors (biases, normalisations) and the vertex embedding are not decayed.
            decayed = [p for n, p in self.network.named_parameters() if p.dim() > 1 and "embedding" not in n]
            kept = [p for n, p in self.network.named_parameters() if p.dim() <= 1 or "embedding" in n]
            groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, weight_decay=train.weight_decay, **options)
        steps = int(self.trainer.estimated_stepping_batches)
        if train.schedule == "step":
            scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(
                optimizer, list(train.milestones), train.decay
            )
            interval = "epoch"
        else:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(steps))
            interval = "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class WarmupCosine:
    """Factor of the learning rate: linear over the first 5 % of `steps`, then half a cosine down to 0."""

    def __init__(self, steps: int) -> None:
        self.steps = max(steps, 1)
        self.warmup = max(1, self.steps // 20)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _normalise(pixels: Tensor, size: int) -> Tensor:
    """Pixels of a crop, from the centre of its top-left pixel, to coordinates with -1 and 1 at its outer
    edges.
    """
    return (2 * pixels + 1) / size - 1


def loaders(
    config: Config, data: str | os.PathLike[str], devices: int = 1
) -> tuple[DataLoader, DataLoader | None]:
    """Training images, augmented and shuffled; and evaluation images where the folder has their annotations.

    Raises FileNotFoundError or ValueError for a folder that is not FreiHAND's layout (see `FreiHand`), and
    ValueError for a batch that cannot be split over the devices.
    """
    train, size = config.train, config.model.image_size
    if train.batch_size % devices:
        raise ValueError(
            f"train.batch_size: {train.batch_size} images cannot be split over {devices} devices"
        )
    images = FreiHand(data, "training", CropTransform(size, config.augment))
    if len(images) < train.batch_size:
        raise ValueError(
            f"train.batch_size: {data} has {len(images)} images, expected at least {train.batch_size}"
        )
    generator = torch.Generator().manual_seed(train.seed)
    training = DataLoader(
        images,
        train.batch_size // devices,
        shuffle=True,
        drop_last=True,
        generator=generator,
        num_workers=train.workers,
        persistent_workers=train.workers > 0,
    )
    held_out = evaluation_loader(data, size, train.batch_size, train.workers)
    return training, held_out


def evaluation_loader(
    data: str | os.PathLike[str], size: int, batch_size: int = 64, workers: int = 2
) -> DataLoader | None:
    """The evaluation images, not augmented, in order; None where the folder has none or no annotations."""
    if not any((Path(data) / "evaluation" / "rgb").glob("*.jpg")):
        return None
    dataset = FreiHand(data, "evaluation", CropTransform(size))
    if not dataset.annotated:
        return None
    return DataLoader(dataset, batch_size, num_workers=workers, persistent_workers=workers > 0)


def train(
    config: Config,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    topology: HandTopology | None = None,
    initial: str | os.PathLike[str] | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    progress: bool = True,
) -> dict[str, float]:
    """Train a network, or go on with a stopped run in the same folder.

    `out` receives `last.ckpt` (everything to go on from, after each epoch), TensorBoard's event files,
    `config.json` and, at the end, `model.safetensors` for `load_checkpoint`. A run whose `last.ckpt` exists
    goes on after the last finished epoch.

    Args:
        data: a folder in FreiHAND's layout.
        topology: another hand than the shipped one (see `HandTopology.from_hand`).
        initial: a checkpoint of the same network whose weights a new run starts from.
        accelerator, devices, strategy: as Lightning's Trainer takes them; `train.batch_size` is divided over
            the devices.

    Returns:
        the scores on the evaluation images (see `Evaluation.record`), empty where there are none.

    Raises:
        ValueError: `out` holds a run of another configuration, or `initial` a network of another one (the
            first difference is named).
    """
    out = Path(out)
    last = out / LAST
    if last.exists():
        _check_resumable(last, config)
    pl.seed_everything(config.train.seed, workers=True, verbose=False)
    count = devices if isinstance(devices, int) and devices > 0 else 1
    training, held_out = loaders(config, data, count)
    fresh = not last.exists()
    module = HandTraining(config, topology, load_backbone=fresh and initial is None)
    if fresh and initial is not None:
        module.network.load_state_dict(load_checkpoint(initial, expect=config).state_dict())
    module.network.mean_hand.copy_(mean_hand(FreiHand(data, "training")))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    callbacks: list[pl.Callback] = [
        ModelCheckpoint(out, filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
        LearningRateMonitor(),
    ]
    if progress:
        callbacks.append(RichProgressBar())
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=config.train.precision,
        max_epochs=config.train.epochs,
        gradient_clip_val=config.train.gradient_clip or None,
        callbacks=callbacks,
        logger=TensorBoardLogger(out, name=None, version="tensorboard"),
        enable_progress_bar=progress,
        enable_model_summary=False,
        log_every_n_steps=20,
        num_sanity_val_steps=0,
    )
    # What these say is either meant (a run goes on in its folder) or about Lightning's own code.
    for message in ("Checkpoint directory .* exists", "`isinstance.treespec, LeafSpec.` is deprecated"):
        warnings.filterwarnings("ignore", message)
    trainer.fit(module, training, held_out, ckpt_path=None if fresh else str(last), weights_only=True)
    if not trainer.is_global_zero:
        return {}
    dtype = torch.float16 if config.train.export == "float16" else torch.float32
    save_checkpoint(out / EXPORT, module.network, config, dtype=dtype)
    if held_out is None:
        return {}
    # The scores are those of the weights in the file, rounded as they are.
    network = load_checkpoint(out / EXPORT)
    workers = config.train.workers
    scores = evaluate(
        network, data, batch_size=config.train.batch_size, workers=workers, progress=progress
    ).record()
    save_checkpoint(out / EXPORT, network, config, scores=scores, dtype=dtype)
    return scores


def _check_resumable(last: Path, config: Config) -> None:
    """Raise ValueError where `last` was made by another configuration or is not a checkpoint of `train`."""
    try:
        stored = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["pahm_config"]
    except Exception as error:
        raise ValueError(f"resume: {last} is not a checkpoint of pahm train ({error})") from error
    found = from_json(stored)
    check_same_network(found, config, str(last))
    for part in ("loss", "train", "augment"):
        for name, value in vars(getattr(config, part)).items():
            before = getattr(getattr(found, part), name)
            if before != value and name not in ("workers", "export"):
                raise ValueError(
                    f"resume: {last} was made with {part}.{name} = {before!r}, now {value!r}; "
                    "use another output folder or the same configuration"
                )
