"""The paper's decoder and network (ResNet-18, 224 x 224), ours against the same on PyTorch's operators.

In PyTorch spiral convolutions are gather + linear, sampling is `grid_sample`, and the pools are gather +
scatter (the reference), a CSR product or a dense product. torch.compile gets the one with CSR products.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from bench_mesh_pool import csr, dense
from torch import Tensor, nn

from pahm.config import preset
from pahm.model import HandNet
from pahm_ops import MeshPool, _library

SIZE = 224


@pytest.fixture(scope="module")
def network() -> HandNet:
    torch.manual_seed(0)
    config = preset("resnet18").override({"model.pretrained": False})
    return HandNet(config.model).to(memory_format=torch.channels_last)


class Product(nn.Module):
    """A pool as PyTorch's product with the pool's matrix, made by a function of bench_mesh_pool."""

    def __init__(self, pool: MeshPool, product: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        matrix = pool(torch.eye(pool.transform.shape[1]))
        self.multiply = product(matrix.to_sparse().coalesce())

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


def on_reference(function: Callable[[], object]) -> Callable[[], object]:
    """`function` with every op in plain PyTorch."""

    def run() -> object:
        loaded, _library.LOADED = _library.LOADED, False
        try:
            return function()
        finally:
            _library.LOADED = loaded

    return run


def with_pools(module: nn.Module, product: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> nn.Module:
    """A copy of a decoder or network, with the same weights, whose pools are products."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MeshPool):
                setattr(parent, name, Product(child, product))
    return module


def training_step(
    module: nn.Module, function: Callable[[], Tensor], inputs: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """The loss and the gradients of all parameters and inputs."""
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, ...]:
        loss = function()
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    return run


def contenders(
    module: nn.Module,
    call: Callable[[Callable[..., object]], tuple[Tensor, ...]],
    loss: Callable[[Callable[..., object]], Tensor],
    inputs: list[Tensor],
    compiled: Callable[[nn.Module], dict[str, nn.Module]],
    training: bool,
) -> dict[str, Callable[[], object]]:
    """Inference or a training step, ours first. `call` and `loss` take the function that runs the module."""

    def timed(owner: nn.Module, function: Callable[..., object]) -> Callable[[], object]:
        if not training:
            return torch.inference_mode()(lambda: call(function))
        return training_step(owner, lambda: loss(function), inputs)

    with_csr, with_dense = with_pools(module, csr), with_pools(module, dense)
    others = {"reference ops": (module, module), "CSR pools": (with_csr, with_csr)}
    others |= {"dense pools": (with_dense, with_dense)}
    others |= {name: (with_csr, function) for name, function in compiled(with_csr).items()}
    return {
        "ours": timed(module, module),
        **{name: on_reference(timed(*pair)) for name, pair in others.items()},
    }


@pytest.mark.parametrize("what", ["inference", "training step"])
@pytest.mark.parametrize("batch", [32, 1])
def bench_decoder(compare, compiled, network, what, batch):
    model = network.config
    decoder = network.decoder.train(what != "inference")
    maps = [
        torch.randn(batch, channels, SIZE // stride, SIZE // stride)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for channels, stride in zip(model.feature_channels, (32, 16, 8, 4), strict=True)
    ]
    joints = 2 * torch.rand(batch, 21, 2) - 1

    def meshes(function: Callable[..., object]) -> tuple[Tensor, ...]:
        return tuple(function(maps, joints)[0])

    def loss(function: Callable[..., object]) -> Tensor:
        return torch.stack([(1e3 * mesh).square().mean() for mesh in meshes(function)]).sum()

    group = contenders(decoder, meshes, loss, maps, compiled, what != "inference")
    # Rounding can move a vertex across a pixel's edge, where the gradient of a bilinear sample jumps.
    tolerance = 1e-3 if what == "inference" else 1e-2
    compare(f"decoder, batch {batch}, {what}", group, tolerance=tolerance)


@pytest.mark.parametrize("what", ["inference", "training step"])
@pytest.mark.parametrize("batch", [8, 1])
def bench_network(compare, compiled, network, what, batch):
    # Normalise by running statistics, because a single image has no spread at the coarsest scale.
    network.eval()
    images = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)

    def meshes(function: Callable[..., object]) -> tuple[Tensor, ...]:
        return tuple(function(images).meshes)

    def loss(function: Callable[..., object]) -> Tensor:
        prediction = function(images)
        parts = [*(1e3 * mesh for mesh in prediction.meshes), prediction.camera]
        parts += [logits for cues in prediction.cues for logits in cues]
        return torch.stack([part.square().mean() for part in parts]).sum()

    group = contenders(network, meshes, loss, [], compiled, what != "inference")
    compare(f"network, batch {batch}, {what}", group, tolerance=1e-2)
