"""What nodes of a tape are, as far as the kernels ask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pahm_ops.frozen.steps import channels
from pahm_ops.frozen.tape import Node, Value

aten = torch.ops.aten


def is_float(node: Node) -> bool:
    """Whether all tensors have numbers, float32 or constant int32."""
    tensors = [leaf for leaf in node.args if isinstance(leaf, (Tensor, Value))]
    return all(
        0 not in leaf.shape
        and (leaf.dtype == torch.float32 or (isinstance(leaf, Tensor) and leaf.dtype == torch.int32))
        for leaf in tensors
    )


def are_constants(*parts: Any) -> bool:
    return all(isinstance(part, Tensor) for part in parts)


def pair(values: Any) -> tuple[int, int]:
    values = [values] if isinstance(values, int) else list(values)
    return (values[0], values[-1])


def is_norm(node: Node) -> bool:
    """Whether this is a batch normalisation of a map by running statistics."""
    if node.op is not aten.batch_norm.default or len(node.outputs.shape) != 4 or node.args[5]:
        return False
    return are_constants(*node.args[3:5]) and not any(isinstance(part, Value) for part in node.args[1:3])


def is_product(node: Node) -> bool:
    """Whether this is a convolution of a map or a linear layer, of constant weights."""
    ranks = {aten.conv2d.default: (4,), aten.linear.default: (2, 3)}.get(node.op)
    if ranks is None or not is_float(node):
        return False
    x, weight, bias = node.args[0], node.args[1], node.argument(2)
    constant = not isinstance(weight, Value) and not isinstance(bias, Value)
    return isinstance(x, Value) and len(x.shape) in ranks and constant


def is_depthwise(node: Node, x: Value, pads: tuple[int, int, int, int]) -> bool:
    """Whether a convolution of `x`, padded by `pads`, is one of each channel that the kernel knows."""
    weight, stride = node.args[1], pair(node.argument(3, [1, 1]))
    if node.argument(6, 1) != channels(x) or len(weight) != channels(x):
        return False
    if pair(node.argument(5, [1, 1])) != (1, 1):
        return False
    return sees_pixels(x.shape[2:], node.outputs.shape[2:], weight.shape[2:], stride, pads)


def reads_padded(user: Node, value: Value, pads: list[int]) -> bool:
    """Whether `user` is a convolution that can pad `value` itself."""
    if user.op is not aten.conv2d.default or user.args[0] is not value or not is_product(user):
        return False
    if user.argument(6, 1) == 1:
        return True
    assert value.producer is not None
    own, (left, _, top, _) = pair(user.argument(4, [0, 0])), [*pads, 0, 0][:4]
    around = (own[0] + top, own[1] + left, 0, 0)
    return is_depthwise(user, value.producer.args[0], around)


def activation_of(node: Node) -> str | None:
    if node.op in (aten.relu.default, aten.relu_.default):
        return "relu"
    if node.op in (aten.relu6.default, aten.relu6_.default):
        return "relu6"
    if node.op in (aten.hardtanh.default, aten.hardtanh_.default) and node.args[1:] == (0.0, 6.0):
        return "relu6"
    if node.op is aten.gelu.default and not node.kwargs:
        return "gelu"
    if node.op in (aten.silu.default, aten.silu_.default):
        return "silu"
    return None


def added_by(node: Node, value: Value) -> Value | None:
    """What a plain sum of two values of one shape adds to `value`."""
    if node.op not in (aten.add.Tensor, aten.add_.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    other = second if first is value else first
    same = isinstance(other, Value) and other.shape == value.shape and other is not value
    return other if same and other.dtype == value.dtype else None


def sees_pixels(
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[int, ...],
) -> bool:
    """Whether the window of each output pixel holds at least one pixel of the map."""
    return all(pads[i] < kernel[i] and (out[i] - 1) * stride[i] - pads[i] < size[i] for i in range(2))


class PackedAttention(NamedTuple):
    """An attention of packed queries, keys and values, with the views around it."""

    packed: Value
    """`(B, N, 3 * heads * D)`."""
    output: Value
    """`(B, N, heads * D)`."""
    heads: int
    scale: float
    views: list[Node]


def packed_attention(node: Node) -> PackedAttention | None:
    """The attention around `node`, whose operands are unbound from one value and read by nothing else."""
    if node.op is not aten.scaled_dot_product_attention.default or not is_float(node):
        return None
    unbind = node.args[0].producer if isinstance(node.args[0], Value) else None
    if len(node.args) != 3 or set(node.kwargs) - {"scale"} or unbind is None:
        return None
    if unbind.op is not aten.unbind.int or unbind.argument(1, 0) != 0:
        return None
    if list(unbind.outputs) != list(node.args) or any(v.sole_user is not node for v in node.args):
        return None
    permute = unbind.args[0].producer
    if permute is None or permute.op is not aten.permute.default or permute.args[1] != [2, 0, 3, 1, 4]:
        return None
    view = permute.args[0].producer
    if view is None or view.op not in (aten.view.default, aten.reshape.default):
        return None
    packed = view.args[0]
    batch, vertices, three, heads, each = permute.args[0].shape
    chain = unbind.args[0].sole_user is unbind and permute.args[0].sole_user is permute
    if three != 3 or packed.shape != (batch, vertices, 3 * heads * each) or not chain:
        return None
    back = node.outputs.sole_user
    if back is None or back.op is not aten.transpose.int or set(back.args[1:]) != {1, 2}:
        return None
    flat = back.outputs.sole_user
    if flat is None or flat.op not in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return None
    if flat.outputs.shape != (batch, vertices, heads * each):
        return None
    scale = node.kwargs.get("scale")
    scale = each**-0.5 if scale is None else scale
    return PackedAttention(packed, flat.outputs, heads, scale, [view, permute, unbind, back, flat])


def soft_argmax(node: Node) -> tuple[Tensor, list[Node]] | None:
    """Two numbers a pixel `(2, pixels)`, whose means by the softmax of a map are computed from `node` on, and
    the nodes that do it.
    """
    ops = (aten.softmax.int, aten.unsqueeze.default, aten.mul.Tensor, aten.sum.dim_IntList)
    if node.op is not aten.flatten.using_ints or len(node.args[0].shape) != 4:
        return None
    chain = [node]
    for op in ops:
        following = chain[-1].outputs.sole_user
        if following is None or following.op is not op or following.args[0] is not chain[-1].outputs:
            return None
        chain.append(following)
    flat, softmax, unsqueeze, product, total = chain
    places = product.args[1]
    plain = flat.args[1:] == (2,) and softmax.args[1:] == (-1,) and unsqueeze.args[1:] == (2,)
    if not plain or list(total.args[1:]) != [[-1]] or total.kwargs or not are_constants(places):
        return None
    fits = tuple(places.shape) == (2, flat.outputs.shape[2]) and places.dtype == torch.float32
    return (places, chain) if fits else None
