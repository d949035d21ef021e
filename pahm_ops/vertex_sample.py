"""Sampling multi-scale feature maps at projected mesh vertices (pixel-aligned feature mapping)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import index

import torch
from torch import Tensor

from pahm_ops.autograd import vertex_sample as autograd
from pahm_ops.backends import autocast_dtype, served, widened
from pahm_ops.reference import vertex_sample as reference

PADDING_MODES = ("zeros", "border")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def vertex_sample(
    features: Tensor | Sequence[Tensor],
    vertices: Tensor,
    camera: Tensor | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    align_corners: bool = False,
    padding_mode: str = "zeros",
) -> Tensor:
    """Sample feature maps of all scales bilinearly at the projections of mesh vertices, in one call.

    Args:
        features: one map (B, C, H, W) or a sequence of maps (B, C_s, H_s, W_s) of any number, scale and
            channel count; float32, float64, bfloat16 (summed in float32) or float16; NCHW or channels_last,
            without conversion.
        vertices: (B, N, 3), or (B, N, 2) when ``camera`` is None. The maps' dtype, or float32 with
            half-precision maps.
        camera: one of the following, of the vertices' dtype:

            - None: ``vertices`` are (x, y) points in normalised image coordinates as in ``grid_sample``;
            - (B, 3), weak perspective ``[s, tx, ty]`` (HMR, METRO): ``x_n = s * (X + tx)``,
              ``y_n = s * (Y + ty)`` in normalised image coordinates;
            - (B, 3, 3), intrinsics K in pixels of an image of ``image_size``, measured from the centre of its
              top-left pixel; vertices in camera space (x right, y down, z forward), in K's length unit.
        image_size: (height, width) in pixels of the image that the intrinsics describe; the maps may have
            other sizes.
        align_corners: as in ``grid_sample``: normalised coordinates -1 and 1 are the centres of the corner
            pixels (True) or their outer edges (False).
        padding_mode: ``"zeros"`` or ``"border"``, as in ``grid_sample``.

    Returns:
        (B, N, C_1 + ... + C_S), contiguous, of the maps' dtype: the maps' channels, in the order given.

    Gradients flow to maps (in each map's memory format), vertices and camera. With the kernels of this
    package the gradients are differentiable too, and there is a forward mode; both run in plain PyTorch and
    are slower than the first gradient. `pahm_ops.reference` has only first-order gradients. The result and
    the gradients have the same bits in every run, and on the CPU for any number of threads, because no sum
    uses atomics. The CPU computes float16 in float32. Under autocast maps of several dtypes are cast to the
    widest. `pahm_ops.backends()` shows what runs on a device.

    A vertex with a NaN or infinite coordinate, or whose projection is not finite (a NaN camera, an overflow),
    has zero features and zero gradients in both padding modes. On a GPU the same holds for a vertex at or
    behind a perspective camera, because the host does not wait to look at values.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not fit.
        ValueError: ranks, shapes, devices or options do not fit, there are more than 16 maps on a GPU, or on
            the CPU a finite vertex lies at or behind a perspective camera (its depth, the third row of K
            times the vertex, is not positive). Under ``torch.compile`` the last one is a RuntimeError.

    Source: section 3.2 of "Pixel-aligned non-parametric hand mesh reconstruction".
    """
    maps = [features] if isinstance(features, Tensor) else _as_list(features)
    device = maps[0].device
    if autocast_dtype(device) is not None and isinstance(vertices, Tensor):
        maps, vertices, camera = _promote(maps, vertices, camera)
    _check_features(maps)
    _check_geometry(maps[0], vertices, camera)
    size = _check_image_size(camera, image_size, align_corners)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be 'zeros' or 'border', got {padding_mode!r}")
    dtype = maps[0].dtype
    if not served(device):
        return reference.vertex_sample(maps, vertices, camera, size, bool(align_corners), padding_mode)
    options = (*(size or (0, 0)), bool(align_corners), padding_mode == "border")
    if dtype != torch.float16:
        return autograd.vertex_sample(vertices, camera, options, maps)
    vertices, camera = widened(vertices, camera)
    return autograd.vertex_sample(vertices, camera, options, widened(*maps)).to(dtype)


def _as_list(features: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"features must be a tensor or a list of tensors, got {type(features).__name__}")
    if not features:
        raise ValueError("features must hold at least one map, got an empty list")
    for i, feature in enumerate(features):
        if not isinstance(feature, Tensor):
            raise TypeError(f"features[{i}] must be a tensor, got {type(feature).__name__}")
    return list(features)


def _promote(
    maps: list[Tensor], vertices: Tensor, camera: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Under autocast: casts maps to the widest dtype among them, vertices and camera to at least float32."""
    dtype = reduce(torch.promote_types, [feature.dtype for feature in maps])
    geometry = torch.promote_types(dtype, torch.float32)
    camera = camera.to(geometry) if isinstance(camera, Tensor) else camera
    return [feature.to(dtype) for feature in maps], vertices.to(geometry), camera


def _check_features(features: list[Tensor]) -> None:
    first = features[0]
    for i, feature in enumerate(features):
        shape = feature.shape
        if len(shape) != 4:
            raise ValueError(f"features[{i}] must have shape (B, C, H, W), got {tuple(shape)}")
        if shape[2] == 0 or shape[3] == 0:
            raise ValueError(
                f"features[{i}] must have a height and a width of at least 1, got {tuple(shape)}"
            )
        if feature.dtype not in DTYPES:
            raise TypeError(
                f"features[{i}] must be float32, float64, bfloat16 or float16, got {feature.dtype}"
            )
        if feature is first:
            continue
        if feature.dtype != first.dtype:
            raise TypeError(
                f"features must share one dtype, got {first.dtype} in features[0] and {feature.dtype} "
                f"in features[{i}]"
            )
        if feature.device != first.device:
            raise ValueError(
                f"features must be on one device, got {first.device} for features[0] and {feature.device} "
                f"for features[{i}]"
            )
        if shape[0] != first.shape[0]:
            raise ValueError(
                f"features must share one batch size, got {first.shape[0]} in features[0] and "
                f"{shape[0]} in features[{i}]"
            )


def _check_geometry(feature: Tensor, vertices: Tensor, camera: Tensor | None) -> None:
    if not isinstance(vertices, Tensor):
        raise TypeError(f"vertices must be a tensor, got {type(vertices).__name__}")
    if camera is not None and not isinstance(camera, Tensor):
        raise TypeError(f"camera must be a tensor or None, got {type(camera).__name__}")
    width, shape = 2 if camera is None else 3, vertices.shape
    if len(shape) != 3 or shape[2] != width:
        given = "without a camera" if camera is None else "with a camera"
        raise ValueError(f"vertices must have shape (B, N, {width}) {given}, got {tuple(shape)}")
    if shape[0] != feature.shape[0]:
        raise ValueError(
            f"vertices must have the maps' batch size {feature.shape[0]}, got {shape[0]} in shape "
            f"{tuple(shape)}"
        )
    if vertices.dtype != feature.dtype:
        half = feature.dtype in (torch.bfloat16, torch.float16)
        if not (half and vertices.dtype == torch.float32):
            wanted = f"{feature.dtype} or torch.float32" if half else f"{feature.dtype}"
            raise TypeError(f"vertices must be {wanted} with maps of {feature.dtype}, got {vertices.dtype}")
    if vertices.device != feature.device:
        raise ValueError(f"vertices must be on the maps' device {feature.device}, got {vertices.device}")
    if camera is None:
        return
    batch = shape[0]
    if tuple(camera.shape) not in ((batch, 3), (batch, 3, 3)):
        raise ValueError(
            f"camera must have shape ({batch}, 3) (weak perspective) or ({batch}, 3, 3) (intrinsics), "
            f"got {tuple(camera.shape)}"
        )
    if camera.dtype != vertices.dtype:
        raise TypeError(f"camera must have the vertices' dtype {vertices.dtype}, got {camera.dtype}")
    if camera.device != vertices.device:
        raise ValueError(f"camera must be on the maps' device {vertices.device}, got {camera.device}")


def _check_image_size(
    camera: Tensor | None, image_size: tuple[int, int] | None, align_corners: bool
) -> tuple[int, int] | None:
    if camera is None or camera.dim() == 2:
        if image_size is not None:
            raise ValueError(f"image_size belongs to intrinsics of shape (B, 3, 3) only, got {image_size!r}")
        return None
    if image_size is None:
        raise ValueError("image_size=(height, width) in pixels is needed with intrinsics, got None")
    if not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size!r}")
    least = 2 if align_corners else 1
    try:
        height, width = (value if isinstance(value, torch.SymInt) else index(value) for value in image_size)
    except TypeError:
        raise TypeError(f"image_size must be whole numbers of pixels, got {image_size!r}") from None
    if height < least or width < least:
        raise ValueError(
            f"image_size must be at least {least} x {least} pixels with align_corners={align_corners}, "
            f"got {image_size!r}"
        )
    return height, width
