"""Modules frozen for inference on a CPU.

`freeze` runs a module once for each shape of its inputs and writes down what it computes. Convolutions,
normalisations, activations and sums are fused. With spiral convolutions, pools, samples and attention they
run as one program of compiled kernels, in one workspace, on threads that share small chunks of work. What the
kernels do not know is called in PyTorch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor, nn

from pahm_ops import _library
from pahm_ops import _torch_internals as internals
from pahm_ops.frozen.constants import Constants
from pahm_ops.frozen.lower import lower
from pahm_ops.frozen.program import Program
from pahm_ops.frozen.tape import FreezeError, Structure, record

__all__ = ["FreezeError", "Frozen", "freeze"]

_PROGRAMS = 4  # that a module keeps, for the latest shapes of its inputs
_LANES = [
    4,
    4,
    8,
    16,
    16,
    16,
]  # float32 numbers in a vector of each instruction set, as csrc/cpu/isa.h counts them


class Frozen:
    """What `freeze` gives: call it as the module.

    The inputs are float32 tensors on the CPU. The first call with inputs of a new shape runs the module
    itself, and takes as long as a few calls. Results have no gradients. If two threads call at the same time,
    one waits.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._constants: dict[int, Constants] = {}
        self._programs: OrderedDict[object, Program] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Structure:
        for tensor in inputs:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"a frozen module takes tensors, got {type(tensor).__name__}")
            if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
                raise ValueError(
                    f"a frozen module takes float32 tensors on the CPU, got {tensor.dtype} on {tensor.device}"
                )
        with torch.inference_mode():
            if any(tensor.numel() == 0 for tensor in inputs):
                return self._module(*inputs)
            with self._lock:
                program = self._program(inputs)
            return program(inputs)

    def _program(self, inputs: tuple[Tensor, ...]) -> Program:
        lanes = _LANES[torch.ops.pahm_ops._cpu_isa()]
        key = (lanes, torch.get_num_threads(), *(tuple(tensor.shape) for tensor in inputs))
        if key not in self._programs:
            constants = self._constants.setdefault(lanes, Constants(lanes))
            tape = record(self._module, inputs)
            self._programs[key] = Program(tape, lower(tape, constants), constants)
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]


def freeze(module: nn.Module) -> Frozen:
    """A function that computes what `module` computes in evaluation mode, faster.

    The module must be on the CPU and in evaluation mode. Its parameters must not change afterwards, because
    their values are copied. It takes tensors by position and may return tensors in nested lists, tuples,
    named tuples and dicts. It must do the same whatever the numbers in its inputs are.

    Raises:
        ValueError: the module is in training mode or not on the CPU, or nothing was compiled for this CPU.
        FreezeError: at the first call, if the module reads the numbers of its inputs or overwrites tensors in
            a way that cannot be followed. It is a ValueError.
    """
    if module.training:
        raise ValueError("freeze: expected a module in evaluation mode; call its eval() first")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"freeze: expected a module on the CPU, but {name} is on {tensor.device}")
    if internals.DispatchMode is None:
        raise ValueError(
            "freeze: this torch cannot say which ops a module calls; pahm_ops.backends() says why"
        )
    if not _library.LOADED:
        raise ValueError("freeze: the kernels are not compiled here; pahm_ops.backends() says why")
    return Frozen(module)
