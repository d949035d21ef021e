"""The paper's decoder and network (ResNet-18, 224 x 224), ours against the same on the reference ops."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pahm.config import preset
from pahm.model import HandNet
from pahm_ops import _library

SIZE = 224


@pytest.fixture(scope="module")
def network() -> HandNet:
    torch.manual_seed(0)
    config = preset("resnet18").override({"model.pretrained": False})
    return HandNet(config.model).to(memory_format=torch.channels_last)


def on_reference(function: Callable[[], object]) -> Callable[[], object]:
    """`function` with every op served by plain PyTorch."""

    def run() -> object:
        loaded, _library.LOADED = _library.LOADED, False
        try:
            return function()
        finally:
            _library.LOADED = loaded

    return run


def training_step(
    module: torch.nn.Module, function: Callable[[], Tensor], inputs: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """The loss and the gradients of all parameters and inputs."""
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, ...]:
        loss = function()
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    return run


@pytest.mark.parametrize("what", ["inference", "training step"])
@pytest.mark.parametrize("batch", [32, 1])
def bench_decoder(compare, network, what, batch):
    model = network.config
    decoder = network.decoder.train(what != "inference")
    maps = [
        torch.randn(batch, channels, SIZE // stride, SIZE // stride)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for channels, stride in zip(model.feature_channels, (32, 16, 8, 4), strict=True)
    ]
    joints = 2 * torch.rand(batch, 21, 2) - 1

    def meshes() -> tuple[Tensor, ...]:
        return tuple(decoder(maps, joints)[0])

    def loss() -> Tensor:
        return torch.stack([(1e3 * mesh).square().mean() for mesh in meshes()]).sum()

    ours = torch.no_grad()(meshes) if what == "inference" else training_step(decoder, loss, maps)
    contenders = {"ours": ours, "reference ops": on_reference(ours)}
    compare(f"decoder, batch {batch}, {what}", contenders, tolerance=1e-3)


@pytest.mark.parametrize("what", ["inference", "training step"])
@pytest.mark.parametrize("batch", [8, 1])
def bench_network(compare, network, what, batch):
    # Normalisation by running statistics: one image has no spread of its own at the coarsest scale.
    network.eval()
    images = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def meshes() -> tuple[Tensor, ...]:
        return tuple(network(images).meshes)

    def loss() -> Tensor:
        prediction = network(images)
        parts = [*(1e3 * mesh for mesh in prediction.meshes), prediction.camera]
        parts += [logits for cues in prediction.cues for logits in cues]
        return torch.stack([part.square().mean() for part in parts]).sum()

    ours = torch.no_grad()(meshes) if what == "inference" else training_step(network, loss, [])
    contenders = {"ours": ours, "reference ops": on_reference(ours)}
    compare(f"network, batch {batch}, {what}", contenders, tolerance=1e-2)
