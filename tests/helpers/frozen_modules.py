"""Small modules to freeze, and a comparison with the same module in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pahm_ops.frozen import Frozen, freeze
from pahm_ops.frozen.constants import Constants
from pahm_ops.frozen.lower import lower
from pahm_ops.frozen.steps import Step
from pahm_ops.frozen.tape import record


class Through(nn.Module):
    """A function of layers and inputs as a module in evaluation mode. Its normalisations do something."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for layer in self.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
                for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
                    if tensor.is_floating_point():
                        tensor.data.uniform_(0.5, 1.5) if "var" in name else tensor.data.normal_()
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*self.layers, *inputs)


def units(module: nn.Module, *inputs: Tensor) -> list[str]:
    """The kinds of the steps that the kernels do, and the ops that PyTorch does, in order.

    A convolution is a product, in whichever way it is computed.
    """
    found = lower(record(module, inputs), Constants(16))
    names = [unit.kind if isinstance(unit, Step) else str(unit.op) for unit in found]
    return ["product" if name == "winograd" else name for name in names]


def compare(module: nn.Module, *inputs: Tensor, tolerance: float = 3e-6) -> Frozen:
    """Two calls of the frozen module against float64; the second has other numbers.

    tolerance: of the largest absolute value.
    """
    frozen, exact = freeze(module), copy.deepcopy(module).double()
    for given in (inputs, [tensor.roll(1, -1) for tensor in inputs]):
        with torch.no_grad():
            expected = exact(*tree_map(torch.Tensor.double, list(given)))
        found = frozen(*given)
        assert type(found) is type(expected)
        for ours, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            theirs = theirs.detach()
            scale = 1 + float(theirs.nan_to_num().abs().max())
            torch.testing.assert_close(
                ours.detach().double(), theirs.double(), rtol=0, atol=tolerance * scale, equal_nan=True
            )
    return frozen
