"""Kernel code that finds the four pixels around each vertex, as defined in `pahm_ops.reference`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# CAMERA is 0 for points in normalised coordinates, 1 for weak perspective, 2 for intrinsics. WORK is the
# type that the arithmetic uses, float64 or float32.


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def image_scale(size, ALIGN: tl.constexpr, WORK: tl.constexpr):
    """Normalised units per pixel, and the normalised coordinate of pixel 0."""
    one = tl.full((), 1.0, WORK)
    if ALIGN:
        scale, shift = 2.0 * one / (size - 1), -one
    else:
        scale, shift = 2.0 * one / size, one / size - 1.0
    return scale, shift


@triton.jit
def ray(camera, mesh, here, x, y, z, ROW: tl.constexpr, WORK: tl.constexpr):
    """A row of the intrinsics times the vertex."""
    line = camera + mesh * 9 + 3 * ROW
    return (
        tl.load(line, mask=here, other=0.0).to(WORK) * x
        + tl.load(line + 1, mask=here, other=0.0).to(WORK) * y
        + tl.load(line + 2, mask=here, other=0.0).to(WORK) * z
    )


@triton.jit
def coordinates(vertices, at, here, CAMERA: tl.constexpr, WORK: tl.constexpr):
    """The coordinates of vertices `at`, numbered over the whole batch; z is 0 without a camera."""
    WIDTH: tl.constexpr = 2 if CAMERA == 0 else 3
    x = tl.load(vertices + at * WIDTH, mask=here, other=0.0).to(WORK)
    y = tl.load(vertices + at * WIDTH + 1, mask=here, other=0.0).to(WORK)
    z = tl.zeros_like(x)
    if CAMERA != 0:
        z = tl.load(vertices + at * WIDTH + 2, mask=here, other=0.0).to(WORK)
    return x, y, z


@triton.jit
def project(
    x,
    y,
    z,
    camera,
    mesh,
    here,
    height,
    width,
    CAMERA: tl.constexpr,
    ALIGN: tl.constexpr,
    WORK: tl.constexpr,
):
    """Normalised image coordinates, 0 for an invalid vertex, and whether each vertex is valid.

    A vertex is invalid if it, its camera or its projection is not finite, or if it lies behind the camera.
    """
    valid = here & finite(x) & finite(y) & finite(z)
    if CAMERA == 1:
        s = tl.load(camera + mesh * 3, mask=here, other=0.0).to(WORK)
        tx = tl.load(camera + mesh * 3 + 1, mask=here, other=0.0).to(WORK)
        ty = tl.load(camera + mesh * 3 + 2, mask=here, other=0.0).to(WORK)
        x, y = s * (x + tx), s * (y + ty)
    elif CAMERA == 2:
        for i in tl.static_range(9):
            valid = valid & finite(tl.load(camera + mesh * 9 + i, mask=here, other=0.0).to(WORK))
        u = ray(camera, mesh, here, x, y, z, 0, WORK)
        v = ray(camera, mesh, here, x, y, z, 1, WORK)
        depth = ray(camera, mesh, here, x, y, z, 2, WORK)
        valid = valid & (depth > 0)
        depth = tl.where(valid, depth, 1.0)
        scale_x, shift_x = image_scale(width, ALIGN, WORK)
        scale_y, shift_y = image_scale(height, ALIGN, WORK)
        x, y = u / depth * scale_x + shift_x, v / depth * scale_y + shift_y
    valid = valid & finite(x) & finite(y)
    return tl.where(valid, x, 0.0), tl.where(valid, y, 0.0), valid


@triton.jit
def place(point, valid, size, ALIGN: tl.constexpr, BORDER: tl.constexpr):
    """Along one axis: position in pixels, its slope by the normalised coordinate, whether a pixel is near.

    With BORDER the position is clamped to the map, and a clamped position has slope 0. The position is 0 if
    no pixel is near.
    """
    extent = tl.zeros_like(point) + size
    last = extent - 1
    if ALIGN:
        position, slope = (point + 1) / 2 * last, last / 2
    else:
        position, slope = ((point + 1) * extent - 1) / 2, extent / 2
    if BORDER:
        inside = (position > 0) & (position < last)
        slope = tl.where(inside, slope, 0.0)
        position = tl.where(position > 0, tl.where(position < last, position, last), 0.0)
    else:
        valid = valid & (position >= -1) & (position < extent)
        position = tl.where(valid, position, 0.0)
    return position, slope, valid


@triton.jit
def pixel_at(position, size):
    """The pixel at or before a position. Above 2^24 floats skip pixels and may lie past the last one."""
    return tl.minimum(tl.floor(position).to(tl.int32), size - 1)


@triton.jit
def corner(position_x, position_y, near, height, width, K: tl.constexpr):
    """Pixel K of the four around a position, in the order (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).

    Returns x, y (int64; 0 if the map has no such pixel), the pixel's weight and whether the pixel exists.
    """
    left, top = tl.floor(position_x), tl.floor(position_y)
    x, y = pixel_at(position_x, width) + K % 2, pixel_at(position_y, height) + K // 2
    inside = near & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    right, down = position_x - left, position_y - top
    weight_x = right if K % 2 == 1 else 1 - right
    weight_y = down if K // 2 == 1 else 1 - down
    x, y = tl.where(inside, x, 0), tl.where(inside, y, 0)
    return x.to(tl.int64), y.to(tl.int64), weight_x * weight_y, inside
