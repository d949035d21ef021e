"""Higher derivatives of an op whose kernels give only the first, from a differentiable definition of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def restricted(function: Callable[..., Any], values: list[Any], places: list[int]) -> Callable[..., Any]:
    """`function` of its arguments at `places`, the others being `values`."""

    def of_inputs(*inputs: Tensor) -> Any:
        arguments = list(values)
        for i, value in zip(places, inputs, strict=True):
            arguments[i] = value
        return function(*arguments)

    return of_inputs


def push_forward(function: Callable[..., Any], primals: list[Any], tangents: list[Any]) -> Any:
    """Derivative of `function` along tangents. `torch.func.jvp` cannot run inside a dual level; this can."""
    out, pull = torch.func.vjp(function, *primals)[:2]
    push = torch.func.vjp(pull, tuple(torch.zeros_like(value) for value in out))[1]
    return push(tuple(tangents))[0]
