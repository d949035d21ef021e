"""The kernels of `spiral_conv`: its product, each gradient's product, and the sum of a product's parts."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from pahm_ops.triton._common import tile_rows

# x has packs * VEC channels, the output has out_packs * OUT_VEC. The constants tell the compiler what the
# channels are multiples of, and so how long its vectors may be. rows_class is only part of the tuner's key.


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, by Kahan: the logarithm cancels the rounding of an exponential near 1."""
    exp = tl.exp(x)
    near = (exp - 1.0) * x / tl.log(exp)
    return tl.where(exp == 1.0, x, tl.where(x < -0.5, exp - 1.0, near))


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == 2:
        x = tl.where(x > 0, x, _expm1(tl.where(x > 0, 0.0, x)))
    elif ACTIVATION == 3:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def forward_kernel(
    x,
    table,
    weight,
    bias,
    out,
    batch,
    vertices,
    rows,
    packs,
    out_packs,
    length,
    rows_class,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, out_channels = packs * VEC, out_packs * OUT_VEC
    tiles = tl.cdiv(out_channels, BLOCK_O)
    pid = tl.program_id(0)
    mesh, row = tile_rows((pid // tiles).to(tl.int64) * BLOCK_R, rows, BLOCK_R)
    o = pid % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    here, wanted = mesh < batch, o < out_channels
    entry = table + row
    steps = tl.cdiv(channels, BLOCK_C)
    column = weight + o.to(tl.int64)[None, :] * (length * channels)
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_R, BLOCK_O), SUM)
    for k in range(length * steps):
        c = k % steps * BLOCK_C + tl.arange(0, BLOCK_C)
        vertex = mesh * vertices + tl.load(entry + (k // steps).to(tl.int64) * rows, mask=here, other=0)
        a = tl.load(
            x + (vertex * channels)[:, None] + c[None, :],
            mask=here[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        b = tl.load(
            column + (k // steps * channels + c)[:, None],
            mask=(c < channels)[:, None] & wanted[None, :],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
    if bias is not None:
        total += tl.load(bias + o, mask=wanted, other=0.0).to(SUM)[None, :]
    tl.store(
        out + ((mesh * rows + row) * out_channels)[:, None] + o[None, :],
        _activated(total, ACTIVATION).to(out.dtype.element_ty),
        mask=here[:, None] & wanted[None, :],
    )


@triton.jit
def input_grad_kernel(
    grad,
    t_pointers,
    t_rows,
    weight,
    out,
    batch,
    vertices,
    rows,
    packs,
    out_packs,
    length,
    rows_class,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, out_channels = packs * VEC, out_packs * OUT_VEC
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    mesh, vertex = tile_rows((pid // tiles).to(tl.int64) * BLOCK_R, vertices, BLOCK_R)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    here, wanted = mesh < batch, c < channels
    SUM: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    HALF: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth == 16
    lists = t_pointers + vertex
    source = grad + (mesh * rows * out_channels)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_C), SUM)
    for k in range(length):
        first = tl.load(lists, mask=here, other=0)
        count = tl.load(lists + 1, mask=here, other=0) - first
        lists += vertices
        longest = tl.max(count, 0)
        if longest > 0:
            for o0 in range(0, out_channels, BLOCK_O):
                o = o0 + tl.arange(0, BLOCK_O)
                inside = o < out_channels
                a = tl.zeros((BLOCK_R, BLOCK_O), SUM)
                for s in range(0, longest, SLOTS):
                    for j in tl.static_range(SLOTS):
                        listed = s + j < count
                        row = tl.load(t_rows + first + s + j, mask=listed, other=0).to(tl.int64)
                        a += tl.load(
                            source + (row * out_channels)[:, None] + o[None, :],
                            mask=listed[:, None] & inside[None, :],
                            other=0.0,
                        ).to(SUM)
                b = tl.load(
                    weight + o.to(tl.int64)[:, None] * (length * channels) + (k * channels + c)[None, :],
                    mask=inside[:, None] & wanted[None, :],
                    other=0.0,
                )
                if WIDEN:
                    b = b.to(tl.float32)
                high = a.to(b.dtype)
                total = tl.dot(high, b, total, input_precision=PRECISION, out_dtype=SUM)
                # Rounding the sum of several rows loses low bits, and a second product adds them back. This
                # loses no more than a product for each row would, and there would be three or four of those.
                if HALF and longest > 1:
                    low = (a - high.to(SUM)).to(b.dtype)
                    total = tl.dot(low, b, total, input_precision=PRECISION, out_dtype=SUM)
    tl.store(
        out + ((mesh * vertices + vertex) * channels)[:, None] + c[None, :],
        total.to(out.dtype.element_ty),
        mask=here[:, None] & wanted[None, :],
    )


@triton.jit
def weight_grad_kernel(
    grad,
    x,
    table,
    out,
    batch,
    vertices,
    rows,
    packs,
    out_packs,
    length,
    share,
    rows_class,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, out_channels = packs * VEC, out_packs * OUT_VEC
    o_tiles, c_tiles = tl.cdiv(out_channels, BLOCK_O), tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    c = pid % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // c_tiles
    o = pid % o_tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // o_tiles
    k, split = pid % length, (pid // length).to(tl.int64)
    in_c, in_o = c < channels, o < out_channels
    first = split * share
    mesh0 = first // rows
    row0 = (first - mesh0 * rows).to(tl.int32)
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_O, BLOCK_C), SUM)
    for r in range(0, share, BLOCK_R):
        at = row0 + r + tl.arange(0, BLOCK_R)
        row = at % rows
        mesh = mesh0 + at // rows
        here = mesh < batch
        vertex = mesh * vertices + tl.load(table + k.to(tl.int64) * rows + row, mask=here, other=0)
        a = tl.load(
            grad + ((mesh * rows + row) * out_channels)[None, :] + o[:, None],
            mask=here[None, :] & in_o[:, None],
            other=0.0,
        )
        b = tl.load(
            x + (vertex * channels)[:, None] + c[None, :], mask=here[:, None] & in_c[None, :], other=0.0
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
    line = (split * out_channels + o)[:, None] * (length * channels)
    tl.store(
        out + line + (k * channels + c)[None, :],
        total.to(out.dtype.element_ty),
        mask=in_o[:, None] & in_c[None, :],
    )


@triton.jit
def sum_kernel(partial, out, size, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(partial + at, mask=inside, other=0.0)
        partial += size
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
