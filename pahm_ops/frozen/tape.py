"""What a module computes from its inputs, written down while it runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pahm_ops import _torch_internals as internals

Structure = Any
"""Tensors or `Value`s in nested lists, tuples, named tuples and dicts."""


class FreezeError(ValueError):
    """A module cannot be frozen; the message says why."""


@dataclass(eq=False)
class Value:
    """A tensor that depends on the inputs."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    producer: Node | None
    users: list[Node] = field(default_factory=list)
    is_output: bool = False

    @property
    def sole_user(self) -> Node | None:
        """The only node that reads this, once, or None."""
        return self.users[0] if len(self.users) == 1 and not self.is_output else None


@dataclass(eq=False)
class Node:
    """One call of an op. In its arguments `Value`s stand for tensors that depend on the inputs."""

    op: Any
    args: tuple[Structure, ...]
    kwargs: dict[str, Structure]
    outputs: Structure = None
    gave_views: bool = False
    """Whether outputs shared memory with inputs when this was recorded. Not all schemas say so."""

    def argument(self, place: int, default: Any = None) -> Any:
        """A positional argument; the dispatcher leaves out those that have their default."""
        return self.args[place] if len(self.args) > place else default

    @property
    def values(self) -> list[Value]:
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @property
    def aliases(self) -> bool:
        """Whether the outputs may be views of the inputs."""
        return self.gave_views or any(r.alias_info is not None for r in self.op._schema.returns)


@dataclass(eq=False)
class Tape:
    inputs: list[Value]
    nodes: list[Node]
    outputs: Structure
    """What the module returned, with `Value`s for tensors that depend on the inputs."""


def leaves(structure: Structure) -> Iterator[Any]:
    if isinstance(structure, (list, tuple)):
        for part in structure:
            yield from leaves(part)
    elif isinstance(structure, Mapping):
        yield from leaves(list(structure.values()))
    else:
        yield structure


def map_leaves(function: Callable[[Any], Any], structure: Structure) -> Structure:
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(map_leaves(function, part) for part in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(map_leaves(function, part) for part in structure)
    if isinstance(structure, dict):
        return {key: map_leaves(function, part) for key, part in structure.items()}
    return function(structure)


def record(module: Callable[..., Structure], inputs: Sequence[Tensor]) -> Tape:
    """Run `module` on `inputs` without gradients and write down its ops.

    Raises FreezeError for a module whose course depends on the numbers in its inputs.
    """
    with torch.inference_mode():
        recorder = _Recorder(inputs)
        with _Guard(recorder), recorder:
            outputs = module(*inputs)
    return recorder.tape(outputs)


def _reading(what: object) -> FreezeError:
    return FreezeError(f"the module reads numbers of its inputs ({what}), so its course may change")


class _Guard(TorchFunctionMode):
    """Refuses what reads a tensor's numbers without an op, so that the recorder does not see it."""

    _READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._READERS and id(args[0]) in self._recorder.values:
            raise _reading(func.__name__)
        return func(*args, **(kwargs or {}))


class _Recorder(internals.DispatchMode or object):  # type: ignore[misc]
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.count = 0
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []  # so that no id and no memory is used twice
        self.sharing: dict[int, set[int]] = {}  # ids of the tensors that share memory
        self.inputs = [self._define(tensor, None) for tensor in inputs]

    def tape(self, outputs: Structure) -> Tape:
        found = map_leaves(self._lookup, outputs)
        for leaf in leaves(found):
            if isinstance(leaf, Value):
                leaf.is_output = True
            elif not isinstance(leaf, (Tensor, int, float, str, type(None))):
                raise FreezeError(
                    f"the module returns a {type(leaf).__name__}; "
                    "expected tensors in lists, tuples, named tuples and dicts"
                )
        return Tape(self.inputs, self.nodes, found)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        node = Node(func, map_leaves(self._lookup, args), map_leaves(self._lookup, kwargs))
        outputs = func(*args, **kwargs)
        if not node.values:
            return outputs
        if func._schema.is_mutable:
            self._check_in_place(node, args, outputs)
        elif isinstance(outputs, Tensor) and any(outputs is leaf for leaf in leaves(args)):
            return outputs  # a conversion that had nothing to do
        if _reads_numbers(node) or not all(isinstance(leaf, Tensor) for leaf in leaves(outputs)):
            raise _reading(func)
        given = {
            leaf.untyped_storage().data_ptr() for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        node.gave_views = any(leaf.untyped_storage().data_ptr() in given for leaf in leaves(outputs))
        node.outputs = map_leaves(lambda tensor: self._define(tensor, node), outputs)
        for value in node.values:
            value.users.append(node)
        self.nodes.append(node)
        return outputs

    def _lookup(self, leaf: Any) -> Any:
        return self.values.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

    def _define(self, tensor: Tensor, producer: Node | None) -> Value:
        value = Value(self.count, tuple(tensor.shape), tensor.dtype, producer)
        self.count += 1
        self.values[id(tensor)] = value
        self.alive.append(tensor)
        self.sharing.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
        return value

    def _check_in_place(self, node: Node, args: tuple[Any, ...], outputs: Any) -> None:
        """That the node only overwrites its first argument, which no other tensor shares memory with."""
        if outputs is args[0] and isinstance(node.args[0], Value):
            shared = self.sharing[outputs.untyped_storage().data_ptr()]
            if shared == {id(outputs)}:
                return
        raise FreezeError(f"the module overwrites a tensor in a way that cannot be followed ({node.op})")


def _reads_numbers(node: Node) -> bool:
    """Whether the shape of what the node gives, or what the module does with it, depends on numbers."""
    if node.op is torch.ops.aten.index.Tensor:
        return any(
            isinstance(leaf, Value) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in leaves(node.args[1])
        )
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(node.op.tags))
