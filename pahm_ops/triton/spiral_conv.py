"""Spiral convolution and its two gradients: matrix products whose rows are gathered inside the kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from pahm_ops.backends import define_triton, tf32_allowed
from pahm_ops.triton import _spiral_conv_kernels as kernels
from pahm_ops.triton._common import (
    MOST,
    block,
    check,
    check_operand,
    check_small,
    empty,
    interpreted,
    processors,
    size_class,
    vector_width,
)
from pahm_ops.triton._tuning import Kernel, config, deduplicated


def spiral_conv(
    x: Tensor,
    table: Tensor,
    t_pointers: Tensor,
    t_rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """Spiral convolution, with the activation applied while a result is in registers.

    x (B, N, C), table (L, M) int32 in [0, N), weight (Cout, L * C), bias (Cout,) or None -> (B, M, Cout).
    All but the table have one dtype: float32, float64, float16 or bfloat16. activation: 0 none, 1 ReLU,
    2 ELU, 3 the exact GELU. Half precision is summed in float32. Tensor cores round the factors of a float32
    product to TF32 if PyTorch's own products may.
    """
    check_operand("x", x, x.device, 3)
    check_operand("table", table, x.device, 2, torch.int32)
    check_operand("weight", weight, x.device, 2, x.dtype)
    if bias is not None:
        check_operand("bias", bias, x.device, 1, x.dtype)
    (batch, vertices, channels), (length, rows), out_channels = x.shape, table.shape, weight.shape[0]
    check(length > 0 and weight.shape[1] == length * channels, "weight must be (Cout, L * C)")
    check(bias is None or len(bias) == out_channels, "bias must be (Cout,)")
    check(0 <= activation < 4, f"activation must be 0, 1, 2 or 3, got {activation}")
    if channels == 0:  # An empty sum: treat it as one channel of zeros.
        x, weight, channels = x.new_zeros(batch, vertices, 1), weight.new_zeros(out_channels, length), 1
    x, table, weight = x.contiguous(), table.contiguous(), weight.contiguous()
    bias, tf32 = None if bias is None else bias.contiguous(), _tf32(x.dtype)
    check_small(rows=rows, columns_of_weight=length * channels)
    out = empty(x, batch, rows, out_channels)
    if out.numel() == 0:
        return out
    _FORWARD.launch(
        [(batch * rows, "BLOCK_R"), (out_channels, "BLOCK_O")],
        _candidates(
            x.dtype,
            tf32,
            ("BLOCK_R", batch * rows),
            ("BLOCK_O", out_channels),
            ("BLOCK_C", channels),
        ),
        x=x,
        table=table,
        weight=weight,
        bias=bias,
        out=out,
        batch=batch,
        vertices=vertices,
        rows=rows,
        length=length,
        ACTIVATION=activation,
        **_shape(x.dtype, tf32, batch * rows, channels, out_channels),
    )
    return out


def spiral_conv_input_grad(
    grad: Tensor, table: Tensor, t_pointers: Tensor, t_rows: Tensor, weight: Tensor, vertices: int
) -> Tensor:
    """Gradient of `spiral_conv` to x, computed by gathering: no atomics, the same bits each time.

    grad (B, M, Cout), weight (Cout, L * C) -> (B, vertices, C), `vertices` at least 1. Entries
    [t_pointers[i], t_pointers[i + 1]) of t_rows, both int32, are the m with table[l, m] == n, where i is
    l * N + n.
    """
    check_operand("grad", grad, grad.device, 3)
    check_operand("table", table, grad.device, 2, torch.int32)
    check_operand("t_pointers", t_pointers, grad.device, 1, torch.int32)
    check_operand("t_rows", t_rows, grad.device, 1, torch.int32)
    check_operand("weight", weight, grad.device, 2, grad.dtype)
    (batch, rows, out_channels), length = grad.shape, table.shape[0]
    check(length > 0 and table.shape[1] == rows, "table must be (L, M) for grad (B, M, Cout)")
    check(len(weight) == out_channels and weight.shape[1] % length == 0, "weight must be (Cout, L * C)")
    lists = vertices >= 0 and len(t_pointers) == vertices * length + 1 and len(t_rows) == length * rows
    check(lists, "t_pointers must be (L * vertices + 1,) and t_rows (L * M,)")
    channels = weight.shape[1] // length
    check_small(vertices=vertices, columns_of_weight=length * channels)
    out = empty(grad, batch, vertices, channels)
    if out.numel() == 0 or grad.numel() == 0:
        return out.zero_()
    grad, weight, tf32 = grad.contiguous(), weight.contiguous(), _tf32(grad.dtype)
    t_pointers, t_rows = t_pointers.contiguous(), t_rows.contiguous()
    _INPUT_GRAD.launch(
        [(batch * vertices, "BLOCK_R"), (channels, "BLOCK_C")],
        _candidates(
            grad.dtype,
            tf32,
            ("BLOCK_R", batch * vertices),
            ("BLOCK_C", channels),
            ("BLOCK_O", out_channels),
            SLOTS=4 if grad.dtype.itemsize == 2 else 2,
        ),
        grad=grad,
        t_pointers=t_pointers,
        t_rows=t_rows,
        weight=weight,
        out=out,
        batch=batch,
        vertices=vertices,
        rows=rows,
        length=length,
        **_shape(grad.dtype, tf32, batch * vertices, channels, out_channels),
    )
    return out


def spiral_conv_weight_grad(
    grad: Tensor, x: Tensor, table: Tensor, t_pointers: Tensor, t_rows: Tensor
) -> Tensor:
    """Gradient of `spiral_conv` to weight: no atomics, the same bits each time.

    grad (B, M, Cout), x (B, N, C), table (L, M) int32 -> (Cout, L * C). If it keeps more of the GPU busy,
    parts of the rows are summed separately in a float32 (float64) workspace, then added in order.
    """
    check_operand("grad", grad, grad.device, 3)
    check_operand("x", x, grad.device, 3, grad.dtype)
    check_operand("table", table, grad.device, 2, torch.int32)
    (batch, rows, out_channels), (_, vertices, channels), length = grad.shape, x.shape, table.shape[0]
    fits = x.shape[0] == batch and table.shape[1] == rows
    check(fits, "grad must be (B, M, Cout) for x (B, N, C) and table (L, M)")
    grad, x, table, tf32 = grad.contiguous(), x.contiguous(), table.contiguous(), _tf32(x.dtype)
    check_small(rows=rows, columns_of_weight=length * channels)
    out = empty(x, out_channels, length * channels)
    count = batch * rows
    if out.numel() == 0 or count == 0:
        return out.zero_()
    tiles = triton.cdiv(out_channels, _PART) * triton.cdiv(channels, _PART) * length
    splits = min(triton.cdiv(2 * processors(x), tiles), triton.cdiv(count, 2 * _PART))
    # A part may start at any row of a mesh, and its rows are counted in 32 bits.
    splits = max(splits, triton.cdiv(count, max(min(2**30, MOST - rows), _PART)))
    share = triton.cdiv(triton.cdiv(count, splits), _PART) * _PART
    splits = triton.cdiv(count, share)
    partial = out
    if splits > 1:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty(splits, *out.shape, dtype=wide, device=x.device)
    _WEIGHT_GRAD.launch(
        [(splits * length, None), (out_channels, "BLOCK_O"), (channels, "BLOCK_C")],
        _candidates(x.dtype, tf32, ("BLOCK_O", out_channels), ("BLOCK_C", channels), ("BLOCK_R", share)),
        grad=grad,
        x=x,
        table=table,
        out=partial,
        batch=batch,
        vertices=vertices,
        rows=rows,
        length=length,
        share=share,
        **_shape(x.dtype, tf32, count, channels, out_channels),
    )
    if splits > 1:
        _SUM.launch(
            [(out.numel(), "BLOCK")],
            [config(4, 1, BLOCK=512)],
            partial=partial,
            out=out,
            size=out.numel(),
            splits=splits,
        )
    return out


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and tf32_allowed()


#: A default tile has at most one part in this many of all rows, so that each multiprocessor gets a tile.
_SHARE = 128
#: Rows are split in multiples of this number, which is about the rows of a tile.
_PART = 64

# Tiles (rows, columns, summed at a time, warps, stages) for each kind of product. The default comes first: 64
# rows, which match the matrix instructions of Hopper and Blackwell and do not spill. With an odd number of
# channels each element is loaded separately and needs registers for its address.
_TILES = {
    "half": ((64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (32, 64, 64, 4, 4)),
    "tf32": ((64, 64, 32, 4, 3), (64, 64, 32, 8, 3), (128, 64, 32, 8, 3), (32, 64, 32, 4, 4)),
    "ragged": ((64, 64, 32, 8, 2), (32, 64, 32, 4, 2)),
    "ieee": ((64, 64, 16, 8, 3), (128, 64, 16, 8, 3), (32, 64, 16, 4, 3)),
    "double": ((32, 32, 16, 8, 3), (32, 32, 16, 4, 3), (64, 32, 16, 8, 3)),
}


@lru_cache(maxsize=1024)
def _candidates(
    dtype: torch.dtype,
    tf32: bool,
    rows: tuple[str, int],
    columns: tuple[str, int],
    inner: tuple[str, int],
    **constants: int,
) -> tuple[triton.Config, ...]:
    """Configurations for a product of these sizes; each size comes with the name of its block."""
    found: list[triton.Config] = []
    ragged = columns[1] % 2 != 0 or inner[1] % 2 != 0
    for *tile, warps, stages in _TILES[_product(dtype, tf32, ragged)]:
        most_rows = rows[1] // _SHARE if rows[0] == "BLOCK_R" and not found else rows[1]
        sizes = ((rows[0], most_rows), columns, inner)
        blocks = {name: block(size, 16, most) for (name, size), most in zip(sizes, tile, strict=True)}
        found.append(config(warps, stages, **blocks, **constants))
    return deduplicated(found)


def _product(dtype: torch.dtype, tf32: bool, ragged: bool) -> str:
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32 and not tf32:
        return "ieee"
    return "ragged" if ragged else "tf32" if dtype == torch.float32 else "half"


def _shape(dtype: torch.dtype, tf32: bool, rows: int, channels: int, out_channels: int) -> dict[str, Any]:
    """The arguments that all three kernels share, including the tuner's key."""
    vec, out_vec = vector_width(channels), vector_width(out_channels)
    return {
        "packs": channels // vec,
        "out_packs": out_channels // out_vec,
        "rows_class": size_class(rows),
        "VEC": vec,
        "OUT_VEC": out_vec,
        "PRECISION": "tf32" if tf32 and dtype == torch.float32 else "ieee",
        # Triton's interpreter computes bfloat16 products wrongly.
        "WIDEN": dtype == torch.bfloat16 and interpreted(),
    }


_KEY = ("packs", "out_packs", "length", "rows_class", "VEC", "OUT_VEC", "PRECISION")
_FORWARD = Kernel(kernels.forward_kernel, _KEY)
_INPUT_GRAD = Kernel(kernels.input_grad_kernel, _KEY)
_WEIGHT_GRAD = Kernel(kernels.weight_grad_kernel, _KEY)
_SUM = Kernel(kernels.sum_kernel, ())

OPS = define_triton(
    {
        "spiral_conv": spiral_conv,
        "_spiral_conv_input_grad": spiral_conv_input_grad,
        "_spiral_conv_weight_grad": spiral_conv_weight_grad,
    }
)
