"""The PyTorch Lightning module that trains the network: targets, losses, logs, scores and optimisers."""

from __future__ import annotations

import copy
import json
import logging
import math
from itertools import chain
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pahm.config import Config
from pahm.data.loading import Batch, seed_step
from pahm.hand.topology import HandTopology
from pahm.infer.reconstruct import see
from pahm.model.build import build_network
from pahm.model.network import HandNet
from pahm.score.metrics import HandMetrics
from pahm.train.layers import use_training_layers
from pahm.train.losses import Targets, total_loss
from pahm.train.provenance import provenance

LOG = logging.getLogger("pahm")

READ_EVERY = 20
"""Steps between reads of values from the device. Each read makes the host wait for the device."""


class HandTraining(pl.LightningModule):
    """The network, its losses and its optimiser. Logs every loss and the scores on the evaluation images.

    load_backbone: see `build_network`. strict: an unreadable image ends the run with ValueError.
    images: identifies the training images; stored in the checkpoint (see `pahm.train.run_folder.Place`).

    With `TrainConfig.ema`, `average` is a second network with the moving average of the weights. It replaces
    `network` during an evaluation.
    """

    faces: Tensor
    average: HandNet | None

    def __init__(
        self,
        config: Config,
        topology: HandTopology | None = None,
        load_backbone: bool = True,
        strict: bool = False,
        images: str = "",
    ) -> None:
        super().__init__()
        self.images = images
        self.config = config
        self.strict = strict
        self.network = build_network(config, topology, load_backbone)
        if not config.model.cues:
            _freeze_unreached(self.network)
        if config.train.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network).requires_grad_(False) if config.train.ema else None
        self.register_buffer("faces", torch.as_tensor(self.network.faces), persistent=False)
        hierarchy = self.network.topology.hierarchy
        for i, level in enumerate(reversed(range(len(hierarchy.vertices)))):
            self.register_buffer(
                f"selection_{i}", torch.as_tensor(hierarchy.selection(level)), persistent=False
            )
        self.levels = len(hierarchy.vertices)
        self.metrics = HandMetrics()
        self._evaluated: list[tuple[list[str], tuple[Tensor, Tensor, Tensor, Tensor]]] = []
        self._unreadable: set[str] = set()
        self._replaced = 0
        self._unchecked: list[tuple[int, list[str], dict[str, Tensor]]] = []

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            use_training_layers(self.network)

    def targets(self, batch: Batch) -> Targets:
        """Convert a batch of `CropTransform` samples to the targets of the losses."""
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
            joints=joints - root,
            joints_2d=_normalise(batch["joints_2d"], size),
            mask=blank if mask is None else mask,
            has_mask=has_mask,
        )

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        seed_step(self.config.train.seed, self.global_step, self.global_rank)
        self._replaced += sum(batch["replaced"])
        self._name_unreadable(batch, "the next image takes its place")

    def _name_unreadable(self, batch: Batch, instead: str) -> None:
        sentences = batch.get("unreadable", [])
        if self.strict and self._in_any_process(bool(sentences)):
            raise ValueError(self._of_all_processes(sentences)[0])
        for sentence in sentences:
            if sentence not in self._unreadable:
                self._unreadable.add(sentence)
                LOG.warning("%s; %s", sentence, instead)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images = batch["image"]
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        prediction = self.network(images)
        loss, parts = total_loss(prediction, self.targets(batch), self.faces, self.config.loss)
        # Reducing spreads a loss that is not finite to all processes, so they stop together.
        values = torch.stack([loss, *parts.values()]).detach()
        if self.trainer.world_size > 1:
            # `strategy.reduce` would start with a barrier, where the host waits for the device.
            torch.distributed.all_reduce(values)
            values = values / self.trainer.world_size
        losses = dict(zip(["loss", *parts], values.unbind(), strict=True))
        self._unchecked.append((self.global_step, batch["name"], losses))
        if len(self._unchecked) == READ_EVERY:
            self.check_losses()
        self.log("loss", losses["loss"])
        self.log_dict({f"train/{name}": losses[name] for name in parts})
        return loss

    def check_losses(self) -> None:
        """Raise FloatingPointError for the first step since the last call whose losses are not finite.

        Called every `READ_EVERY` steps and before anything is saved or evaluated.
        """
        steps, self._unchecked = self._unchecked, []
        if not steps:
            return
        rows = torch.stack([torch.stack([*losses.values()]) for *_, losses in steps]).tolist()
        for (step, names, losses), row in zip(steps, rows, strict=True):
            if not all(map(math.isfinite, row)):
                parts = [f"{name} {value:.3g}" for name, value in zip(losses, row, strict=True)]
                images = ", ".join(self._of_all_processes(names))
                raise FloatingPointError(
                    f"the loss is {row[0]} at step {step}, images {images}: {', '.join(parts[1:])}"
                )

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        super().optimizer_step(*arguments, **keywords)
        if self.average is not None:
            # Early steps have more weight. The very first step replaces the random weights entirely.
            decay = min(self.config.train.ema, self.global_step / (self.global_step + 10))
            # `AveragedModel` (and Lightning's) would wait for the device in every step and average indices.
            get_ema_multi_avg_fn(decay)(_floating(self.average), _floating(self.network), torch.empty(0))

    def on_validation_start(self) -> None:
        self._swap_average()

    def on_validation_end(self) -> None:
        self._swap_average()

    def _swap_average(self) -> None:
        if self.average is not None:
            self.network, self.average = self.average, self.network

    def _of_all_processes(self, items: list[str]) -> list[str]:
        """The items of all processes, in the order of their ranks."""
        parts: list[Any] = [items]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def on_train_epoch_end(self) -> None:
        replaced, self._replaced = self._replaced_everywhere(), 0
        if replaced and self.trainer.is_global_zero:
            LOG.warning("epoch %d: %d unreadable images were replaced", self.current_epoch, replaced)

    def _replaced_everywhere(self) -> int:
        """The number of images replaced in this epoch so far, over all processes."""
        replaced = torch.tensor(float(self._replaced), device=self.device)
        if self.trainer.world_size > 1:
            replaced = self.trainer.strategy.reduce(replaced, reduce_op="sum")
        return int(replaced)

    def validation_step(self, batch: Batch, index: int) -> None:
        self._name_unreadable(batch, "in the scores the mean hand stands for it")
        if not batch:
            return
        seen = see(self.network, batch["image"], batch["K"])
        # As in `pahm.score.evaluation`.
        replaced = torch.tensor(batch["replaced"], device=self.device)[:, None, None]
        with torch.autocast(self.device.type, enabled=False):
            mean_joints = self.network.joints(self.network.mean_hand)
        vertices = torch.where(replaced, self.network.mean_hand, seen.vertices)
        joints = torch.where(replaced, mean_joints, seen.joints)
        # Score at the end, since reading the numbers here would make a GPU wait at each step.
        self._evaluated.append((batch["name"], (joints, batch["joints"], vertices, batch["vertices"])))

    @staticmethod
    def _broken(names: list[str], vertices: Tensor) -> list[str]:
        """The names of the meshes that are not finite."""
        finite = vertices.isfinite().flatten(1).all(1).tolist()
        return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]

    def _in_any_process(self, found: bool) -> bool:
        return bool(self.trainer.strategy.reduce_boolean_decision(found, all=False))

    def on_validation_epoch_end(self) -> None:
        evaluated, self._evaluated = self._evaluated, []
        names = [name for names, (_, _, vertices, _) in evaluated for name in self._broken(names, vertices)]
        if self._in_any_process(bool(names)):
            raise FloatingPointError(
                f"evaluation after step {self.global_step - 1}: meshes are not finite in this process or "
                f"another, images {', '.join(names)}"
            )
        for _, points in evaluated:
            self.metrics.update(*points)
        scores = {name: float(value) for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        # The metric is already summed over the processes; sync_dist tells Lightning so.
        self.log_dict({f"eval/{name}": value for name, value in scores.items()}, sync_dist=True)
        self.log("pa_mpjpe", scores["pa_mpjpe"], prog_bar=True, logger=False, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fit: Any = self.trainer.fit_loop
        step = fit.epoch_loop.batch_progress.current.processed
        checkpoint["pahm_config"] = self.config.to_json()
        checkpoint["pahm_images"] = self.images
        checkpoint["pahm_provenance"] = json.dumps(provenance())
        # The epoch, and the step within it, at which a resumed run starts.
        checkpoint["pahm_place"] = [
            fit.epoch_progress.current.processed,
            step if step < self.trainer.num_training_batches else 0,
        ]
        checkpoint["pahm_replaced"] = self._replaced_everywhere()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._replaced = checkpoint["pahm_replaced"] if self.trainer.is_global_zero else 0

    def configure_optimizers(self) -> Any:
        train = self.config.train
        # One pass over all parameters. With it, Lightning cannot clip gradients under mixed precision.
        fused = train.precision == "32-true" or not train.gradient_clip
        options: dict[str, Any] = {"lr": train.learning_rate, "fused": fused}
        if train.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.network.parameters(), weight_decay=train.weight_decay, **options
            )
        else:
            # Vectors (biases, normalisations) and the vertex embedding have no weight decay.
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


def _freeze_unreached(network: HandNet) -> None:
    """Freeze the parameters that no output depends on.

    A backbone like HRNet computes its maps together. If a network reads only some of them, distributed
    training would wait for gradients that never arrive.
    """
    size = network.config.image_size
    prediction = network.eval()(torch.zeros(1, 3, size, size))
    cues = [logits for pair in prediction.cues for logits in pair]
    outputs = [*prediction.meshes, prediction.camera, *cues, *prediction.joints]
    torch.stack([output.sum() for output in outputs]).sum().backward()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    network.zero_grad()
    network.train()


def _floating(network: HandNet) -> list[Tensor]:
    """The parameters and buffers that can be averaged, in the same order for every copy of a network."""
    tensors = chain(network.parameters(), network.buffers())
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


class WarmupCosine:
    """Learning rate factor: linear over the first 5 % of `steps`, then half a cosine down to 0."""

    def __init__(self, steps: int) -> None:
        self.steps = max(steps, 1)
        self.warmup = max(1, self.steps // 20)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _normalise(pixels: Tensor, size: int) -> Tensor:
    """Convert crop pixels, measured from the centre of the top-left pixel, to coordinates with -1 and 1 at
    the crop's outer edges.
    """
    return (2 * pixels + 1) / size - 1
