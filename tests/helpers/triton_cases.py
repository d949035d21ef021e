"""What tests/pahm_ops/test_triton.py asks of the Triton kernels, run as a program of its own.

`python triton_cases.py DEVICE` runs the cases whose names it reads and prints a line of JSON each, [name,
complaint]. On "cpu" Triton interprets the kernels, which needs TRITON_INTERPRET=1 before it is imported.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton_checks as checks
import triton_sample_cases
from torch import Tensor
from triton_checks import DTYPES, check, name_of, on_device, random

from pahm_ops.prepared import SpiralTable
from pahm_ops.reference import mesh_pool as pool_reference
from pahm_ops.reference import spiral_conv as conv_reference

ACTIVATIONS = (None, "relu", "elu", "gelu")

# batch, vertices in and out, spiral, channels in and out, activation
CONVOLUTIONS = (
    (2, 7, 6, 3, 4, 5, None),
    (3, 20, 21, 9, 30, 17, "relu"),
    (2, 33, 33, 1, 71, 3, "elu"),
    (1, 12, 12, 9, 3, 64, "gelu"),
    (1, 3, 2, 2, 1025, 30, None),
    (1, 30, 20, 27, 8, 16, "elu"),
    (5, 60, 101, 1, 1, 1, None),
    (1, 1, 1, 1, 1, 1, "gelu"),
    (0, 5, 5, 2, 3, 4, "relu"),
    (2, 5, 0, 2, 3, 4, None),
    (2, 5, 5, 2, 0, 4, "elu"),
    (2, 5, 5, 2, 3, 0, None),
)


def tables(indices: Tensor, vertices: int) -> tuple[Tensor, ...]:
    """(table, t_pointers, t_rows) of spiral_conv_input_grad."""
    return tuple(on_device(tensor) for tensor in SpiralTable.prepare(indices, vertices)[2:])


def convolve(
    dtype: torch.dtype, sizes: Sequence[Any], table: Tensor | None = None, with_bias: bool = True
) -> None:
    """All three functions; on a GPU the gradients of float32 twice."""
    from pahm_ops.triton import spiral_conv as ours

    batch, vertices, rows, length, channels, out_channels, activation = sizes
    if table is None:
        table = torch.randint(0, vertices, (rows, length), generator=torch.Generator().manual_seed(1))
    x = random(batch, vertices, channels).to(dtype)
    weight = (random(out_channels, length * channels) / max(1, length * channels) ** 0.5).to(dtype)
    bias = random(out_channels).to(dtype) if with_bias else None
    grad = random(batch, rows, out_channels, seed=1).to(dtype)
    wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wide_bias = None if bias is None else bias.double()
    expected = conv_reference.spiral_conv(wide[0], table, wide[1], wide_bias, activation)
    linear = conv_reference.spiral_conv(wide[0], table, wide[1])
    expected_grads = torch.autograd.grad(linear, wide, grad.double())
    lists = tables(table, vertices)
    x, weight, bias, grad = map(on_device, (x, weight, bias, grad))
    out = ours.spiral_conv(x, *lists, weight, bias, ACTIVATIONS.index(activation))
    check("out", out, expected.detach(), dtype)

    def gradients() -> tuple[Tensor, Tensor]:
        x_grad = ours.spiral_conv_input_grad(grad, *lists, weight, vertices)
        return x_grad, ours.spiral_conv_weight_grad(grad, x, *lists)

    found = gradients()
    for name, a, b in zip(("x", "weight"), found, expected_grads, strict=True):
        check(f"gradient of {name}", a, b, dtype)
    if dtype == torch.float32 and checks.device == "cuda":
        assert all(map(torch.equal, gradients(), found)), "other bits"


def sums_of_many_rows_lose_nothing() -> None:
    """2049 has no float16: the sum of two rows' gradients must not be rounded before the product."""
    from pahm_ops.triton import spiral_conv as ours

    grad = torch.tensor([[[2048.0, 2048.0], [1.0, 0.0]]], dtype=torch.float16)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float16)
    lists = tables(torch.zeros(2, 1, dtype=torch.int64), 1)
    found = ours.spiral_conv_input_grad(on_device(grad), *lists, on_device(weight), 1)
    assert found.item() == 1


def elu_near_zero() -> None:
    from pahm_ops.triton import spiral_conv as ours

    x = -torch.logspace(-12, 2, 200, dtype=torch.float64).float().view(1, -1, 1)
    lists = tables(torch.arange(200).view(-1, 1), 200)
    found = ours.spiral_conv(on_device(x), *lists, on_device(torch.ones(1, 1)), None, 2)
    assert ((found.cpu().double() / x.double().expm1() - 1).abs() < 2e-6).all()


def nan_passes_activations() -> None:
    from pahm_ops.triton import spiral_conv as ours

    lists, weight = tables(torch.zeros(1, 1, dtype=torch.int64), 1), on_device(torch.ones(1, 1))
    x = on_device(torch.full((1, 1, 1), torch.nan))
    for activation in range(4):
        assert ours.spiral_conv(x, *lists, weight, None, activation).isnan().all()


def convolution_beyond_32_bits() -> None:
    from pahm_ops.triton import spiral_conv as ours

    vertices, channels = 2**20, 1088
    x = torch.empty(2, vertices, channels, dtype=torch.bfloat16, device=checks.device)
    x[0, -1], x[1, -1] = 1.0, 2.0
    table = torch.full((1, 1), vertices - 1, dtype=torch.int32, device=checks.device)
    weight = torch.ones(1, channels, dtype=torch.bfloat16, device=checks.device)
    out = ours.spiral_conv(x, table, table, table, weight, None, 0)
    assert out.view(-1).tolist() == [channels, 2 * channels]
    weight_grad = ours.spiral_conv_weight_grad(
        torch.ones(2, 1, 1, dtype=x.dtype, device=checks.device), x, table, table, table
    )
    assert (weight_grad == 3).all()


# batch, vertices, rows, channels
POOLS = (
    (2, 20, 39, 1),
    (2, 20, 39, 3),
    (3, 20, 39, 30),
    (2, 20, 39, 64),
    (2, 20, 39, 71),
    (1, 5, 4, 1025),
    (1, 1, 1, 24),
    (0, 5, 5, 8),
    (2, 5, 0, 8),
)


def pool(dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """A matrix of rows with no entry, one, three and many; some entries are zero."""
    from pahm_ops.triton import mesh_pool as ours

    batch, vertices, rows, channels = sizes
    lengths = torch.tensor([1, 0, 3, 3, 0, 11]).repeat(rows)[:rows]
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    columns = torch.randint(0, vertices, (int(lengths.sum()),), generator=torch.Generator().manual_seed(2))
    values = random(columns.numel()) * (columns != 2)
    values = values if dtype == torch.float64 else values.float()
    x = random(batch, vertices, channels).to(dtype)
    expected = pool_reference.mesh_pool(x.double(), pointers, columns, values.double())
    arguments = (x, pointers.int(), columns.int(), values)
    check("out", ours.mesh_pool(*map(on_device, (*arguments, *arguments[1:]))), expected, dtype)


def pool_of_an_empty_matrix() -> None:
    from pahm_ops.triton import mesh_pool as ours

    none = torch.zeros(0, dtype=torch.int32)
    arguments = torch.randn(2, 4, 5), torch.zeros(8, dtype=torch.int32), none, none.float()
    out = ours.mesh_pool(*map(on_device, (*arguments, *arguments[1:])))
    assert out.shape == (2, 7, 5) and (out == 0).all()


def pool_beyond_32_bits() -> None:
    from pahm_ops.triton import mesh_pool as ours

    vertices, channels = 2**20, 1100
    x = torch.empty(2, vertices, channels, dtype=torch.bfloat16, device=checks.device)
    x[0, -1], x[1, -1] = 1.0, 2.0
    matrix = torch.tensor([0, 1]), torch.tensor([vertices - 1]), torch.tensor([3.0])
    rows = [on_device(matrix[0].int()), on_device(matrix[1].int()), on_device(matrix[2])]
    out = ours.mesh_pool(x, *rows, *rows)
    assert (out[0] == 3).all() and (out[1] == 6).all()


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and functions."""
    for dtype in DTYPES:
        for sizes in CONVOLUTIONS:
            yield f"spiral_conv {name_of(dtype)} {sizes}", partial(convolve, dtype, sizes)
        same, other = torch.zeros(24, 2, dtype=torch.int64), (1, 4, 24, 2, 5, 6, None)
        yield f"spiral_conv {name_of(dtype)} of one vertex", partial(convolve, dtype, other, same, False)
        for sizes in POOLS:
            yield f"mesh_pool {name_of(dtype)} {sizes}", partial(pool, dtype, sizes)
    for function in (
        sums_of_many_rows_lose_nothing,
        elu_near_zero,
        nan_passes_activations,
        convolution_beyond_32_bits,
        pool_of_an_empty_matrix,
        pool_beyond_32_bits,
    ):
        yield function.__name__, function
    yield from triton_sample_cases.cases()


def main(device: str, names: Sequence[str]) -> None:
    checks.device = device
    torch.set_num_threads(1)
    found = dict(cases())
    for name in names:
        # So that what a kernel leaves out is NaN; the large tensors are not to be touched.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = "beyond" not in name
        complaint = None
        try:
            with np.errstate(all="ignore"):
                found[name]()
        except Exception:
            complaint = traceback.format_exc()
        print(json.dumps([name, complaint]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin.read().splitlines())
