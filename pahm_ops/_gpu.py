"""The ops' kernels for GPUs: prepared tables, a path (`_paths`), and what serves there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pahm_ops import _library, _paths, _tables

_ops = torch.ops.pahm_ops

#: as csrc/kernels/vertex_sample.cuh has it
MOST_MAPS = 16


def _kernel(
    op: str, name: str, dtype: torch.dtype, device: torch.device, columns: int = _paths.THIN
) -> Callable[..., Any]:
    """What computes `name`, one of the functions of `op`."""
    path = _paths.choose(op, dtype, device, columns)
    if path == "cuda":
        return getattr(_ops, f"{name}_cuda")
    if path == "reference":
        raise NotImplementedError(f"pahm_ops::{name} has no kernel for {device} here: call pahm_ops.{op}")
    function = getattr(importlib.import_module(f"pahm_ops.triton.{op}"), name)
    if op != "spiral_conv":
        return function
    tf32 = dtype == torch.float32 and _paths.tf32_allowed()
    return lambda *arguments: function(*arguments, tf32=tf32)


def mesh_pool(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor, *transpose: Tensor) -> Tensor:
    if x.numel() == 0 or row_pointers.shape[0] == 1:
        return x.new_zeros(x.shape[0], row_pointers.shape[0] - 1, x.shape[2])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrix = _tables.rows(row_pointers, columns, values, x.shape[1], dtype)
    return _kernel("mesh_pool", "mesh_pool", x.dtype, x.device)(x.contiguous(), *matrix)


def spiral_conv(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, activation: int = 0
) -> Tensor:
    batch, (rows, _), columns = x.shape[0], indices.shape, weight.shape[0]
    tables = _tables.spirals(indices, x.shape[1])
    if batch * rows * columns == 0:
        return x.new_empty(batch, rows, columns)
    if x.shape[2] == 0:  # A sum of nothing: as if of one channel that is zero.
        x, weight = x.new_zeros(*x.shape[:2], 1), weight.new_zeros(columns, indices.shape[1])
    run = _kernel("spiral_conv", "spiral_conv", x.dtype, x.device, columns)
    offset = None if bias is None else bias.contiguous()
    return run(x.contiguous(), tables.table, weight.contiguous(), offset, activation)


def spiral_conv_input_grad(grad: Tensor, indices: Tensor, weight: Tensor, vertices: int) -> Tensor:
    tables = _tables.spirals(indices, vertices)
    channels = weight.shape[1] // indices.shape[1]
    if grad.numel() == 0 or vertices * channels == 0:
        return grad.new_zeros(grad.shape[0], vertices, channels)
    run = _kernel("spiral_conv", "spiral_conv_input_grad", grad.dtype, grad.device, channels)
    return run(grad.contiguous(), tables.t_pointers, tables.t_rows, weight.contiguous(), vertices)


def spiral_conv_weight_grad(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    tables = _tables.spirals(indices, x.shape[1])
    columns, width = grad.shape[2], indices.shape[1] * x.shape[2]
    if grad.numel() == 0 or width == 0:
        return grad.new_zeros(columns, width)
    run = _kernel("spiral_conv", "spiral_conv_weight_grad", grad.dtype, grad.device, columns)
    return run(grad.contiguous(), x.contiguous(), tables.table)


def vertex_sample(features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any) -> Tensor:
    first = features[0]
    if len(features) > MOST_MAPS:
        raise ValueError(f"features must be at most {MOST_MAPS} maps on a GPU, got {len(features)}")
    return _kernel("vertex_sample", "vertex_sample", first.dtype, first.device)(
        features, vertices, camera, *options
    )


def vertex_sample_backward(
    grad: Tensor, features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    run = _kernel("vertex_sample", "vertex_sample_backward", grad.dtype, grad.device)
    return run(grad, features, vertices, camera, *options)


for _function in (
    mesh_pool,
    spiral_conv,
    spiral_conv_input_grad,
    spiral_conv_weight_grad,
    vertex_sample,
    vertex_sample_backward,
):
    _library.register_gpu(_function.__name__, _function, [kind.upper() for kind in _paths.GPUS])
