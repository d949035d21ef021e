"""A whole training step of a small network, as `HandTraining` makes it."""

from __future__ import annotations

import torch
from small_networks import BASE
from torch import Tensor

from pahm.config import Config
from pahm.data.loading import Batch
from pahm.train.losses import total_loss
from pahm.train.module import HandTraining

SMALL = BASE.override({"train.ema": 0.99})


def random_batch(device: torch.device | str, count: int = 2, size: int = 64, seed: int = 0) -> Batch:
    """What a loader gives for hands half a metre away, without the names of the images."""
    generator = torch.Generator().manual_seed(seed)
    vertices = 0.1 * torch.randn(count, 778, 3, generator=generator) + torch.tensor([0.0, 0.0, 0.5])
    camera = torch.tensor([[size, 0.0, size / 2], [0.0, size, size / 2], [0.0, 0.0, 1.0]])
    batch = {
        "image": torch.randn(count, 3, size, size, generator=generator),
        "vertices": vertices,
        "joints": vertices[:, :21],
        "joints_2d": size * torch.rand(count, 21, 2, generator=generator),
        "K": camera.repeat(count, 1, 1),
        "mask": torch.rand(count, 1, size, size, generator=generator).round(),
    }
    return {name: value.to(device) for name, value in batch.items()}


class TrainingStep:
    """The step of a new network; every instance on one device starts from the same weights."""

    def __init__(self, device: torch.device | str, config: Config = SMALL) -> None:
        torch.manual_seed(0)
        self.module = HandTraining(config).to(device).train()
        self.network = self.module.network

    def loss(self, batch: Batch) -> Tensor:
        prediction = self.network(batch["image"])
        targets = self.module.targets(batch)
        return total_loss(prediction, targets, self.module.faces, self.module.config.loss)[0]

    def gradients(self, batch: Batch) -> Tensor:
        """Sets the gradients of all parameters and gives the loss."""
        self.network.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()
