"""Spiral convolution over the vertices of a mesh (SpiralNet++), without a gathered copy of the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pahm_ops import _library, _paths
from pahm_ops import _torch_internals as internals
from pahm_ops.constant_buffers import ConstantBuffers
from pahm_ops.reference import spiral_conv as reference

_ops = torch.ops.pahm_ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "elu", "gelu")
_GELU = ACTIVATIONS.index("gelu")


def spiral_conv(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Linear map of each vertex's spiral: ``out[b, m] = act(weight @ concat_l(x[b, indices[m, l]]) + bias)``.

    Args:
        x: vertex features (B, N, C) or (N, C); float32, float64, bfloat16 or float16, any strides.
        indices: int64 (M, L), L >= 1, the spiral of each output vertex, in [0, N). Usually M == N.
        weight: (Cout, L * C) of x's dtype; column ``l * C + c`` multiplies channel c of the l-th vertex.
        bias: (Cout,) of x's dtype, or None.
        activation: None, "relu", "elu" (alpha 1) or "gelu" (the exact one), applied while a result is in
            registers.

    Returns:
        (B, M, Cout) or (M, Cout), contiguous, of x's dtype; bfloat16 is summed in float32.

    Differentiable any number of times, and in forward mode, by x, weight and bias. The result and the
    gradients to x and weight have the same bits in every run, on the CPU for any number of threads; there
    float16 is computed in float32. On a GPU half precision is multiplied by tensor cores, float32 as well
    where PyTorch's own products may use TF32. Which configuration of these kernels was found fastest may
    change the order of a sum, but under ``torch.use_deterministic_algorithms`` it is always the same. The
    indices are checked once, and again when they change. `pahm_ops.backends()` tells what serves a device and
    a dtype. Under autocast floating-point arguments but float64 are cast as for a linear layer.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a rank, a shape, a device or the activation's name does not fit.
        IndexError: an index is negative or not below N.

    Source: SpiralNet++, Gong et al., arXiv:1911.05856; section 3.3 of the paper uses it as mesh convolution.
    """
    _check(x, indices, weight, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu', 'elu' or 'gelu', got {activation!r}")
    x, weight, bias = _autocast(x, weight, bias)
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    if _paths.served(x.device):
        batched, weight, bias = _library.widened(batched, weight, bias)
        if activation == "gelu" and not internals.EVERY_LEVEL:
            # Its gradient does not follow from its result.
            out = F.gelu(_ops.spiral_conv(batched, indices, weight, bias))
        else:
            out = _ops.spiral_conv(batched, indices, weight, bias, ACTIVATIONS.index(activation))
        out = out.to(x.dtype)
    else:
        _check_range(indices, batched.shape[1])
        out = reference.spiral_conv(batched, indices, weight, bias, activation)
    return out if x.dim() == 3 else out.squeeze(0)


class SpiralConv(ConstantBuffers):
    """`spiral_conv` with parameters of its own; loads SpiralNet++'s checkpoints and writes such.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        indices: int64 (M, L), checked when the module is called; a buffer outside the state_dict.
        dim: the dimension of the vertices, 1 (as SpiralNet++ calls it) or -2.
        activation: as `spiral_conv` takes it; none by default, as in SpiralNet++.

    Parameters: ``layer.weight`` (out_channels, L * in_channels), Xavier-uniform; ``layer.bias``, zero.
    Forward: (B, N, in_channels) or (N, in_channels) to (B, M, out_channels) or (M, out_channels).

    `layer` is an ``nn.Linear``. Where it has hooks of its own, is parametrised or was replaced (pruning,
    weight norm, LoRA, quantisation), the spirals are gathered and it is called, as in SpiralNet++.
    """

    indices: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        indices: Tensor,
        dim: int = 1,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        _check_indices(indices)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None, 'relu', 'elu' or 'gelu', got {activation!r}")
        if dim not in (1, -2):
            raise ValueError(f"dim must be 1 or -2, the dimension of the vertices, got {dim}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dim = dim
        self.seq_length = indices.shape[1]
        self.activation = activation
        self.register_constant("indices", indices)
        self.layer = nn.Linear(in_channels * indices.shape[1], out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if _is_plain(layer):
            return spiral_conv(x, self.indices, layer.weight, layer.bias, self.activation)
        batched = x if x.dim() == 3 else x.unsqueeze(0)
        _check_range(self.indices, batched.shape[1])
        out: Tensor = reference.ACTIVATIONS[self.activation](layer(reference.gather(batched, self.indices)))
        return out if x.dim() == 3 else out.squeeze(0)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{self.in_channels}, {self.out_channels}, spirals={tuple(self.indices.shape)}{activation}"


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` is the linear map of its weight and bias, and nothing else."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and not (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
        )
    )


def _check(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and (name != "bias" or value is not None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    _check_indices(indices)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (B, N, C) or (N, C), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    width = indices.shape[1] * x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"weight must be (Cout, {width}) for spirals of {indices.shape[1]} vertices with {x.shape[-1]} "
            f"channels, got shape {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be ({weight.shape[0]},) as weight has it, got shape {tuple(bias.shape)}")
    autocast = _library.autocast_dtype(x.device) is not None
    for name, tensor in (("indices", indices), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if name != "indices" and tensor.dtype != x.dtype and not autocast:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")


def _check_indices(indices: Tensor) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {indices.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"indices must be (M, L), got shape {tuple(indices.shape)}")
    if indices.shape[1] == 0:
        raise ValueError(f"indices must name at least one vertex a row, got shape {tuple(indices.shape)}")


def _check_range(indices: Tensor, vertices: int) -> None:
    # The compiled kernels check this themselves; a graph that is traced and a fake tensor have no values.
    if indices.numel() == 0 or torch.compiler.is_compiling() or indices.is_meta or internals.is_fake(indices):
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= vertices:
        raise IndexError(f"indices must lie in [0, {vertices}), got {low if low < 0 else high}")


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = _library.autocast_dtype(x.device)
    if dtype is None:
        return x, weight, bias
    if torch.float64 in (x.dtype, weight.dtype):
        dtype = torch.float64
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


# The map is linear in x and in weight, so that each of these three products is the gradient of the other two.
# The derivatives of ReLU and ELU follow from their results. GELU's does not: where it is wanted, GELU is an
# op of its own.


def _through_activation(grad: Tensor, output: Tensor | None, activation: int) -> Tensor:
    if output is None:
        return grad
    if activation == _GELU:
        raise NotImplementedError("the op has no gradient through gelu here: call pahm_ops.spiral_conv")
    if ACTIVATIONS[activation] == "relu":
        return torch.ops.aten.threshold_backward(grad, output, 0)
    return torch.ops.aten.elu_backward(grad, 1, 1, 1, True, output)


class _SpiralConv(_library.OpFunction):
    @staticmethod
    def forward(x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
        return _library.below_autograd(_ops.spiral_conv, x, indices, weight, bias, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, ctx.activation = inputs
        saved = (*inputs[:3], output if ctx.activation else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @classmethod
    def autograd_kernel(
        cls, x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, activation: int = 0
    ) -> Tensor:
        if activation == _GELU and _library.derivative_is_wanted((x, weight, bias)):
            return F.gelu(_ops.spiral_conv(x, indices, weight, bias))
        return super().autograd_kernel(x, indices, weight, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, weight, output = ctx.saved_tensors
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        grad = _through_activation(grad, output, ctx.activation)
        return (
            _ops.spiral_conv_input_grad(grad, indices, weight, x.shape[1]) if need_x else None,
            None,
            _ops.spiral_conv_weight_grad(grad, x, indices) if need_weight else None,
            grad.sum((0, 1)) if need_bias else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, indices, weight, output = ctx.saved_tensors
        dx, _, dweight, dbias, _ = tangents
        terms = [] if dx is None else [_ops.spiral_conv(dx, indices, weight, None)]
        if dweight is not None:
            terms.append(_ops.spiral_conv(x, indices, dweight, None))
        if dbias is not None:
            terms.append(dbias.expand(x.shape[0], indices.shape[0], -1))
        return _through_activation(sum(terms[1:], terms[0]), output, ctx.activation)


class _InputGrad(_library.OpFunction):
    @staticmethod
    def forward(grad: Tensor, indices: Tensor, weight: Tensor, vertices: int) -> Tensor:
        return _library.below_autograd(_ops.spiral_conv_input_grad, grad, indices, weight, vertices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.vertices = inputs[3]
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        grad, indices, weight = ctx.saved_tensors
        need_grad, _, need_weight, _ = ctx.needs_input_grad
        return (
            _ops.spiral_conv(grad_x, indices, weight, None) if need_grad else None,
            None,
            _ops.spiral_conv_weight_grad(grad, grad_x, indices) if need_weight else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        grad, indices, weight = ctx.saved_tensors
        dgrad, _, dweight, _ = tangents
        terms = []
        if dgrad is not None:
            terms.append(_ops.spiral_conv_input_grad(dgrad, indices, weight, ctx.vertices))
        if dweight is not None:
            terms.append(_ops.spiral_conv_input_grad(grad, indices, dweight, ctx.vertices))
        return sum(terms[1:], terms[0])


class _WeightGrad(_library.OpFunction):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        return _library.below_autograd(_ops.spiral_conv_weight_grad, grad, x, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, indices = ctx.saved_tensors
        need_grad, need_x, _ = ctx.needs_input_grad
        return (
            _ops.spiral_conv(x, indices, grad_weight, None) if need_grad else None,
            _ops.spiral_conv_input_grad(grad, indices, grad_weight, x.shape[1]) if need_x else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        grad, x, indices = ctx.saved_tensors
        dgrad, dx, _ = tangents
        terms = [] if dgrad is None else [_ops.spiral_conv_weight_grad(dgrad, x, indices)]
        if dx is not None:
            terms.append(_ops.spiral_conv_weight_grad(grad, dx, indices))
        return sum(terms[1:], terms[0])


def _fake_spiral_conv(
    x: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, activation: int = 0
) -> Tensor:
    return x.new_empty(x.shape[0], indices.shape[0], weight.shape[0])


def _fake_input_grad(grad: Tensor, indices: Tensor, weight: Tensor, vertices: int) -> Tensor:
    return grad.new_empty(grad.shape[0], vertices, weight.shape[1] // indices.shape[1])


def _fake_weight_grad(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[2], indices.shape[1] * x.shape[2])


# Batching rules: a batch of meshes is more meshes, one of weights or output gradients more output channels.


def _vmap_spiral_conv(
    info: Any,
    dims: Any,
    x: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int = 0,
) -> tuple[Tensor, int]:
    in_x, in_indices, in_weight, in_bias, *_ = dims
    if in_indices is None and in_weight is None and in_bias is None:
        out = _ops.spiral_conv(_library.merged(x, in_x), indices, weight, bias, activation)
        return out.unflatten(0, (info.batch_size, x.shape[0 if in_x else 1])), 0
    if in_x is None and in_indices is None and in_weight is not None:
        if bias is not None:
            bias = bias.repeat(info.batch_size) if in_bias is None else _library.merged(bias, in_bias)
        out = _ops.spiral_conv(x, indices, _library.merged(weight, in_weight), bias, activation)
        return out.unflatten(2, (info.batch_size, weight.shape[0 if in_weight else 1])), 2
    arguments = (x, indices, weight, bias, activation)
    return _library.one_by_one(_ops.spiral_conv, info.batch_size, (*dims[:4], None), arguments)


def _vmap_input_grad(
    info: Any, dims: Any, grad: Tensor, indices: Tensor, weight: Tensor, vertices: int
) -> tuple[Tensor, int]:
    if dims[1] is None and dims[2] is None:
        out = _ops.spiral_conv_input_grad(_library.merged(grad, dims[0]), indices, weight, vertices)
        return out.unflatten(0, (info.batch_size, grad.shape[0 if dims[0] else 1])), 0
    arguments = (grad, indices, weight, vertices)
    return _library.one_by_one(_ops.spiral_conv_input_grad, info.batch_size, dims, arguments)


def _vmap_weight_grad(info: Any, dims: Any, grad: Tensor, x: Tensor, indices: Tensor) -> tuple[Tensor, int]:
    if dims[1] is None and dims[2] is None:
        out = _ops.spiral_conv_weight_grad(_library.merged(grad, dims[0], into=2), x, indices)
        return out.unflatten(0, (info.batch_size, grad.shape[2 if dims[0] == 3 else 3])), 0
    return _library.one_by_one(_ops.spiral_conv_weight_grad, info.batch_size, dims, (grad, x, indices))


_library.register("spiral_conv", _fake_spiral_conv, _SpiralConv, _vmap_spiral_conv)
_library.register("spiral_conv_input_grad", _fake_input_grad, _InputGrad, _vmap_input_grad)
_library.register("spiral_conv_weight_grad", _fake_weight_grad, _WeightGrad, _vmap_weight_grad)
