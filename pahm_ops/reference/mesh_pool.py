"""Mesh sampling of CoMA (Ranjan et al., arXiv:1807.10267): vertex features times a sparse matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def mesh_pool(x: Tensor, row_pointers: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x (B, N, C); row_pointers (M + 1,), columns (E,), values (E,) of a CSR matrix (M, N) -> (B, M, C).

    Half-precision input is summed in float32.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The row of each entry, counted by the rows that have begun. (repeat_interleave is not available in ONNX,
    # nor are int32 indices.)
    begun, starts = row_pointers.new_zeros(columns.numel() + 1, dtype=torch.int64), row_pointers[1:-1].long()
    rows = begun.index_add(0, starts, torch.ones_like(starts)).cumsum(0)[:-1]
    products = x.index_select(1, columns.long()).to(dtype) * values.to(dtype)[:, None]
    out = products.new_zeros(x.shape[0], row_pointers.numel() - 1, x.shape[2])
    return out.index_add(1, rows, products).to(x.dtype)
