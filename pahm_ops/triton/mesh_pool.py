"""Vertex features times a sparse matrix; the gradient is the same function with the transpose."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pahm_ops.backends import define_triton
from pahm_ops.triton._common import (
    block,
    check,
    check_operand,
    check_small,
    empty,
    size_class,
    tile_rows,
    vector_width,
)
from pahm_ops.triton._tuning import Kernel, config, deduplicated


def mesh_pool(
    x: Tensor,
    row_pointers: Tensor,
    columns: Tensor,
    values: Tensor,
    t_row_pointers: Tensor,
    t_columns: Tensor,
    t_values: Tensor,
) -> Tensor:
    """``out[b, r] = sum_e values[e] * x[b, columns[e]]`` over the entries e of row r.

    x (B, N, C), float32, float64, float16 or bfloat16, and a CSR matrix (M, N): row_pointers (M + 1,) and
    columns (E,) int32, values (E,) float32 or float64 -> (B, M, C). Half precision is summed in float32. The
    entries of a row are added in order.
    """
    check_operand("x", x, x.device, 3)
    for name, table in (("row_pointers", row_pointers), ("columns", columns)):
        check_operand(name, table, x.device, 1, torch.int32)
    check_operand("values", values, x.device, 1)
    check(len(row_pointers) > 0 and values.shape == columns.shape, "the matrix must be CSR")
    x, row_pointers, columns, values = (t.contiguous() for t in (x, row_pointers, columns, values))
    (batch, vertices, channels), rows = x.shape, row_pointers.numel() - 1
    check_small(rows=rows, channels=channels)
    out = empty(x, batch, rows, channels)
    if out.numel() == 0:
        return out
    vec = vector_width(channels)
    _POOL.launch(
        [(batch * rows, "BLOCK_R"), (channels, "BLOCK_C")],
        _candidates(channels, x.element_size()),
        x=x,
        row_pointers=row_pointers,
        columns=columns,
        values=values,
        out=out,
        batch=batch,
        vertices=vertices,
        rows=rows,
        packs=channels // vec,
        rows_class=size_class(batch * rows),
        VEC=vec,
    )
    return out


@lru_cache(maxsize=1024)
def _candidates(channels: int, size: int) -> tuple[triton.Config, ...]:
    """The default gives a thread one 16-byte vector: its registers let many threads wait at once."""
    block_c = block(channels, 8, 128)
    tile = 128 * max(2, min(vector_width(channels), 16 // size))
    return deduplicated(
        [
            config(warps, 2, BLOCK_R=max(1, share * tile // block_c), BLOCK_C=block_c, UNROLL=unroll)
            for share, warps, unroll in ((1, 4, 4), (1, 4, 1), (2, 4, 2), (2, 8, 4))
        ]
    )


@triton.jit
def pool_kernel(
    x,
    row_pointers,
    columns,
    values,
    out,
    batch,
    vertices,
    rows,
    packs,
    rows_class,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = packs * VEC
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    mesh, row = tile_rows((pid // tiles).to(tl.int64) * BLOCK_R, rows, BLOCK_R)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    here, wanted = mesh < batch, c < channels
    first = tl.load(row_pointers + row, mask=here, other=0)
    count = tl.load(row_pointers + row + 1, mask=here, other=0) - first
    longest = tl.max(count, 0)
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_R, BLOCK_C), SUM)
    for e in range(0, longest, UNROLL):
        for j in tl.static_range(UNROLL):
            listed = e + j < count
            vertex = mesh * vertices + tl.load(columns + first + e + j, mask=listed, other=0)
            value = tl.load(values + first + e + j, mask=listed, other=0.0).to(SUM)
            total += value[:, None] * tl.load(
                x + (vertex * channels)[:, None] + c[None, :],
                mask=listed[:, None] & wanted[None, :],
                other=0.0,
            ).to(SUM)
    tl.store(
        out + ((mesh * rows + row) * channels)[:, None] + c[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None] & wanted[None, :],
    )


_POOL = Kernel(pool_kernel, ("packs", "rows_class", "VEC"))

OPS = define_triton({"mesh_pool": mesh_pool})
