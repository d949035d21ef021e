"""Code that the kernels of several ops share."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_rows(first, rows, COUNT: tl.constexpr):
    """The mesh and the row within it, for rows first ... first + COUNT - 1 of meshes with `rows` rows each.

    `first` is an int64 scalar and is divided once. All other arithmetic is 32-bit, except the returned mesh.
    """
    mesh = first // rows
    row = (first - mesh * rows).to(tl.int32) + tl.arange(0, COUNT)
    return mesh + row // rows, row % rows


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def check(condition: bool, message: str) -> None:
    """Raises ValueError unless `condition` holds; for conditions that memory safety needs, as in csrc."""
    if not condition:
        raise ValueError(message)


def check_operand(
    name: str, tensor: Tensor, device: torch.device, dims: int, dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError if a tensor's device, rank or dtype differs."""
    check(tensor.device == device, f"{name} must be on {device}, got {tensor.device}")
    check(tensor.dim() == dims, f"{name} must be of rank {dims}, got shape {tuple(tensor.shape)}")
    check(dtype in (None, tensor.dtype), f"{name} must be {dtype}, got {tensor.dtype}")


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised, of the dtype and on the device of `like`. `new_empty` crosses the dispatcher twice."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def check_small(**sizes: int) -> None:
    """Raises ValueError for a size that kernels cannot count in 32 bits, including the last tile's rows."""
    for name, size in sizes.items():
        if size > MOST:
            raise ValueError(
                f"{name.replace('_', ' ')} must be at most {MOST} in Triton's kernels, got {size}"
            )


#: The largest size that is counted in 32 bits, with room for a tile.
MOST = 2**31 - 2**16


def vector_width(*sizes: int) -> int:
    """How many neighbouring elements a kernel may access as one vector; it divides all of `sizes`."""
    return math.gcd(16, *sizes)


def block(size: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `size`, limited to [least, most]."""
    return min(max(triton.next_power_of_2(max(size, 1)), least), most)


def size_class(size: int) -> int:
    """A number that sizes with the same configuration share; each class spans a factor of four."""
    return (max(size, 1).bit_length() + 1) // 2


def processors(tensor: Tensor) -> int:
    """The number of multiprocessors of the GPU that holds `tensor`."""
    if tensor.device.type != "cuda":
        return 64
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
