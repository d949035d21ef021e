"""A frozen module for inputs of one shape: its steps in order, and where in the workspace each value lies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pahm_ops.frozen.constants import ALIGNMENT, Constants
from pahm_ops.frozen.steps import Buffer, Held, Step, size
from pahm_ops.frozen.tape import Node, Structure, Tape, Value, leaves, map_leaves

Unit = Step | Node


class Program:
    """Runs a tape's units. Call it with tensors of the shapes of the tape's inputs.

    Steps work in one workspace, which the program keeps. PyTorch's calls see its values as tensors, without a
    copy; what they give is copied into the workspace if a step reads it. Results are copied out.
    """

    def __init__(self, tape: Tape, units: Sequence[Unit], constants: Constants) -> None:
        self._tape = tape
        stages = _stages(tape, units)
        order = [unit for stage in stages for unit in stage]
        offsets, count = _layout(tape, order)
        constants.seal()
        self._workspace = torch.zeros(count)
        self._memory = [self._workspace, *constants.memory[1:]]
        self._lock = threading.Lock()
        self._views = {
            value: _view(self._workspace, offset, value)
            for value, offset in offsets.items()
            if isinstance(value, Value)
        }
        self._stages: list[Tensor | Node] = []
        for stage in stages:
            if isinstance(stage[0], Node):
                self._stages += [unit for unit in stage if isinstance(unit, Node)]
            else:
                fields = [constants.lanes]
                for unit in stage:
                    assert isinstance(unit, Step)
                    fields += unit.fields(offsets.__getitem__)
                self._stages.append(torch.tensor(fields))

    def __call__(self, inputs: Sequence[Tensor]) -> Structure:
        run, threads = torch.ops.pahm_ops._frozen_run, torch.get_num_threads()
        with self._lock:
            found: dict[Value, Tensor] = dict(self._views)
            for value, tensor in zip(self._tape.inputs, inputs, strict=True):
                self._define(found, value, tensor)
            for stage in self._stages:
                if isinstance(stage, Tensor):
                    run(self._memory, stage, threads)
                else:
                    self._call(stage, found)
            own = self._workspace.untyped_storage().data_ptr()

            def result(leaf: object) -> object:
                if not isinstance(leaf, Value):
                    return leaf
                tensor = found[leaf]
                return tensor.clone() if tensor.untyped_storage().data_ptr() == own else tensor

            return map_leaves(result, self._tape.outputs)

    def _define(self, found: dict[Value, Tensor], value: Value, tensor: Tensor) -> None:
        if value in self._views:
            self._views[value].copy_(tensor)
        else:
            found[value] = tensor

    def _call(self, node: Node, found: dict[Value, Tensor]) -> None:
        def tensor(leaf: object) -> object:
            return found[leaf] if isinstance(leaf, Value) else leaf

        args, kwargs = map_leaves(tensor, node.args), map_leaves(tensor, node.kwargs)
        if node.op._schema.is_mutable:
            args = (args[0].clone(), *args[1:])
        outputs = node.op(*args, **kwargs)
        for value, result in zip(leaves(node.outputs), leaves(outputs), strict=True):
            self._define(found, value, result)


def _reads(unit: Unit) -> list[Held]:
    return list(unit.values) if isinstance(unit, Node) else unit.reads


def _writes(unit: Unit) -> list[Held]:
    return [leaf for leaf in leaves(unit.outputs)] if isinstance(unit, Node) else [unit.output]


def _stages(tape: Tape, units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in an order in which they can run, with as few changes between steps and nodes as this finds."""
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


def _layout(tape: Tape, order: Sequence[Unit]) -> tuple[dict[Held, int], int]:
    """The offset in floats of each value that a step reads or writes, and the size of the workspace."""
    in_steps: set[Held] = set()
    for unit in order:
        if isinstance(unit, Step):
            in_steps.update([*unit.reads, unit.output, *unit.scratch])
    first = {held: -1 for held in tape.inputs if held in in_steps}
    last: dict[Held, int] = dict(first)
    # A call of PyTorch may give a view of its input, which then lives as long as the view.
    roots: dict[Held, set[Held]] = {}

    def use(held: Held, place: int) -> None:
        for root in (roots.get(held) or set()) | {held}:
            if root in in_steps:
                last[root] = max(last.get(root, -1), place)

    for place, unit in enumerate(order):
        if isinstance(unit, Node) and unit.aliases:
            seen = {root for held in unit.values for root in (roots.get(held) or set()) | {held}}
            for held in _writes(unit):
                roots[held] = seen
        for held in _writes(unit):
            if held in in_steps:
                first.setdefault(held, place)
                last.setdefault(held, place)
        for held in unit.scratch if isinstance(unit, Step) else []:
            first[held] = last[held] = place
        for held in _reads(unit):
            use(held, place)
    for leaf in leaves(tape.outputs):
        if isinstance(leaf, Value):
            use(leaf, len(order))

    offsets: dict[Held, int] = {}
    end = 0
    for held in sorted(first, key=size, reverse=True):
        length = -(-size(held) // ALIGNMENT) * ALIGNMENT
        taken = sorted(
            (offsets[other], offsets[other] + size(other))
            for other in offsets
            if first[other] <= last[held] and first[held] <= last[other]
        )
        offset = 0
        for begin, stop in taken:
            if offset + length <= begin:
                break
            offset = max(offset, -(-stop // ALIGNMENT) * ALIGNMENT)
        offsets[held] = offset
        end = max(end, offset + length)
    return offsets, end


def _view(workspace: Tensor, offset: int, value: Value) -> Tensor:
    """A value as PyTorch sees it: maps lie in the workspace with their channels last."""
    flat = workspace[offset : offset + size(value)]
    if len(value.shape) == 4:
        batch, channels, height, width = value.shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(value.shape)
