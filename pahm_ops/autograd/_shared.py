"""Code that the derivatives of all ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pahm_ops import _torch_internals as internals
from pahm_ops.backends import add_to_op

#: Results of `derivative`: no derivative, gradients alone, or anything that needs the op's Autograd key.
NONE, GRADIENT, BY_OP = range(3)


def derivative(*tensors: Tensor | None) -> int:
    """How to differentiate the result of an op on `tensors`: `NONE`, `GRADIENT` or `BY_OP`."""
    if torch.compiler.is_compiling() or internals.functorch_active() or internals.dual_level_open():
        return BY_OP
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return GRADIENT if internals.EVERY_LEVEL else BY_OP
    return NONE


def run(op: Any, *arguments: Any) -> Any:
    """Calls an op's kernel, below its Autograd key."""
    if internals.below_autograd is None:
        return op(*arguments)
    with internals.below_autograd():
        return internals.builtin(op)(*arguments)


def run_at_level(op: Any, *arguments: Any) -> Any:
    """Calls an op from inside its `OpFunction`: its kernel, or the next level of `torch.func`.

    Autograd functions run their forward with both modes off, but a lower level may record its own graph.
    """
    if not internals.functorch_active():
        return run(op, *arguments)
    with torch.enable_grad(), internals.set_forward_mode(True):
        return run(op, *arguments)


class OpFunction(internals.SingleLevelFunction or torch.autograd.Function):  # type: ignore[misc]
    """An autograd function that is an op's Autograd key: `forward`, `setup_context`, `backward`, `jvp`.

    The dispatcher calls it once for each level of `torch.func.grad` and `torch.func.jvp`, as it calls
    PyTorch's own kernels, so it differentiates at that level alone and calls its op below autograd.
    `torch.autograd.Function` would walk the levels a second time. `torch.library.register_autograd` has no
    forward mode (its tangents are silently zero), so it gets `setup_context` and `backward` only if torch
    lacks the internals that this class needs (`_torch_internals.EVERY_LEVEL`).
    """

    @staticmethod
    def flat(*arguments: Any) -> tuple[Any, ...]:
        """An op's arguments in the form that the function takes, with no tensor inside a list."""
        return arguments

    @staticmethod
    def nested(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        """The result of `backward`, with one entry for each argument of the op."""
        return gradients

    @staticmethod
    def results(outputs: Any) -> Any:
        """The result of `forward`, in the form of the op's schema."""
        return outputs

    @staticmethod
    def is_wanted(arguments: Any) -> bool:
        """Whether the result must be differentiable or must be lifted to a level of `torch.func`."""
        return (
            (torch.is_grad_enabled() and internals.any_requires_grad(arguments))
            or internals.dual_level_open()
            or internals.functorch_active()
        )

    @classmethod
    def autograd_kernel(cls, *arguments: Any) -> Any:
        given = cls.flat(*arguments)
        if not cls.is_wanted(given):
            return cls.results(cls.forward(*given))
        with internals.single_level_allowed():
            return cls.results(cls.apply(*given))

    @classmethod
    def _register(cls, name: str) -> None:
        if internals.EVERY_LEVEL:
            _IMPLEMENTATIONS.impl(name, cls.autograd_kernel, "Autograd")
            return

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            cls.setup_context(ctx, cls.flat(*inputs), output)

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            ctx.needs_input_grad = cls.flat(*ctx.needs_input_grad)
            each = [g for grad in grads for g in (grad if isinstance(grad, (list, tuple)) else [grad])]
            return cls.nested(cls.backward(ctx, *each))

        torch.library.register_autograd(f"pahm_ops::{name}", backward, setup_context=setup_context)

    @classmethod
    def register(cls, name: str, fake: Callable[..., Any], vmap: Callable[..., Any]) -> None:
        """Registers the fake kernel, the derivatives and the batching rule for the ops of a function.

        `vmap` is a rule for `torch.library.register_vmap`.
        """

        def add(own: str) -> None:
            torch.library.register_fake(f"pahm_ops::{own}", fake)
            torch.library.register_vmap(f"pahm_ops::{own}", vmap)
            cls._register(own)

        add_to_op(name, add)


_IMPLEMENTATIONS = torch.library.Library("pahm_ops", "IMPL")


def one_by_one(function: Callable[..., Any], count: int, dims: Any, arguments: Any) -> tuple[Any, Any]:
    """The batching rule that always works: call the function for each of `count` entries, stack the results.

    `dims` has the structure of `arguments` and gives each tensor's batched dimension, or None.
    """
    if count == 0:
        raise ValueError("vmap over a dimension of size 0 is supported for the first argument alone")
    entries = (
        [a if d is None else a.select(d, i) for a, d in zip(arguments, dims, strict=True)]
        for i in range(count)
    )
    return torch.stack([function(*entry) for entry in entries]), 0


def merged(tensor: Tensor, dim: int, into: int = 0) -> Tensor:
    """`tensor` with its batched dimension `dim` merged, outermost, into dimension `into` of the entries."""
    return tensor.movedim(dim, into).flatten(into, into + 1)


# Derivatives for an op whose kernels give only the first one, from a differentiable definition of the op.


def restricted(function: Callable[..., Any], values: list[Any], places: list[int]) -> Callable[..., Any]:
    """`function` as a function of its arguments at `places`; the others are fixed to `values`."""

    def of_inputs(*inputs: Tensor) -> Any:
        arguments = list(values)
        for i, value in zip(places, inputs, strict=True):
            arguments[i] = value
        return function(*arguments)

    return of_inputs


def push_forward(function: Callable[..., Any], primals: list[Any], tangents: list[Any]) -> Any:
    """Derivative of `function` along tangents. Unlike `torch.func.jvp`, it can run inside a dual level."""
    out, pull = torch.func.vjp(function, *primals)[:2]
    push = torch.func.vjp(pull, tuple(torch.zeros_like(value) for value in out))[1]
    return push(tuple(tangents))[0]
