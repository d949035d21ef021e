"""Sampling multi-scale feature maps at projected mesh vertices (pixel-aligned feature mapping)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pahm_ops import _library
from pahm_ops._derivatives import push_forward, restricted
from pahm_ops.reference import vertex_sample as reference

_ops = torch.ops.pahm_ops

Options = tuple[int, int, bool, bool]
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
    """Sample feature maps, bilinearly and all scales in one call, at the projections of mesh vertices.

    Args:
        features: one map (B, C, H, W) or a sequence of maps (B, C_s, H_s, W_s) of any number, scale and
            channel count; float32, float64, bfloat16 (summed in float32) or float16; NCHW or channels_last,
            both taken as they are.
        vertices: (B, N, 3), or (B, N, 2) when ``camera`` is None. The maps' dtype, or float32 with
            half-precision maps.
        camera: of the vertices' dtype, one of

            - None: ``vertices`` are (x, y) points in normalised image coordinates as in ``grid_sample``;
            - (B, 3), weak perspective ``[s, tx, ty]`` (HMR, METRO): ``x_n = s * (X + tx)``,
              ``y_n = s * (Y + ty)`` in normalised image coordinates;
            - (B, 3, 3), intrinsics K in pixels of an image of ``image_size``, measured from the centre of its
              top-left pixel; vertices in camera space (x right, y down, z forward), in K's length unit.
        image_size: (height, width) in pixels of the image that the intrinsics describe; the maps may have
            any other size.
        align_corners: as in ``grid_sample``: normalised coordinates -1 and 1 are the centres of the corner
            pixels (True) or the outer edges of them (False).
        padding_mode: ``"zeros"`` or ``"border"``, as in ``grid_sample``.

    Returns:
        (B, N, C_1 + ... + C_S), contiguous, of the maps' dtype: the maps' channels, in the order given.

    Gradients flow to maps (in each map's memory format), vertices and camera, and are themselves
    differentiable where a compiled kernel serves, as is the sample in forward mode (both by plain PyTorch:
    slower than the first gradient); `pahm_ops.reference`, which serves devices without one, has first-order
    gradients only. On the CPU the result and the gradients have the same bits for any number of threads, and
    float16 is computed in float32. Under autocast maps of several dtypes are brought to the widest.

    A vertex with a NaN or infinite coordinate, or whose projection is not finite (a NaN camera, an overflow),
    has zero features and zero gradients in both padding modes.

    Raises:
        TypeError: an argument is not a tensor, or dtypes do not fit.
        ValueError: ranks, shapes, devices or options do not fit, or a finite vertex lies at or behind a
            perspective camera (its depth, the third row of K times the vertex, is not positive). Under
            ``torch.compile`` the last one is a RuntimeError.

    Source: section 3.2 of "Pixel-aligned non-parametric hand mesh reconstruction".
    """
    maps = _as_list(features)
    if isinstance(vertices, Tensor) and _library.autocast_dtype(maps[0].device):
        maps, vertices, camera = _promote(maps, vertices, camera)
    _check_features(maps)
    _check_geometry(maps[0], vertices, camera)
    size = _check_image_size(camera, image_size, align_corners)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be 'zeros' or 'border', got {padding_mode!r}")
    if _library.compiled(maps[0].device):
        height, width = size or (0, 0)
        border = padding_mode == "border"
        wide = _library.widened(*maps)
        vertices, camera = _library.widened(vertices, camera)
        out = _ops.vertex_sample(wide, vertices, camera, height, width, bool(align_corners), border)
        return out.to(maps[0].dtype)
    return reference.vertex_sample(maps, vertices, camera, size, bool(align_corners), padding_mode)


def _as_list(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(features, Tensor):
        return [features]
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
    """Under autocast: maps to the widest dtype among them, vertices and camera to at least float32."""
    dtype = reduce(torch.promote_types, [feature.dtype for feature in maps])
    geometry = torch.promote_types(dtype, torch.float32)
    camera = camera.to(geometry) if isinstance(camera, Tensor) else camera
    return [feature.to(dtype) for feature in maps], vertices.to(geometry), camera


def _check_features(features: list[Tensor]) -> None:
    first = features[0]
    for i, feature in enumerate(features):
        if feature.dim() != 4:
            raise ValueError(f"features[{i}] must have shape (B, C, H, W), got {tuple(feature.shape)}")
        if feature.dtype not in DTYPES:
            raise TypeError(
                f"features[{i}] must be float32, float64, bfloat16 or float16, got {feature.dtype}"
            )
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
        if feature.shape[0] != first.shape[0]:
            raise ValueError(
                f"features must share one batch size, got {first.shape[0]} in features[0] and "
                f"{feature.shape[0]} in features[{i}]"
            )
        if feature.shape[2] == 0 or feature.shape[3] == 0:
            raise ValueError(
                f"features[{i}] must have a height and a width of at least 1, got {tuple(feature.shape)}"
            )


def _check_geometry(feature: Tensor, vertices: Tensor, camera: Tensor | None) -> None:
    if not isinstance(vertices, Tensor):
        raise TypeError(f"vertices must be a tensor, got {type(vertices).__name__}")
    if camera is not None and not isinstance(camera, Tensor):
        raise TypeError(f"camera must be a tensor or None, got {type(camera).__name__}")
    width = 2 if camera is None else 3
    if vertices.dim() != 3 or vertices.shape[2] != width:
        given = "without a camera" if camera is None else "with a camera"
        raise ValueError(f"vertices must have shape (B, N, {width}) {given}, got {tuple(vertices.shape)}")
    if vertices.shape[0] != feature.shape[0]:
        raise ValueError(
            f"vertices must have the maps' batch size {feature.shape[0]}, got {vertices.shape[0]} in shape "
            f"{tuple(vertices.shape)}"
        )
    half = feature.dtype in (torch.bfloat16, torch.float16)
    if vertices.dtype != feature.dtype and not (half and vertices.dtype == torch.float32):
        wanted = f"{feature.dtype} or torch.float32" if half else f"{feature.dtype}"
        raise TypeError(f"vertices must be {wanted} with maps of {feature.dtype}, got {vertices.dtype}")
    if vertices.device != feature.device:
        raise ValueError(f"vertices must be on the maps' device {feature.device}, got {vertices.device}")
    if camera is None:
        return
    batch = vertices.shape[0]
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
    height, width = int(image_size[0]), int(image_size[1])
    if height < least or width < least:
        raise ValueError(
            f"image_size must be at least {least} x {least} pixels with align_corners={align_corners}, "
            f"got {image_size!r}"
        )
    return height, width


# An autograd function sees only the tensors among its own arguments, so both take the maps one by one, at the
# end. `options` are (height, width, align_corners, border). What the kernels do not compute comes from the
# gather reference: forward mode by computing with it while a dual level is open, derivatives of gradients as
# the pullback of its pullback.


class _VertexSample(_library.OpFunction):
    @staticmethod
    def forward(vertices: Tensor, camera: Tensor | None, options: Options, *maps: Tensor) -> Tensor:
        return _library.below_autograd(_ops.vertex_sample, list(maps), vertices, camera, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        vertices, camera, ctx.options, *maps = inputs
        ctx.save_for_backward(vertices, camera, *maps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        vertices, camera, *maps = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[3:], *ctx.needs_input_grad[:2]]
        map_grads, *others = _ops.vertex_sample_backward(grad, maps, vertices, camera, *ctx.options, needs)
        found = [g if n else None for g, n in zip([*map_grads, *others], needs, strict=True)]
        return *found[-2:], None, *found[:-2]

    @classmethod
    def autograd_kernel(
        cls, features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any
    ) -> Tensor:
        if forward_ad._current_level >= 0:
            return _gather(options, strict=True)(vertices, camera, *features)
        return super().autograd_kernel(vertices, camera, options, *features)


class _VertexSampleBackward(_library.OpFunction):
    """Gives its gradients flat: of the maps, then of vertices and camera; empty where `needs` says so."""

    @staticmethod
    def forward(
        grad: Tensor,
        vertices: Tensor,
        camera: Tensor | None,
        options: Options,
        needs: tuple[bool, ...],
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        arguments = (grad, list(maps), vertices, camera, *options, list(needs))
        map_grads, *others = _library.below_autograd(_ops.vertex_sample_backward, *arguments)
        return *map_grads, *others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, vertices, camera, ctx.options, ctx.needs, *maps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, vertices, camera, *maps)
        ctx.save_for_forward(grad, vertices, camera, *maps)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:]]
        inputs = [i for i, need in enumerate(needs) if need]
        asked = [i for i, weight in zip(_order(saved), weights, strict=True) if weight is not None]
        found: list[Tensor | None] = [None] * len(saved)
        if asked:
            function = restricted(_gradients(ctx.options, asked), saved, inputs)
            pull = torch.func.vjp(function, *(saved[i] for i in inputs))[1]
            for i, value in zip(inputs, pull(tuple(w for w in weights if w is not None)), strict=True):
                found[i] = value
        return *found[:3], None, None, *found[3:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved = list(ctx.saved_tensors)
        _, vertices, camera, *maps = saved
        grad, *moved = *tangents[:3], *tangents[5:]
        if grad is None:
            grad = torch.zeros_like(saved[0])
        map_parts, *parts = _ops.vertex_sample_backward(
            grad, maps, vertices, camera, *ctx.options, list(ctx.needs)
        )
        found = dict(zip(_order(saved), [*map_parts, *parts], strict=True))
        inputs = [i for i, tangent in enumerate(moved, start=1) if tangent is not None]
        if inputs:
            asked = [i for i, part in found.items() if part.dim() > 1]
            function = restricted(_gradients(ctx.options, asked), saved, inputs)
            pushed = push_forward(function, [saved[i] for i in inputs], [moved[i - 1] for i in inputs])
            for i, part in zip(asked, pushed, strict=True):
                found[i] = found[i] + part
        return tuple(found.values())

    @classmethod
    def autograd_kernel(
        cls,
        grad: Tensor,
        features: list[Tensor],
        vertices: Tensor,
        camera: Tensor | None,
        *options: Any,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        *sizes, needs = options
        *maps, vertex_grad, camera_grad = super().autograd_kernel(
            grad, vertices, camera, tuple(sizes), tuple(needs), *features
        )
        return maps, vertex_grad, camera_grad


def _gather(options: Options, strict: bool = False) -> Callable[..., Tensor]:
    """The op in differentiable PyTorch, of (vertices, camera, *maps)."""
    height, width, align_corners, border = options
    mode = "border" if border else "zeros"

    def sample(vertices: Tensor, camera: Tensor | None, *maps: Tensor) -> Tensor:
        size = (height, width)
        return reference.vertex_sample_gather(maps, vertices, camera, size, align_corners, mode, strict)

    return sample


def _order(saved: list[Tensor | None]) -> list[int]:
    """Where, among (grad, vertices, camera, *maps), each gradient's tensor is."""
    return [*range(3, len(saved)), 1, 2]


def _gradients(options: Options, asked: list[int]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of those of (grad, vertices, camera, *maps) that are asked for, as a function of all."""

    def gradients(grad: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        places = [i - 1 for i in asked]
        function = restricted(_gather(options), list(others), places)
        pull = torch.func.vjp(function, *(others[i] for i in places))[1]
        return pull(grad)

    return gradients


def _fake_vertex_sample(
    features: list[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    height: int,
    width: int,
    align_corners: bool,
    border: bool,
) -> Tensor:
    channels = sum(feature.shape[1] for feature in features)
    return features[0].new_empty(vertices.shape[0], vertices.shape[1], channels)


def _fake_vertex_sample_backward(
    grad: Tensor,
    features: list[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    height: int,
    width: int,
    align_corners: bool,
    border: bool,
    needs: list[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    *need_maps, need_vertices, need_camera = needs
    need_camera = need_camera and camera is not None
    map_grads = [
        torch.empty_like(feature, memory_format=_grad_format(feature)) if need else feature.new_empty(0)
        for feature, need in zip(features, need_maps, strict=True)
    ]
    vertex_grad = vertices.new_empty(vertices.shape if need_vertices or need_camera else 0)
    camera_grad = vertices.new_empty(camera.shape if camera is not None and need_camera else 0)
    return map_grads, vertex_grad, camera_grad


def _grad_format(feature: Tensor) -> torch.memory_format:
    last = not feature.is_contiguous() and feature.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


def _vmap_vertex_sample(
    info: Any, dims: Any, features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    in_features, in_vertices, in_camera, *_ = dims
    count = info.batch_size
    if in_camera is None and all(dim is None for dim in in_features):
        # The same maps at other vertices are the same maps at more vertices.
        out = _ops.vertex_sample(features, _library.merged(vertices, in_vertices, into=1), camera, *options)
        return out.unflatten(1, (count, out.shape[1] // count)), 1
    maps = [_spread(m, dim, count) for m, dim in zip(features, in_features, strict=True)]
    out = _ops.vertex_sample(
        maps, _spread(vertices, in_vertices, count), _spread(camera, in_camera, count), *options
    )
    return _split(out, count), 0


def _vmap_vertex_sample_backward(
    info: Any,
    dims: Any,
    grad: Tensor,
    features: list[Tensor],
    vertices: Tensor,
    camera: Tensor | None,
    *options: Any,
) -> tuple[Any, Any]:
    in_grad, in_features, in_vertices, in_camera, *_ = dims
    count = info.batch_size
    map_grads, *others = _ops.vertex_sample_backward(
        _spread(grad, in_grad, count),
        [_spread(m, dim, count) for m, dim in zip(features, in_features, strict=True)],
        _spread(vertices, in_vertices, count),
        _spread(camera, in_camera, count),
        *options,
    )
    # A gradient that is not needed is an empty vector.
    batched = [[0 if g.dim() > 1 else None for g in map_grads], *(0 if g.dim() > 1 else None for g in others)]
    map_grads = [_split(g, count) if g.dim() > 1 else g for g in map_grads]
    return (map_grads, *(_split(g, count) if g.dim() > 1 else g for g in others)), tuple(batched)


def _spread(tensor: Any, dim: int | None, count: int) -> Any:
    """`count` batches as one, repeated where there is only one."""
    if tensor is None:
        return None
    if dim is None:
        tensor, dim = tensor.expand(count, *tensor.shape), 0
    return _library.merged(tensor, dim)


def _split(tensor: Tensor, count: int) -> Tensor:
    return tensor.unflatten(0, (count, tensor.shape[0] // count))


_library.register("vertex_sample", _fake_vertex_sample, _VertexSample.autograd_kernel, _vmap_vertex_sample)
_library.register(
    "vertex_sample_backward",
    _fake_vertex_sample_backward,
    _VertexSampleBackward.autograd_kernel,
    _vmap_vertex_sample_backward,
)
