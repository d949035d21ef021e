"""What a training step needs to be captured in a CUDA graph and compiled, as far as no GPU is needed."""

import sys
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import TrainingStep, random_batch

from pahm.train.module import HandTraining
from pahm_ops import _library


class OnOneDevice(TorchDispatchMode):
    """Refuses ops between this kind of device and another: a copy makes the host wait."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.ops: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        kinds = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        assert self.kind not in kinds or len(kinds) == 1, f"{op} has tensors on {kinds}"
        self.ops.add(op.__name__.split(".")[0])
        return out


@pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled")
def test_a_step_looks_at_no_value(monkeypatch):
    """On the meta device there are none: asking for one, or for a shape that depends on one, is an error."""
    backends = sys.modules["pahm_ops.backends"]
    monkeypatch.setattr(backends, "GPUS", (*backends.GPUS, "meta"))
    monkeypatch.setattr(backends, "_CHOSEN", {})
    monkeypatch.setattr(backends, "available", lambda path, device: path == "cuda")
    # PyTorch's optimisers have steps for a capture themselves; here is what comes after one.
    monkeypatch.setattr(LightningModule, "optimizer_step", lambda self: None)
    monkeypatch.setattr(HandTraining, "global_step", 5)
    step, batch = TrainingStep("meta"), random_batch("meta")
    with OnOneDevice("meta") as seen:
        step.gradients(batch)
        step.module.optimizer_step()
    assert {"spiral_conv", "_spiral_conv_weight_grad", "_vertex_sample_backward", "mesh_pool"} <= seen.ops
    assert all(parameter.grad is not None for parameter in step.network.parameters())


def test_targets_and_losses_compile_to_one_graph():
    """tests/pahm/model/test_network.py does this for the network."""
    step, batch = TrainingStep("cpu"), random_batch("cpu")
    prediction = step.network(batch["image"])
    step.network.forward = lambda images: prediction
    found = torch.compile(step.loss, fullgraph=True, backend="eager")(batch)
    torch.testing.assert_close(found, step.loss(batch))


@pytest.mark.slow
def test_a_step_compiles_to_one_graph_and_its_gradients():
    eager, compiled, batch = TrainingStep("cpu"), TrainingStep("cpu"), random_batch("cpu")
    expected = eager.gradients(batch)
    compiled.loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled.gradients(batch), expected, rtol=1e-5, atol=0)
    pairs = zip(compiled.network.parameters(), eager.network.parameters(), strict=True)
    for found, wanted in pairs:
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-3 * scale + 1e-7)
