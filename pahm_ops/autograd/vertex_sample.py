"""The derivatives, the fake kernels and the batching rules of `vertex_sample`.

The gather reference in plain PyTorch computes what the kernels do not. Forward mode runs the reference while
a dual level is open. Derivatives of gradients are the pullback of its pullback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pahm_ops import _torch_internals as internals
from pahm_ops.autograd._shared import (
    GRADIENT,
    NONE,
    OpFunction,
    derivative,
    merged,
    push_forward,
    restricted,
    run,
    run_at_level,
)
from pahm_ops.backends import kernel
from pahm_ops.reference import vertex_sample as reference

Options = tuple[int, int, bool, bool]
"""(height, width, align_corners, border)"""


def vertex_sample(vertices: Tensor, camera: Tensor | None, options: Options, maps: list[Tensor]) -> Tensor:
    """The op, differentiable with respect to vertices, camera and maps."""
    how = derivative(vertices, camera, *maps)
    if how == NONE:
        return run(kernel("vertex_sample", vertices), maps, vertices, camera, *options)
    if how != GRADIENT:
        return kernel("vertex_sample", vertices)(maps, vertices, camera, *options)
    # An autograd function sees only the tensors among its own arguments, so each map is an argument.
    return _VertexSample.apply(vertices, camera, options, *maps)


def vertex_sample_backward(
    grad: Tensor,
    vertices: Tensor,
    camera: Tensor | None,
    options: Options,
    needs: tuple[bool, ...],
    *maps: Tensor,
) -> tuple[Tensor, ...]:
    """Differentiable gradients of the maps, vertices and camera; empty if `needs` does not ask for them."""
    how = derivative(grad, vertices, camera, *maps)
    if how == GRADIENT:
        return _VertexSampleBackward.apply(grad, vertices, camera, options, needs, *maps)
    op = kernel("_vertex_sample_backward", grad)
    arguments = (grad, list(maps), vertices, camera, *options, list(needs))
    map_grads, *others = run(op, *arguments) if how == NONE else op(*arguments)
    return *map_grads, *others


# ---- vertex_sample ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    vertices, camera, ctx.options, *maps = inputs
    # A map's gradient has the map's shape and memory format, so keep the maps even if no point needs one.
    ctx.save_for_backward(vertices, camera, *maps)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    vertices, camera, *maps = ctx.saved_tensors
    need_vertices, need_camera, _, *need_maps = ctx.needs_input_grad
    needs = (*need_maps, need_vertices, need_camera)
    found = vertex_sample_backward(grad, vertices, camera, ctx.options, needs, *maps)
    *map_grads, vertex_grad, camera_grad = (g if n else None for g, n in zip(found, needs, strict=True))
    return vertex_grad, camera_grad, None, *map_grads


class _VertexSample(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs)
        vertices, camera, options, *maps = inputs
        out: Tensor = run(kernel("vertex_sample", vertices), maps, vertices, camera, *options)
        return out

    backward = staticmethod(_backward)


class _VertexSampleOp(OpFunction):
    @staticmethod
    def flat(features: list[Any], vertices: Any, camera: Any, *options: Any) -> tuple[Any, ...]:
        return vertices, camera, options, *features

    @staticmethod
    def nested(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        return list(gradients[3:]), *gradients[:2], None, None, None, None

    @staticmethod
    def forward(vertices: Tensor, camera: Tensor | None, options: Options, *maps: Tensor) -> Tensor:
        op = kernel("vertex_sample", vertices)
        out: Tensor = run_at_level(op, list(maps), vertices, camera, *options)
        return out

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)

    @classmethod
    def autograd_kernel(
        cls, features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any
    ) -> Any:
        if internals.dual_level_open():
            return _gather(options, strict=vertices.is_cpu)(vertices, camera, *features)
        return super().autograd_kernel(features, vertices, camera, *options)


# ---- its gradients ----


def _save_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    grad, vertices, camera, ctx.options, ctx.needs, *maps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, vertices, camera, *maps)
    ctx.save_for_forward(grad, vertices, camera, *maps)


def _second_backward(ctx: Any, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
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


class _VertexSampleBackward(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        _save_for_second(ctx, inputs)
        grad, vertices, camera, options, needs, *maps = inputs
        op = kernel("_vertex_sample_backward", grad)
        map_grads, *others = run(op, grad, maps, vertices, camera, *options, list(needs))
        return *map_grads, *others

    backward = staticmethod(_second_backward)


class _VertexSampleBackwardOp(OpFunction):
    @staticmethod
    def flat(grad: Any, features: list[Any], vertices: Any, camera: Any, *options: Any) -> tuple[Any, ...]:
        *sizes, needs = options
        return grad, vertices, camera, tuple(sizes), needs, *features

    @staticmethod
    def nested(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        return gradients[0], list(gradients[5:]), *gradients[1:3], None, None, None, None, None

    @staticmethod
    def results(outputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
        *maps, vertex_grad, camera_grad = outputs
        return maps, vertex_grad, camera_grad

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        grad, vertices, camera, options, needs, *maps = inputs
        op = kernel("_vertex_sample_backward", grad)
        map_grads, *others = run_at_level(op, grad, maps, vertices, camera, *options, list(needs))
        return *map_grads, *others

    setup_context = staticmethod(_save_for_second)
    backward = staticmethod(_second_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        saved = list(ctx.saved_tensors)
        grad, *moved = *tangents[:3], *tangents[5:]
        if grad is None:
            grad = torch.zeros_like(saved[0])
        parts = vertex_sample_backward(grad, saved[1], saved[2], ctx.options, tuple(ctx.needs), *saved[3:])
        found = dict(zip(_order(saved), parts, strict=True))
        inputs = [i for i, tangent in enumerate(moved, start=1) if tangent is not None]
        if inputs:
            asked = [i for i, part in found.items() if part.dim() > 1]
            function = restricted(_gradients(ctx.options, asked), saved, inputs)
            pushed = push_forward(function, [saved[i] for i in inputs], [moved[i - 1] for i in inputs])
            for i, part in zip(asked, pushed, strict=True):
                found[i] = found[i] + part
        return tuple(found.values())


def _gather(options: Options, strict: bool = False) -> Callable[..., Tensor]:
    """The op in differentiable PyTorch, as a function of (vertices, camera, *maps)."""
    height, width, align_corners, border = options
    mode = "border" if border else "zeros"

    def sample(vertices: Tensor, camera: Tensor | None, *maps: Tensor) -> Tensor:
        size = (height, width)
        return reference.vertex_sample_gather(maps, vertices, camera, size, align_corners, mode, strict)

    return sample


def _order(saved: list[Tensor | None]) -> list[int]:
    """The position in (grad, vertices, camera, *maps) of each gradient's tensor."""
    return [*range(3, len(saved)), 1, 2]


def _gradients(options: Options, asked: list[int]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the `asked` tensors in (grad, vertices, camera, *maps), as a function of all."""

    def gradients(grad: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        places = [i - 1 for i in asked]
        function = restricted(_gather(options), list(others), places)
        pull = torch.func.vjp(function, *(others[i] for i in places))[1]
        return pull(grad)

    return gradients


def _spread(tensor: Any, dim: int | None, count: int) -> Any:
    """`count` batches merged into one; a single batch is repeated."""
    if tensor is None:
        return None
    if dim is None:
        tensor, dim = tensor.expand(count, *tensor.shape), 0
    return merged(tensor, dim)


def _split(tensor: Tensor, count: int) -> Tensor:
    return tensor.unflatten(0, (count, tensor.shape[0] // count))


def _grad_format(feature: Tensor) -> torch.memory_format:
    last = not feature.is_contiguous() and feature.stride(1) == 1
    return torch.channels_last if last else torch.contiguous_format


def _fake(
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


def _fake_backward(
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


def _vmap(
    info: Any, dims: Any, features: list[Tensor], vertices: Tensor, camera: Tensor | None, *options: Any
) -> tuple[Tensor, int]:
    in_features, in_vertices, in_camera, *_ = dims
    count = info.batch_size
    if in_camera is None and all(dim is None for dim in in_features):
        # Batched vertices on the same maps are the same maps with more vertices.
        out = vertex_sample(merged(vertices, in_vertices, into=1), camera, options, features)
        return out.unflatten(1, (count, out.shape[1] // count)), 1
    maps = [_spread(m, dim, count) for m, dim in zip(features, in_features, strict=True)]
    points = _spread(vertices, in_vertices, count), _spread(camera, in_camera, count)
    return _split(vertex_sample(*points, options, maps), count), 0


def _vmap_backward(
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
    *sizes, needs = options
    found = vertex_sample_backward(
        _spread(grad, in_grad, count),
        _spread(vertices, in_vertices, count),
        _spread(camera, in_camera, count),
        tuple(sizes),
        needs,
        *(_spread(m, dim, count) for m, dim in zip(features, in_features, strict=True)),
    )
    map_grads, others = list(found[:-2]), found[-2:]
    # An unneeded gradient is an empty vector.
    batched = [[0 if g.dim() > 1 else None for g in map_grads], *(0 if g.dim() > 1 else None for g in others)]
    map_grads = [_split(g, count) if g.dim() > 1 else g for g in map_grads]
    return (map_grads, *(_split(g, count) if g.dim() > 1 else g for g in others)), tuple(batched)


_VertexSampleOp.register("vertex_sample", _fake, _vmap)
_VertexSampleBackwardOp.register("_vertex_sample_backward", _fake_backward, _vmap_backward)
