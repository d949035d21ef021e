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


# What memory safety needs, as the CPU's kernels check it. Meaning is checked in the op's own file, which also
# words it for people.


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_fits(first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None:
            _check(tensor.device == first.device, f"{name} must be on {first.device}, got {tensor.device}")
            _check(tensor.dtype == first.dtype, f"{name} must be {first.dtype}, got {tensor.dtype}")


def _check_table(name: str, table: Tensor, dims: int, device: torch.device) -> None:
    _check(table.device == device, f"{name} must be on {device}, got {table.device}")
    fits = table.dtype == torch.int64 and table.dim() == dims
    _check(fits, f"{name} must be int64 of rank {dims}, got {table.dtype} of shape {tuple(table.shape)}")


def mesh_pool(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor, *transpose: Tensor) -> Tensor:
    _check(x.dim() == 3, "x must be (B, N, C)")
    _check_table("row_pointers", row_pointers, 1, x.device)
    _check_table("columns", columns, 1, x.device)
    _check(values.device == x.device and values.shape == columns.shape, "values must be one a column index")
    _check(len(row_pointers) > 0, "row_pointers must have one number more than there are rows, got none")
    if x.numel() == 0 or len(row_pointers) == 1:
        return x.new_zeros(x.shape[0], len(row_pointers) - 1, x.shape[2])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrix = _tables.rows(row_pointers, columns, values, x.shape[1], dtype)
    return _kernel("mesh_pool", "mesh_pool", x.dtype, x.device)(x.contiguous(), *matrix)


def spiral_conv(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, activation: int = 0
) -> Tensor:
    _check_table("indices", indices, 2, x.device)
    _check_fits(x, weight=weight, bias=bias)
    _check(x.dim() == 3 and weight.dim() == 2, "x must be (B, N, C) and weight (Cout, L * C)")
    (batch, vertices, channels), (rows, length), columns = x.shape, indices.shape, weight.shape[0]
    _check(length > 0 and weight.shape[1] == length * channels, "weight must be (Cout, L * C)")
    _check(bias is None or tuple(bias.shape) == (columns,), "bias must be (Cout,)")
    _check(0 <= activation < 4, f"activation must be 0, 1, 2 or 3, got {activation}")
    tables = _tables.spirals(indices, vertices)
    if batch * rows * columns == 0:
        return x.new_empty(batch, rows, columns)
    if channels == 0:  # A sum of nothing: as if of one channel that is zero.
        x, weight = x.new_zeros(batch, vertices, 1), weight.new_zeros(columns, length)
    run = _kernel("spiral_conv", "spiral_conv", x.dtype, x.device, columns)
    offset = None if bias is None else bias.contiguous()
    return run(x.contiguous(), tables.table, weight.contiguous(), offset, activation)


def spiral_conv_input_grad(grad: Tensor, indices: Tensor, weight: Tensor, vertices: int) -> Tensor:
    _check_table("indices", indices, 2, grad.device)
    _check_fits(grad, weight=weight)
    (rows, length), (columns, width) = indices.shape, weight.shape
    _check(length > 0 and width % length == 0, "weight must be (Cout, L * C)")
    _check(grad.dim() == 3 and tuple(grad.shape[1:]) == (rows, columns), "grad must be (B, M, Cout)")
    tables, channels = _tables.spirals(indices, vertices), width // length
    if grad.numel() == 0 or vertices * channels == 0:
        return grad.new_zeros(grad.shape[0], vertices, channels)
    run = _kernel("spiral_conv", "spiral_conv_input_grad", grad.dtype, grad.device, channels)
    return run(grad.contiguous(), tables.t_pointers, tables.t_rows, weight.contiguous(), vertices)


def spiral_conv_weight_grad(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    _check_table("indices", indices, 2, grad.device)
    _check_fits(grad, x=x)
    _check(grad.dim() == 3 and x.dim() == 3, "grad must be (B, M, Cout) and x (B, N, C)")
    fits = tuple(grad.shape[:2]) == (x.shape[0], indices.shape[0])
    _check(fits, "grad must be (B, M, Cout) and x (B, N, C)")
    tables = _tables.spirals(indices, x.shape[1])
    columns, width = grad.shape[2], indices.shape[1] * x.shape[2]
    if grad.numel() == 0 or width == 0:
        return grad.new_zeros(columns, width)
    run = _kernel("spiral_conv", "spiral_conv_weight_grad", grad.dtype, grad.device, columns)
    return run(grad.contiguous(), x.contiguous(), tables.table)


def _check_sample(features: list[Tensor], vertices: Tensor, camera: Tensor | None) -> None:
    _check(len(features) > 0, "features must hold at least one map, got an empty list")
    _check(
        len(features) <= MOST_MAPS, f"features must be at most {MOST_MAPS} maps on a GPU, got {len(features)}"
    )
    first = features[0]
    for feature in features:
        _check_fits(first, features=feature)
        whole = feature.dim() == 4 and feature.shape[2] * feature.shape[3] > 0
        _check(whole and feature.shape[0] == first.shape[0], "features must be (B, C, H, W) of one batch")
    width = 2 if camera is None else 3
    points = vertices.dim() == 3 and (vertices.shape[0], vertices.shape[2]) == (first.shape[0], width)
    _check(points and vertices.device == first.device, f"vertices must be (B, N, {width}) where the maps are")
    if camera is not None:
        shapes = ((first.shape[0], 3), (first.shape[0], 3, 3))
        _check_fits(vertices, camera=camera)
        _check(tuple(camera.shape) in shapes, "camera must be (B, 3) or (B, 3, 3)")


def vertex_sample(features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any) -> Tensor:
    _check_sample(features, vertices, camera)
    run = _kernel("vertex_sample", "vertex_sample", features[0].dtype, vertices.device)
    return run(features, vertices, camera, *options)


def vertex_sample_backward(
    grad: Tensor, features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    _check_sample(features, vertices, camera)
    _check_fits(features[0], grad=grad)
    shape = (*vertices.shape[:2], sum(feature.shape[1] for feature in features))
    _check(tuple(grad.shape) == shape, "grad must have the output's shape")
    _check(len(options[-1]) == len(features) + 2, "needs must have an entry a map and two more")
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
