"""The whole network on a GPU, inference and a training step: ours against plain operators (gpu_measure.py).

In plain operators spiral convolutions are gather + linear, sampling is `grid_sample`, and the pools are
gather + scatter or a dense product. torch.compile and TensorRT get the network with dense products. TensorRT
needs torch_tensorrt (`pip install torch-tensorrt`). "compiled" also compiles ours.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_mesh_pool import dense
from bench_model import with_pools
from gpu_measure import Contender, on_path
from torch import Tensor, nn

from pahm.config import Config, preset

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from train_step import TrainingStep, random_batch

pytest_plugins = ["gpu_measure"]

DEVICE = torch.device("cuda", 0)
#: of the largest value: convolutions may use TF32, and bfloat16 has 8 bits
TOLERANCE = {"float32": 1e-2, "bfloat16": 1e-1}

each_preset = pytest.mark.parametrize("name", ["tiny", "resnet18"])
each_precision = pytest.mark.parametrize("precision", TOLERANCE)


@pytest.fixture(params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest) -> str:
    """How ours runs."""
    if request.param == "compiled" and request.config.getoption("--no-compile"):
        pytest.skip("without torch.compile")
    return request.param


def configuration(name: str) -> Config:
    return preset(name).override({"model.pretrained": False})


class Meshes(nn.Module):
    """The network, with a tuple of tensors as its result."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        prediction = self.network(images)
        return *prediction.meshes, prediction.camera


def on_plain_operators(function: Contender) -> Contender:
    return on_path("reference", function)


def tensorrt(module: nn.Module, images: Tensor, precision: str) -> dict[str, Contender]:
    """`{"TensorRT": module built by TensorRT}`, or an empty dict where torch_tensorrt is not installed."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        return {}
    import torch_tensorrt

    precisions = {torch.float32, getattr(torch, precision)}
    built: list[Any] = []

    def run() -> tuple[Tensor, ...]:
        if not built:
            options = {"arg_inputs": [images], "enabled_precisions": precisions}
            built.append(torch_tensorrt.compile(module, ir="dynamo", **options))
        return tuple(built[0](images))

    return {"TensorRT": run}


@each_precision
@pytest.mark.parametrize("batch", [8, 1])
@each_preset
def bench_inference_on_gpu(compare_on_gpu, compiled, name, batch, precision, engine):
    config = configuration(name)
    step, plain = (TrainingStep(DEVICE, config).network.eval() for _ in range(2))
    with DEVICE:
        modules = {"ours": Meshes(step), "plain": Meshes(plain), "dense": Meshes(with_pools(plain, dense))}
    images = random_batch(DEVICE, batch, config.model.image_size)["image"]
    for module in modules.values():
        module.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    def timed(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Contender:
        def run() -> tuple[Tensor, ...]:
            # Not inference mode, whose tensors torch_tensorrt refuses.
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, precision == "bfloat16"):
                return function(images)

        return run

    others = {
        "plain operators": timed(modules["plain"]),
        "dense pools": timed(modules["dense"]),
        **{other: timed(function) for other, function in compiled(modules["dense"]).items()},
        **tensorrt(modules["dense"], images, precision),
    }
    ours = modules["ours"] if engine == "eager" else torch.compile(modules["ours"], fullgraph=True)
    compare_on_gpu(
        f"network {name} inference {precision} batch {batch}",
        engine,
        {"ours": timed(ours), **{other: on_plain_operators(f) for other, f in others.items()}},
        tolerance=TOLERANCE[precision],
        paths=engine == "eager",
    )


@each_precision
@each_preset
def bench_training_step_on_gpu(compare_on_gpu, compiled, name, precision, engine, batch=32):
    """The loss, the gradients and the optimiser's step, whose learning rate of 0 leaves the weights alone."""
    config = configuration(name)
    examples = random_batch(DEVICE, batch, config.model.image_size)

    def timed(step: TrainingStep, loss: Callable[..., Tensor] | None = None) -> Contender:
        step.network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(step.network.parameters(), lr=0.0, fused=True)
        step.loss = loss or step.loss  # type: ignore[method-assign]

        def run() -> tuple[Tensor, ...]:
            with torch.autocast(DEVICE.type, torch.bfloat16, precision == "bfloat16"):
                loss = step.gradients(examples)
            optimizer.step()
            return (loss,)

        return run

    def with_dense_pools() -> TrainingStep:
        step = TrainingStep(DEVICE, config)
        with DEVICE:
            step.network = with_pools(step.network, dense)
        return step

    step, to_compile = TrainingStep(DEVICE, config), with_dense_pools()
    others = {
        "plain operators": timed(TrainingStep(DEVICE, config)),
        "dense pools": timed(with_dense_pools()),
        **{other: timed(to_compile, function) for other, function in compiled(to_compile.loss).items()},
    }
    ours = timed(step, torch.compile(step.loss, fullgraph=True) if engine == "compiled" else None)
    compare_on_gpu(
        f"network {name} training step {precision} batch {batch}",
        engine,
        {"ours": ours, **{other: on_plain_operators(f) for other, f in others.items()}},
        tolerance=TOLERANCE[precision],
        paths=engine == "eager",
    )
