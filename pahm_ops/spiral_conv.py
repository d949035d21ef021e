"""Spiral convolution over the vertices of a mesh (SpiralNet++), without a gathered copy of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pahm_ops.autograd import spiral_conv as autograd
from pahm_ops.backends import autocast_dtype, served, widened
from pahm_ops.constant_buffers import ConstantBuffers
from pahm_ops.prepared import SpiralTable, check_indices, spiral_table
from pahm_ops.reference import spiral_conv as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: The op takes an activation's position in this tuple.
ACTIVATIONS = (None, "relu", "elu", "gelu")


def spiral_conv(
    x: Tensor,
    indices: Tensor | SpiralTable,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Linear map of each vertex's spiral: ``out[b, m] = act(weight @ concat_l(x[b, indices[m, l]]) + bias)``.

    Args:
        x: vertex features (B, N, C) or (N, C); float32, float64, bfloat16 or float16, any strides.
        indices: a `SpiralTable` of N vertices, or int64 (M, L), L >= 1, the spiral of each output vertex, in
            [0, N). Usually M == N. A plain tensor is prepared at its first call, which waits for a GPU, and
            the table is cached while the tensor lives: pass the same tensor each time, not a new view of it.
            The op notices changes of its values, except changes through ``.data``. A tensor made in inference
            mode is prepared at each call. Prepare a table yourself under ``torch.compile``, which would make
            one at each call, and before the capture of a CUDA graph; the table must outlive the graph.
        weight: (Cout, L * C) of x's dtype; column ``l * C + c`` multiplies channel c of the l-th vertex.
        bias: (Cout,) of x's dtype, or None.
        activation: None, "relu", "elu" (alpha 1) or "gelu" (the exact one), applied while a result is in
            registers.

    Returns:
        (B, M, Cout) or (M, Cout), contiguous, of x's dtype; bfloat16 is summed in float32.

    Differentiable any number of times, and in forward mode, with respect to x, weight and bias. The result
    and the gradients to x and weight have the same bits in every run, and on the CPU for any number of
    threads. The CPU computes float16 in float32. On a GPU tensor cores multiply half precision, and float32
    too if PyTorch's own products may use TF32. These kernels are tuned, and the configuration may change the
    order of a sum; under ``torch.use_deterministic_algorithms`` it is always the same.
    `pahm_ops.backends()` shows what runs on a device with each dtype. Under autocast floating-point
    arguments except float64 are cast as for a linear layer.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a rank, a shape, a device or the activation's name does not fit.
        IndexError: an index is negative or not below N.

    Source: SpiralNet++, Gong et al., arXiv:1911.05856; section 3.3 of the paper uses it as mesh convolution.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (B, N, C) or (N, C), got shape {tuple(x.shape)}")
    if not isinstance(indices, SpiralTable):
        check_indices(indices)
    _check(x, indices, weight, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu', 'elu' or 'gelu', got {activation!r}")
    table = indices if isinstance(indices, SpiralTable) else spiral_table(indices, x.shape[-2])
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        if torch.float64 in (x.dtype, weight.dtype):
            dtype = torch.float64
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    if not served(x.device):
        out = reference.spiral_conv(batched, table.indices, weight, bias, activation)
    elif x.dtype == torch.float16:
        wide, weight, bias = widened(batched, weight, bias)
        out = autograd.spiral_conv(wide, *table[2:], weight, bias, ACTIVATIONS.index(activation)).to(x.dtype)
    else:
        out = autograd.spiral_conv(batched, *table[2:], weight, bias, ACTIVATIONS.index(activation))
    return out if x.dim() == 3 else out.squeeze(0)


class SpiralConv(ConstantBuffers):
    """`spiral_conv` with its own parameters; its checkpoints are compatible with SpiralNet++'s.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        indices: int64 (M, L), prepared once; the module keeps them as buffers outside the state_dict.
        dim: the dimension of the vertices, 1 (as in SpiralNet++) or -2.
        activation: as in `spiral_conv`; none by default, as in SpiralNet++.
        vertices: N of the input; by default M, or the largest index plus 1 if that is more.

    Parameters: ``layer.weight`` (out_channels, L * in_channels), Xavier-uniform; ``layer.bias``, zero.
    Forward: (B, N, in_channels) or (N, in_channels) to (B, M, out_channels) or (M, out_channels).

    `layer` is an ``nn.Linear``. If it has hooks, is parametrised or was replaced (pruning, weight norm, LoRA,
    quantisation), the spirals are gathered and `layer` is called on them, as in SpiralNet++.

    Raises TypeError, ValueError or IndexError for indices as `SpiralTable.prepare` does, and ValueError for
    another `dim` or activation. A call raises as `spiral_conv` does.
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
        vertices: int | None = None,
    ) -> None:
        super().__init__()
        check_indices(indices)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None, 'relu', 'elu' or 'gelu', got {activation!r}")
        if dim not in (1, -2):
            raise ValueError(f"dim must be 1 or -2, the dimension of the vertices, got {dim}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dim = dim
        self.seq_length = indices.shape[1]
        self.activation = activation
        if vertices is None:
            named = 0 if indices.is_meta or not indices.numel() else int(indices.max()) + 1
            vertices = max(indices.shape[0], named)
        self.vertices = vertices
        for name, tensor in zip(_PARTS, SpiralTable.prepare(indices, vertices)[1:], strict=True):
            self.register_constant(name, tensor)
        self.layer = nn.Linear(in_channels * indices.shape[1], out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    @property
    def spirals(self) -> SpiralTable:
        """The spirals, made of the module's buffers."""
        buffers: Any = self._buffers  # reading each as an attribute would take as long as a check of the op
        indices, table, t_pointers, t_rows = _PARTS
        return SpiralTable(
            self.vertices, buffers[indices], buffers[table], buffers[t_pointers], buffers[t_rows]
        )

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        # An x with another number of vertices is an error only if the spirals do not fit it.
        fits = not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-2] == self.vertices
        table = self.spirals if fits else spiral_table(self.indices, x.shape[-2])
        if _is_plain(layer):
            return spiral_conv(x, table, layer.weight, layer.bias, self.activation)
        batched = x if x.dim() == 3 else x.unsqueeze(0)
        out: Tensor = reference.ACTIVATIONS[self.activation](layer(reference.gather(batched, table.indices)))
        return out if x.dim() == 3 else out.squeeze(0)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{self.in_channels}, {self.out_channels}, spirals={tuple(self.indices.shape)}{activation}"


_PARTS = ("indices", "table", "t_pointers", "t_rows")


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` only applies the linear map of its weight and bias."""
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


def _check(x: Tensor, indices: Tensor | SpiralTable, weight: Tensor, bias: Tensor | None) -> None:
    given = indices.indices if isinstance(indices, SpiralTable) else indices
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and (name != "bias" or value is not None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    dtype, device, channels, length = x.dtype, x.device, x.shape[-1], given.shape[1]
    if dtype not in DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {dtype}")
    if isinstance(indices, SpiralTable) and x.shape[-2] != indices.vertices:
        raise ValueError(
            f"x must have the {indices.vertices} vertices of the spiral table, got shape {tuple(x.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != length * channels:
        raise ValueError(
            f"weight must be (Cout, {length * channels}) for spirals of {length} vertices with {channels} "
            f"channels, got shape {tuple(weight.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"bias must be ({weight.shape[0]},) as weight has it, got shape {tuple(bias.shape)}")
    for name, tensor in (("indices", given), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on x's device {device}, got {tensor.device}")
        if tensor.dtype != dtype and name != "indices" and autocast_dtype(device) is None:
            raise TypeError(f"{name} must have x's dtype {dtype}, got {tensor.dtype}")
