"""A frozen module for inputs of one shape: its steps in order, and where in the workspace each value lies."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pahm_ops.frozen.constants import ALIGNMENT, Constants
from pahm_ops.frozen.steps import Held, Step, size
from pahm_ops.frozen.tape import Node, Structure, Tape, Value, leaves, map_leaves

Unit = Step | Node


class _Call:
    """A call of PyTorch, with its values looked up by number."""

    def __init__(self, node: Node) -> None:
        # A value may lie in memory in another way than when it was recorded.
        view = node.op is torch.ops.aten.view.default
        self._op = torch.ops.aten.reshape.default if view else node.op
        self._kwargs = node.kwargs
        self._args = list(node.args)
        self._copies = node.op._schema.is_mutable
        self._places = [(i, arg.index) for i, arg in enumerate(node.args) if isinstance(arg, Value)]
        named = any(isinstance(leaf, Value) for leaf in leaves(node.kwargs))
        self._nested = named or any(
            isinstance(leaf, Value) for arg in node.args if not isinstance(arg, Value) for leaf in leaves(arg)
        )
        self.outputs: list[Value] = list(leaves(node.outputs))

    def __call__(self, found: list[Tensor]) -> list[Tensor]:
        args, kwargs = list(self._args), self._kwargs
        for place, index in self._places:
            args[place] = found[index]
        if self._nested:
            args, kwargs = map_leaves(
                lambda leaf: found[leaf.index] if isinstance(leaf, Value) else leaf, (args, kwargs)
            )
        if self._copies:
            args[0] = args[0].clone()
        outputs = self._op(*args, **kwargs)
        return [outputs] if isinstance(outputs, Tensor) else list(leaves(outputs))


class Program:
    """Runs a tape's units. Call it with tensors of the shapes of the tape's inputs.

    Steps work in one workspace, which the program keeps. PyTorch's calls see its values as tensors, without a
    copy; what they give is copied into the workspace if a step reads it. Results are copied out. numpy makes
    the copies: after a loop of PyTorch its idle threads keep the cores busy for a while.
    """

    def __init__(self, tape: Tape, units: Sequence[Unit], constants: Constants) -> None:
        self._inputs, self._outputs = tape.inputs, tape.outputs
        stages = _stages(tape, units)
        layout = _Layout(tape, [unit for stage in stages for unit in stage])
        constants.seal()
        workspace = torch.zeros(layout.size)
        self._memory = [workspace, *constants.memory[1:]]
        self._lock = threading.Lock()
        self._views: dict[int, Tensor] = {
            value.index: _view(workspace, offset, value)
            for value, offset in layout.offsets.items()
            if isinstance(value, Value)
        }
        self._arrays = {index: view.numpy() for index, view in self._views.items()}
        values = [*tape.inputs, *(value for unit in units for value in _values(unit))]
        self._count = 1 + max(value.index for value in values)
        self._borrowed = {leaf for leaf in leaves(tape.outputs) if layout.lies_in_workspace(leaf)}
        self._stages: list[Tensor | list[_Call]] = []
        for stage in stages:
            calls = [_Call(unit) for unit in stage if isinstance(unit, Node)]
            fields = [constants.lanes]
            for unit in stage:
                if isinstance(unit, Step):
                    fields += unit.fields(layout.offsets.__getitem__)
            self._stages.append(calls or torch.tensor(fields))

    def __call__(self, inputs: Sequence[Tensor]) -> Structure:
        run, threads = torch.ops.pahm_ops._frozen_run.default, torch.get_num_threads()
        with self._lock:
            found: list[Any] = [None] * self._count
            for index, view in self._views.items():
                found[index] = view
            for value, tensor in zip(self._inputs, inputs, strict=True):
                self._define(found, value, tensor)
            for stage in self._stages:
                if isinstance(stage, Tensor):
                    run(self._memory, stage, threads)
                    continue
                for call in stage:
                    for value, tensor in zip(call.outputs, call(found), strict=True):
                        self._define(found, value, tensor)

            def result(leaf: Any) -> Any:
                if not isinstance(leaf, Value):
                    return leaf
                tensor = found[leaf.index]
                return torch.from_numpy(tensor.numpy().copy("K")) if leaf in self._borrowed else tensor

            return map_leaves(result, self._outputs)

    def _define(self, found: list[Any], value: Value, tensor: Tensor) -> None:
        array = self._arrays.get(value.index)
        if array is None:
            found[value.index] = tensor
        else:
            np.copyto(array, tensor.detach().numpy())


def _values(unit: Unit) -> list[Value]:
    held = [*_reads(unit), *_writes(unit)]
    return [part for part in held if isinstance(part, Value)]


def _reads(unit: Unit) -> list[Held]:
    return list(unit.values if isinstance(unit, Node) else unit.reads)


def _writes(unit: Unit) -> list[Held]:
    return list(leaves(unit.outputs)) if isinstance(unit, Node) else [unit.output]


def _stages(tape: Tape, units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in an order in which they can run, with few changes between steps and nodes."""
    known: set[Held] = set(tape.inputs)
    waiting = list(units)
    stages: list[list[Unit]] = []
    while waiting:
        before = len(waiting)
        for kind in (Step, Node):
            stage, left = [], []
            for unit in waiting:
                if isinstance(unit, kind) and all(held in known for held in _reads(unit)):
                    stage.append(unit)
                    known.update(_writes(unit))
                else:
                    left.append(unit)
            waiting = left
            if stage:
                stages.append(stage)
        assert len(waiting) < before, "a unit waits for what no unit gives"
    return stages


class _Layout:
    """Where in the workspace each value lies that a step reads or writes; offsets in floats.

    Values that are needed at the same time lie apart.
    """

    def __init__(self, tape: Tape, order: Sequence[Unit]) -> None:
        self._in_steps: set[Held] = set()
        for unit in order:
            if isinstance(unit, Step):
                self._in_steps.update([*unit.reads, unit.output, *unit.scratch])
        # A call of PyTorch may give a view of its input, which then lives as long as the view.
        self._roots: dict[Held, set[Held]] = {}
        for unit in order:
            if isinstance(unit, Node) and unit.aliases:
                seen = set().union(*(self._seen_through(value) for value in unit.values))
                self._roots.update({held: seen for held in _writes(unit)})
        first: dict[Held, int] = {held: -1 for held in tape.inputs if held in self._in_steps}
        last: dict[Held, int] = dict(first)
        for place, unit in enumerate(order):
            for held in [*_writes(unit), *(unit.scratch if isinstance(unit, Step) else [])]:
                if held in self._in_steps:
                    first[held] = last[held] = place
            for held in _reads(unit):
                last.update({root: place for root in self._seen_through(held) & self._in_steps})
        for leaf in leaves(tape.outputs):
            if isinstance(leaf, Value):
                last.update({root: len(order) for root in self._seen_through(leaf) & self._in_steps})
        self.offsets: dict[Held, int] = {}
        self.size = 0
        self._place(first, last)

    def lies_in_workspace(self, leaf: object) -> bool:
        """Whether a result is a tensor that the next call overwrites."""
        return isinstance(leaf, Value) and bool(self._seen_through(leaf) & self._in_steps)

    def _seen_through(self, held: Held) -> set[Held]:
        """A value and those that it may be a view of."""
        return self._roots.get(held, set()) | {held}

    def _place(self, first: dict[Held, int], last: dict[Held, int]) -> None:
        """The largest first, each as low as it fits."""
        for held in sorted(first, key=size, reverse=True):
            length = _aligned(size(held))
            taken = sorted(
                (self.offsets[other], self.offsets[other] + _aligned(size(other)))
                for other in self.offsets
                if first[other] <= last[held] and first[held] <= last[other]
            )
            offset = 0
            for begin, stop in taken:
                if offset + length <= begin:
                    break
                offset = max(offset, stop)
            self.offsets[held] = offset
            self.size = max(self.size, offset + length)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _view(workspace: Tensor, offset: int, value: Value) -> Tensor:
    """A value as PyTorch sees it: maps lie in the workspace with their channels last."""
    flat = workspace[offset : offset + size(value)]
    if len(value.shape) == 4:
        batch, channels, height, width = value.shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(value.shape)
