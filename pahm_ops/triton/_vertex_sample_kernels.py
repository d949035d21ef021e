"""The kernels of `vertex_sample`; each handles one map, forward or backward."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from pahm_ops.triton._common import tile_rows
from pahm_ops.triton._projection import coordinates, corner, image_scale, pixel_at, place, project, ray

# A map has height x width pixels and packs * VEC channels. Its channel stride is stride_c, the other strides
# are stride_* * STRIDE_VEC. Its channels begin at first * OUT_VEC among the output's total * OUT_VEC. The
# constants tell the compiler what the numbers are multiples of, and so how long its vectors may be.


@triton.jit
def forward_kernel(
    vertices,
    camera,
    map,
    out,
    batch,
    count,
    image_height,
    image_width,
    height,
    width,
    packs,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    first,
    total,
    count_class,
    CAMERA: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    VEC: tl.constexpr,
    STRIDE_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    WORK: tl.constexpr = tl.float64 if map.dtype.element_ty == tl.float64 else tl.float32
    channels = packs * VEC
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    mesh, vertex = tile_rows((pid // tiles).to(tl.int64) * BLOCK_V, count, BLOCK_V)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    here, wanted = mesh < batch, c < channels
    at = mesh * count + vertex
    x, y, z = coordinates(vertices, at, here, CAMERA, WORK)
    x, y, valid = project(x, y, z, camera, mesh, here, image_height, image_width, CAMERA, ALIGN, WORK)
    x, _, near_x = place(x, valid, width, ALIGN, BORDER)
    y, _, near_y = place(y, valid, height, ALIGN, BORDER)
    sampled = tl.zeros((BLOCK_V, BLOCK_C), WORK)
    for k in tl.static_range(4):
        i, j, weight, inside = corner(x, y, near_x & near_y, height, width, k)
        pixel = (mesh * stride_b + j * stride_y + i * stride_x) * STRIDE_VEC
        value = tl.load(
            map + pixel[:, None] + (c.to(tl.int64) * stride_c)[None, :],
            mask=inside[:, None] & wanted[None, :],
            other=0.0,
        ).to(WORK)
        sampled += weight[:, None] * value
    tl.store(
        out + (at * (total * OUT_VEC) + first * OUT_VEC)[:, None] + c[None, :],
        sampled.to(out.dtype.element_ty),
        mask=here[:, None] & wanted[None, :],
    )


@triton.jit
def cell_kernel(
    vertices,
    camera,
    keys,
    positions,
    batch,
    count,
    image_height,
    image_width,
    height,
    width,
    base,
    none,
    CAMERA: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Where each vertex lies on the map, and the number of its cell, which is the four pixels around it.

    The map has (height + 1) * (width + 1) cells per batch item, numbered from `base`. A vertex that takes
    nothing from the map has the number `none`.
    """
    WORK: tl.constexpr = positions.dtype.element_ty
    mesh, vertex = tile_rows(tl.program_id(0).to(tl.int64) * BLOCK_V, count, BLOCK_V)
    here = mesh < batch
    at = mesh * count + vertex
    x, y, z = coordinates(vertices, at, here, CAMERA, WORK)
    x, y, valid = project(x, y, z, camera, mesh, here, image_height, image_width, CAMERA, ALIGN, WORK)
    x, _, near_x = place(x, valid, width, ALIGN, BORDER)
    y, _, near_y = place(y, valid, height, ALIGN, BORDER)
    column, row = pixel_at(x, width) + 1, pixel_at(y, height) + 1
    cell = base + (mesh * (height + 1) + row) * (width + 1) + column
    cell = tl.where(near_x & near_y, cell, none)
    tl.store(keys + at, cell.to(keys.dtype.element_ty), mask=here)
    tl.store(positions + 2 * at, x, mask=here)
    tl.store(positions + 2 * at + 1, y, mask=here)


@triton.jit
def map_grad_kernel(
    grad,
    order,
    starts,
    positions,
    out,
    batch,
    height,
    width,
    packs,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    base,
    shift,
    first,
    total,
    count_class,
    VEC: tl.constexpr,
    STRIDE_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums each pixel of a map's gradient over the vertices around it, in the order of their cells.

    order holds the vertices of all maps sorted by cell; this map's vertices are numbered from `shift`. Cell i
    owns the range [starts[i], starts[i + 1]) of order. Adjacent cells in a row have consecutive numbers, so
    a pixel reads two runs.
    """
    WORK: tl.constexpr = positions.dtype.element_ty
    channels = packs * VEC
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    mesh, pixel = tile_rows((pid // tiles).to(tl.int64) * BLOCK_P, height * width, BLOCK_P)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    here, wanted = mesh < batch, c < channels
    x, y = pixel % width, pixel // width
    summed = tl.zeros((BLOCK_P, BLOCK_C), WORK)
    for j in tl.static_range(2):
        cell = starts + base + (mesh * (height + 1) + y + j) * (width + 1) + x
        begin = tl.load(cell, mask=here, other=0)
        number = (tl.load(cell + 2, mask=here, other=0) - begin).to(tl.int32)
        for s in range(0, tl.max(number, 0), UNROLL):
            for u in tl.static_range(UNROLL):
                listed = s + u < number
                vertex = tl.load(order + begin + s + u, mask=listed, other=shift) - shift
                at_x = tl.load(positions + 2 * vertex, mask=listed, other=0.0)
                at_y = tl.load(positions + 2 * vertex + 1, mask=listed, other=0.0)
                right = at_x - tl.floor(at_x) + (pixel_at(at_x, width) - x)
                down = at_y - tl.floor(at_y) + (pixel_at(at_y, height) - y)
                # The distance to a pixel of the vertex's cell is in [0, 1]; 1 minus it is the linear weight.
                weight = (1 - tl.abs(right)) * (1 - tl.abs(down))
                value = tl.load(
                    grad + (vertex * (total * OUT_VEC) + first * OUT_VEC)[:, None] + c[None, :],
                    mask=listed[:, None] & wanted[None, :],
                    other=0.0,
                ).to(WORK)
                summed += weight[:, None] * value
    line = (mesh * stride_b + y * stride_y + x * stride_x) * STRIDE_VEC
    tl.store(
        out + line[:, None] + (c.to(tl.int64) * stride_c)[None, :],
        summed.to(out.dtype.element_ty),
        mask=here[:, None] & wanted[None, :],
    )


@triton.jit
def point_grad_kernel(
    grad,
    vertices,
    camera,
    map,
    out,
    batch,
    count,
    image_height,
    image_width,
    height,
    width,
    packs,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    first,
    total,
    count_class,
    CAMERA: tl.constexpr,
    ALIGN: tl.constexpr,
    BORDER: tl.constexpr,
    VEC: tl.constexpr,
    STRIDE_VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The map's share of the gradient to the normalised points."""
    WORK: tl.constexpr = out.dtype.element_ty
    channels = packs * VEC
    mesh, vertex = tile_rows(tl.program_id(0).to(tl.int64) * BLOCK_V, count, BLOCK_V)
    here = mesh < batch
    at = mesh * count + vertex
    x, y, z = coordinates(vertices, at, here, CAMERA, WORK)
    x, y, valid = project(x, y, z, camera, mesh, here, image_height, image_width, CAMERA, ALIGN, WORK)
    x, slope_x, near_x = place(x, valid, width, ALIGN, BORDER)
    y, slope_y, near_y = place(y, valid, height, ALIGN, BORDER)
    near = near_x & near_y
    right, down = x - tl.floor(x), y - tl.floor(y)
    along_x = tl.zeros((BLOCK_V, BLOCK_C), WORK)
    along_y = tl.zeros((BLOCK_V, BLOCK_C), WORK)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        wanted = c < channels
        g = tl.load(
            grad + (at * (total * OUT_VEC) + first * OUT_VEC)[:, None] + c[None, :],
            mask=near[:, None] & wanted[None, :],
            other=0.0,
        ).to(WORK)
        for k in tl.static_range(4):
            i, j, _, inside = corner(x, y, near, height, width, k)
            pixel = (mesh * stride_b + j * stride_y + i * stride_x) * STRIDE_VEC
            product = g * tl.load(
                map + pixel[:, None] + (c.to(tl.int64) * stride_c)[None, :],
                mask=inside[:, None] & wanted[None, :],
                other=0.0,
            ).to(WORK)
            weight_x = down if k // 2 == 1 else 1 - down
            weight_y = right if k % 2 == 1 else 1 - right
            along_x += (weight_x if k % 2 == 1 else -weight_x)[:, None] * product
            along_y += (weight_y if k // 2 == 1 else -weight_y)[:, None] * product
    tl.store(out + 2 * at, slope_x * tl.sum(along_x, 1), mask=here)
    tl.store(out + 2 * at + 1, slope_y * tl.sum(along_y, 1), mask=here)


@triton.jit
def projection_grad_kernel(
    shares,
    vertices,
    camera,
    vertex_grad,
    camera_grad,
    batch,
    count,
    image_height,
    image_width,
    maps,
    share_size,
    CAMERA: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds the maps' shares in order and propagates the sum back through the projection.

    camera_grad (B, blocks, 3 or 9) receives the sum of each block of vertices; None if it is not needed.
    """
    WORK: tl.constexpr = shares.dtype.element_ty
    GRAD: tl.constexpr = vertex_grad.dtype.element_ty
    blocks = tl.cdiv(count, BLOCK_V)
    vertex = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    mesh = tl.zeros((BLOCK_V,), tl.int64) + tl.program_id(0) // blocks
    here = vertex < count
    at = mesh * count + vertex
    gx = tl.zeros((BLOCK_V,), WORK)
    gy = tl.zeros((BLOCK_V,), WORK)
    share = shares + 2 * at
    for _ in range(maps):
        gx += tl.load(share, mask=here, other=0.0)
        gy += tl.load(share + 1, mask=here, other=0.0)
        share += share_size
    x, y, z = coordinates(vertices, at, here, CAMERA, WORK)
    _, _, valid = project(x, y, z, camera, mesh, here, image_height, image_width, CAMERA, ALIGN, WORK)
    x, y, z = tl.where(valid, x, 0.0), tl.where(valid, y, 0.0), tl.where(valid, z, 0.0)
    gx, gy = tl.where(valid, gx, 0.0), tl.where(valid, gy, 0.0)
    block = tl.program_id(0).to(tl.int64)
    if CAMERA == 0:
        tl.store(vertex_grad + 2 * at, gx.to(GRAD), mask=here)
        tl.store(vertex_grad + 2 * at + 1, gy.to(GRAD), mask=here)
    elif CAMERA == 1:
        s = tl.load(camera + mesh * 3, mask=valid, other=0.0).to(WORK)
        tl.store(vertex_grad + 3 * at, (s * gx).to(GRAD), mask=here)
        tl.store(vertex_grad + 3 * at + 1, (s * gy).to(GRAD), mask=here)
        tl.store(vertex_grad + 3 * at + 2, tl.zeros_like(gx).to(GRAD), mask=here)
        if camera_grad is not None:
            tx = tl.load(camera + mesh * 3 + 1, mask=valid, other=0.0).to(WORK)
            ty = tl.load(camera + mesh * 3 + 2, mask=valid, other=0.0).to(WORK)
            tl.store(camera_grad + block * 3, tl.sum(gx * (x + tx) + gy * (y + ty), 0))
            tl.store(camera_grad + block * 3 + 1, tl.sum(s * gx, 0))
            tl.store(camera_grad + block * 3 + 2, tl.sum(s * gy, 0))
    else:
        scale_x, _ = image_scale(image_width, ALIGN, WORK)
        scale_y, _ = image_scale(image_height, ALIGN, WORK)
        depth = tl.where(valid, ray(camera, mesh, valid, x, y, z, 2, WORK), 1.0)
        r0, r1 = gx * scale_x / depth, gy * scale_y / depth
        u, v = ray(camera, mesh, valid, x, y, z, 0, WORK), ray(camera, mesh, valid, x, y, z, 1, WORK)
        r2 = -(r0 * (u / depth) + r1 * (v / depth))
        for i in tl.static_range(3):
            column = camera + mesh * 9 + i
            g = (
                tl.load(column, mask=valid, other=0.0).to(WORK) * r0
                + tl.load(column + 3, mask=valid, other=0.0).to(WORK) * r1
                + tl.load(column + 6, mask=valid, other=0.0).to(WORK) * r2
            )
            tl.store(vertex_grad + 3 * at + i, g.to(GRAD), mask=here)
        if camera_grad is not None:
            for i in tl.static_range(3):
                r = r0 if i == 0 else r1 if i == 1 else r2
                tl.store(camera_grad + block * 9 + 3 * i, tl.sum(r * x, 0))
                tl.store(camera_grad + block * 9 + 3 * i + 1, tl.sum(r * y, 0))
                tl.store(camera_grad + block * 9 + 3 * i + 2, tl.sum(r * z, 0))
