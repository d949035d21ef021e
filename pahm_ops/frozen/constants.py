"""Weights and tables of a frozen module, in the layout that the kernels read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # elements: a cache line of float32


class Place(NamedTuple):
    """A tensor by its number in the memory of a program, and an offset in its elements."""

    tensor: int
    offset: int


class Constants:
    """Constants of all programs of a module.

    Each call of `seal` ends a tensor of each type. Later constants go to new tensors, so that the memory of a
    program never moves.

    lanes: float32 numbers in a vector of the CPU's kernels.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.memory: list[Tensor] = [torch.empty(0)]  # the first is the workspace, each program's own
        self._places: dict[Hashable, Place] = {}
        self._open: dict[torch.dtype, tuple[int, list[Tensor], int]] = {}
        self._kept: list[Tensor] = []

    def add(self, tensor: Tensor) -> Place:
        """A float32 or int32 tensor, as it is."""
        dtype = torch.int32 if tensor.dtype == torch.int32 else torch.float32
        flat = tensor.to(dtype).reshape(-1)
        if dtype not in self._open:
            self._open[dtype] = (len(self.memory), [], 0)
            self.memory.append(torch.empty(0, dtype=dtype))
        number, parts, size = self._open[dtype]
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % ALIGNMENT))
        parts.append(padded)
        self._open[dtype] = (number, parts, size + len(padded))
        return Place(number, size)

    def table(self, rows: Tensor) -> Place:
        """An int32 table. Equal tables are kept once."""
        key = ("table", tuple(rows.shape), rows.numpy().tobytes())
        return self._once(key, rows)

    def vector(self, tensor: Tensor) -> Place:
        """A float32 vector of a module, kept once."""
        return self._once(("vector", self._name(tensor)), tensor)

    def zeros(self, count: int) -> Place:
        size = -(-count // 1024) * 1024
        return self._once(("zeros", size), torch.zeros(size))

    def product(
        self, key: Sequence[Tensor | str | None], weight: Tensor, bias: Tensor | None
    ) -> tuple[Place, Place]:
        """A weight `(outputs, inputs)` and its bias, in panels of outputs.

        Panels are two vectors wide, the last one or two. key: the module's tensors that they were made of.
        """
        name = ("product", *map(self._name, key))
        offset_name = ("bias", *name)
        if name not in self._places:
            outputs = len(weight)
            count = -(-outputs // self.lanes) * self.lanes
            padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, count - outputs))
            width = 2 * self.lanes
            panels = [padded[i : i + width].t().reshape(-1) for i in range(0, count, width)]
            self._places[name] = self.add(torch.cat(panels))
            offset = torch.zeros(count)
            if bias is not None:
                offset[:outputs] = bias
            self._places[offset_name] = self.add(offset)
        return self._places[name], self._places[offset_name]

    def seal(self) -> None:
        for number, parts, _ in self._open.values():
            self.memory[number] = torch.cat(parts)
        self._open.clear()

    def _once(self, key: Hashable, tensor: Tensor) -> Place:
        if key not in self._places:
            self._places[key] = self.add(tensor)
        return self._places[key]

    def _name(self, tensor: Tensor | str | None) -> Hashable:
        """What tells a tensor from others: its memory, which is kept, and how it reads it."""
        if not isinstance(tensor, Tensor):
            return tensor
        self._kept.append(tensor)
        return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
