"""Pixel-aligned sampling of feature maps at projected vertices, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from pahm_ops.backends import define_triton
from pahm_ops.triton import _vertex_sample_kernels as kernels
from pahm_ops.triton._common import (
    block,
    check,
    check_operand,
    check_small,
    empty,
    size_class,
    vector_width,
)
from pahm_ops.triton._tuning import Kernel, config, deduplicated

Geometry = dict[str, Any]


def vertex_sample(
    features: Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    height: int,
    width: int,
    align_corners: bool,
    border: bool,
) -> Tensor:
    """Feature maps (B, C_s, H_s, W_s) sampled at the projections of vertices -> (B, N, C_1 + ... + C_S).

    Maps have any strides and one dtype: float32, float64, float16 or bfloat16. vertices: (B, N, 3), or
    (B, N, 2) without a camera. camera: None, (B, 3), or (B, 3, 3) with an image of `height` x `width` pixels.
    Both have the maps' dtype, or float32 with half-precision maps, which are summed in float32. One launch
    per map does both projection and sampling. The host does not look at values: a vertex behind a perspective
    camera is invalid, that is, it has zero features and gradients.
    """
    _check_operands(features, vertices, camera)
    batch, count = vertices.shape[:2]
    total = sum(feature.shape[1] for feature in features)
    _check_sizes(features, count, total)
    out = empty(features[0], batch, count, total)
    geometry = _geometry(vertices, camera, height, width, align_corners)
    first = 0
    for feature in features:
        channels = feature.shape[1]
        if batch * count * channels:
            _FORWARD.launch(
                [(batch * count, "BLOCK_V"), (channels, "BLOCK_C")],
                _candidates("BLOCK_V", *_layout(feature)),
                **geometry,
                **_map(feature, first, total),
                map=feature,
                out=out,
                count_class=size_class(batch * count),
                BORDER=border,
            )
        first += channels
    return out


def vertex_sample_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    height: int,
    width: int,
    align_corners: bool,
    border: bool,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of `vertex_sample`, grad (B, N, C_1 + ... + C_S), to maps, vertices and camera.

    `needs` has a flag for each map, one for the vertices and one for the camera; an unneeded gradient is an
    empty vector. A map's gradient has the map's memory format. No atomics: the same bits each time. For map
    gradients the vertices are sorted by their cell of pixels, so that one thread sums each element.
    """
    _check_operands(features, vertices, camera)
    check_operand("grad", grad, features[0].device, 3, features[0].dtype)
    shape = (*vertices.shape[:2], sum(feature.shape[1] for feature in features))
    check(tuple(grad.shape) == shape, "grad must have the output's shape")
    check(len(needs) == len(features) + 2, "needs must have an entry a map and two more")
    _check_sizes(features, *grad.shape[1:])
    grad = grad.contiguous()
    *need_maps, need_vertices, need_camera = needs
    need_camera = need_camera and camera is not None
    geometry = _geometry(vertices, camera, height, width, align_corners)
    map_grads = _map_grads(grad, features, need_maps, geometry, border)
    if not (need_vertices or need_camera):
        return map_grads, empty(vertices, 0), empty(vertices, 0)
    shares = _point_grads(grad, features, geometry, border)
    vertex_grad, camera_grad = _through_projection(shares, geometry, need_camera)
    return map_grads, vertex_grad, camera_grad


def _check_operands(features: Sequence[Tensor], vertices: Tensor, camera: Tensor | None) -> None:
    check(
        1 <= len(features) <= 16, f"features must be 1 to 16 maps, got {len(features)}"
    )  # as in csrc/kernels
    first = features[0]
    for feature in features:
        check_operand("features", feature, first.device, 4, first.dtype)
        whole = feature.shape[2] * feature.shape[3] > 0 and feature.shape[0] == first.shape[0]
        check(whole, "features must be (B, C, H, W) of one batch")
    check_operand("vertices", vertices, first.device, 3)
    width = 2 if camera is None else 3
    fits = (vertices.shape[0], vertices.shape[2]) == (first.shape[0], width)
    check(fits, f"vertices must be (B, N, {width})")
    if camera is not None:
        check_operand("camera", camera, first.device, camera.dim(), vertices.dtype)
        shapes = ((first.shape[0], 3), (first.shape[0], 3, 3))
        check(tuple(camera.shape) in shapes, "camera must be (B, 3) or (B, 3, 3)")


def _check_sizes(features: Sequence[Tensor], count: int, total: int) -> None:
    check_small(vertices=count, channels=total)
    for feature in features:
        check_small(pixels_of_a_map=(feature.shape[2] + 1) * (feature.shape[3] + 1))


def _point_grads(grad: Tensor, features: Sequence[Tensor], geometry: Geometry, border: bool) -> Tensor:
    """(maps, B, N, 2): each map's share of the gradient to the normalised points."""
    batch, count, total = grad.shape
    shares = torch.zeros(len(features), batch, count, 2, dtype=_wide(grad.dtype), device=grad.device)
    first = 0
    for share, feature in zip(shares, features, strict=True):
        if share.numel() and feature.shape[1]:
            _POINT_GRAD.launch(
                [(batch * count, "BLOCK_V")],
                _candidates("BLOCK_V", *_layout(feature)),
                grad=grad,
                **geometry,
                **_map(feature, first, total),
                map=feature,
                out=share,
                count_class=size_class(batch * count),
                BORDER=border,
            )
        first += feature.shape[1]
    return shares


def _through_projection(shares: Tensor, geometry: Geometry, need_camera: bool) -> tuple[Tensor, Tensor]:
    vertices, camera = geometry["vertices"], geometry["camera"]
    batch, count = vertices.shape[:2]
    vertex_grad = torch.empty_like(vertices)
    blocks = triton.cdiv(count, _VERTICES)
    sums = None
    if need_camera:
        sums = shares.new_zeros(batch, blocks, camera[0].numel() if batch else 0)
    if vertex_grad.numel():
        _PROJECTION_GRAD.launch(
            [(batch * blocks, None)],
            # A fused multiply-add in the sum over lanes would give the lanes different last bits.
            [config(4, 1, BLOCK_V=_VERTICES, enable_fp_fusion=False)],
            shares=shares,
            **geometry,
            vertex_grad=vertex_grad,
            camera_grad=sums,
            maps=len(shares),
            share_size=shares[0].numel(),
        )
    if sums is None:
        return vertex_grad, empty(vertices, 0)
    return vertex_grad, sums.sum(1).to(camera.dtype).view(camera.shape)


def _map_grads(
    grad: Tensor, features: Sequence[Tensor], needs: Sequence[bool], geometry: Geometry, border: bool
) -> list[Tensor]:
    batch, count, total = grad.shape
    outs = [
        torch.empty_like(feature, memory_format=_format(feature)) if need else empty(feature, 0)
        for feature, need in zip(features, needs, strict=True)
    ]
    wanted = [i for i, out in enumerate(outs) if out.dim() > 1 and out.numel()]
    if count == 0:
        return [out.zero_() if i in wanted else out for i, out in enumerate(outs)]
    if not wanted:
        return outs
    # The cells of all maps are numbered consecutively, so that one sort handles all maps.
    bases = [0]
    for i in wanted:
        bases.append(bases[-1] + batch * (features[i].shape[2] + 1) * (features[i].shape[3] + 1))
    cells = bases.pop()
    narrow = max(cells, len(wanted) * batch * count) < 2**31
    keys = torch.empty(
        len(wanted), batch * count, dtype=torch.int32 if narrow else torch.int64, device=grad.device
    )
    positions = torch.empty(len(wanted), batch * count, 2, dtype=_wide(grad.dtype), device=grad.device)
    for i, base, key, position in zip(wanted, bases, keys, positions, strict=True):
        _CELL.launch(
            [(batch * count, "BLOCK_V")],
            [config(4, 1, BLOCK_V=_VERTICES)],
            **geometry,
            keys=key,
            positions=position,
            height=features[i].shape[2],
            width=features[i].shape[3],
            base=base,
            none=cells,
            BORDER=border,
        )
    keys, order = torch.sort(keys.view(-1), stable=True)
    numbers = torch.arange(cells + 1, dtype=keys.dtype, device=grad.device)
    starts = torch.searchsorted(keys, numbers, out_int32=narrow)
    firsts = [sum(feature.shape[1] for feature in features[:i]) for i in wanted]
    for nth, (i, first, base) in enumerate(zip(wanted, firsts, bases, strict=True)):
        pixels, channels = batch * outs[i].shape[2] * outs[i].shape[3], outs[i].shape[1]
        _MAP_GRAD.launch(
            [(pixels, "BLOCK_P"), (channels, "BLOCK_C")],
            _candidates("BLOCK_P", *_layout(outs[i]), UNROLL=2),
            grad=grad,
            order=order,
            starts=starts,
            positions=positions[nth],
            **_map(outs[i], first, total),
            out=outs[i],
            batch=batch,
            base=base,
            shift=nth * batch * count,
            count_class=size_class(batch * count),
        )
    return outs


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _format(feature: Tensor) -> torch.memory_format:
    last = not feature.is_contiguous() and feature.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


def _geometry(
    vertices: Tensor, camera: Tensor | None, height: int, width: int, align_corners: bool
) -> Geometry:
    """The arguments of the kernels that project."""
    return {
        "vertices": vertices.contiguous(),
        "camera": None if camera is None else camera.contiguous(),
        "batch": vertices.shape[0],
        "count": vertices.shape[1],
        "image_height": height,
        "image_width": width,
        "CAMERA": 0 if camera is None else camera.dim() - 1,
        "ALIGN": align_corners,
    }


def _map(feature: Tensor, first: int, total: int) -> dict[str, Any]:
    """Sizes and strides of a map, and the position of its channels among those of all maps."""
    channels = feature.shape[1]
    strides = [
        0 if size == 1 else stride for size, stride in zip(feature.shape, feature.stride(), strict=True)
    ]
    batch, channel, row, column = strides
    if channels == 1:
        channel = 1
    vec, out_vec = vector_width(channels), vector_width(channels, first, total)
    stride_vec = vector_width(batch, row, column) if channel == 1 else 1
    return {
        "height": feature.shape[2],
        "width": feature.shape[3],
        "packs": channels // vec,
        "stride_b": batch // stride_vec,
        "stride_c": channel,
        "stride_y": row // stride_vec,
        "stride_x": column // stride_vec,
        "first": first // out_vec,
        "total": total // out_vec,
        "VEC": vec,
        "STRIDE_VEC": stride_vec,
        "OUT_VEC": out_vec,
    }


def _layout(feature: Tensor) -> tuple[int, int, bool]:
    return feature.shape[1], feature.element_size(), feature.shape[1] == 1 or feature.stride(1) == 1


@lru_cache(maxsize=1024)
def _candidates(
    rows: str, channels: int, size: int, last: bool, **constants: int
) -> tuple[triton.Config, ...]:
    """The default gives a thread one 16-byte vector: its registers let many threads wait at once."""
    vec = min(vector_width(channels), 16 // size) if last else 1
    found = []
    for share, most, warps in (
        (1, 128 if last else 16, 4),
        (2, 128 if last else 16, 4),
        (1, 32, 4),
        (2, 32, 8),
    ):
        block_c = block(channels, 8, most)
        tile = share * 128 * max(2, vec)
        found.append(config(warps, 2, **{rows: max(1, tile // block_c), "BLOCK_C": block_c}, **constants))
    return deduplicated(found)


#: Vertices per program in kernels without channels.
_VERTICES = 128

_KEY = ("height", "width", "packs", "stride_c", "count_class", "VEC", "STRIDE_VEC", "OUT_VEC")
_FORWARD = Kernel(kernels.forward_kernel, _KEY)
_POINT_GRAD = Kernel(kernels.point_grad_kernel, _KEY)
_MAP_GRAD = Kernel(kernels.map_grad_kernel, _KEY)
_CELL = Kernel(kernels.cell_kernel, ())
_PROJECTION_GRAD = Kernel(kernels.projection_grad_kernel, ())

OPS = define_triton({"vertex_sample": vertex_sample, "_vertex_sample_backward": vertex_sample_backward})
