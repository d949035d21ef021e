"""A whole training step on a GPU: without a wait for the device, captured in one CUDA graph, compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_cases import DEVICE, capture, warm_up
from torch import Tensor
from train_step import TrainingStep, random_batch

from pahm.data.loading import Batch

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

#: Float32 in other orders, or by another convolution algorithm: of the loss, after a few steps.
TOLERANCE = 1e-3


def batches(count: int) -> list[Batch]:
    return [random_batch(DEVICE, seed=seed) for seed in range(count)]


class WholeStep(TrainingStep):
    """With an optimiser whose step can be captured. Weights and their averages change in place."""

    def __init__(self) -> None:
        super().__init__(DEVICE)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=True, capturable=True)

    def run(self, batch: Batch) -> Tensor:
        loss = self.gradients(batch)
        self.optimizer.step()
        return loss

    def start_again(self, weights: dict[str, Tensor]) -> None:
        """Sets the weights, and the optimiser's memory to none, in the same memory."""
        self.network.load_state_dict(weights)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def test_nothing_in_a_step_waits_for_the_device(path):
    step, (batch,) = WholeStep(), batches(1)
    step.run(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_trains_as_the_step_does(path):
    several = batches(4)
    eager, captured = WholeStep(), WholeStep()
    weights = copy.deepcopy(captured.network.state_dict())
    expected = [float(eager.run(batch)) for batch in several]

    place = {name: value.clone() for name, value in several[0].items()}
    warm_up(lambda: captured.run(place))
    replay, (loss,) = capture(lambda: [captured.run(place)])
    captured.start_again(weights)
    found = []
    for batch in several:
        for name, value in batch.items():
            place[name].copy_(value)
        replay()
        found.append(float(loss))
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_step_trains_as_the_step_does(path, mode):
    torch._dynamo.reset()
    several = batches(3)
    eager, compiled = WholeStep(), WholeStep()
    compiled.loss = torch.compile(compiled.loss, fullgraph=True, mode=mode)
    expected = [float(eager.run(batch)) for batch in several]
    found = []
    for batch in several:
        torch.compiler.cudagraph_mark_step_begin()
        found.append(float(compiled.run(batch)))
    assert found == pytest.approx(expected, rel=TOLERANCE)
