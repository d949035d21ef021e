"""Inputs and checks of the cases that are run on the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Relative to the largest element. Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}

#: Where the kernels run; "cpu" is Triton's interpreter.
device = "cpu"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )


def on_device(value: Any) -> Any:
    return value.detach().to(device) if isinstance(value, Tensor) else value


def check(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float = 0.0) -> None:
    assert found.dtype == dtype and found.shape == expected.shape, (name, found.dtype, found.shape)
    found = found.detach().cpu().double()
    assert found.isfinite().all(), f"{name} is not finite"
    if found.numel():
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= (tolerance or TOLERANCE[dtype]), f"{name} is off by {error:.1e}"
