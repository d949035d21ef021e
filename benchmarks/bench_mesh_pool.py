"""Mesh up-sampling, three entries a row: ours against gather + scatter_add, dense and CSR products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pahm_ops import MeshTransform, mesh_pool

BATCH = 32
#: coarse and fine vertices, channels
CASES = [(98, 195, 256), (195, 389, 128), (389, 778, 64)]


def gather_scatter(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """SpiralNet++'s Pool."""
    (rows, columns), values = matrix.indices(), matrix.values().unsqueeze(-1)

    def pool(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], matrix.shape[0], x.shape[2])
        index = rows[None, :, None].expand(x.shape[0], -1, x.shape[2])
        return out.scatter_add(1, index, x.index_select(1, columns) * values)

    return pool


def dense(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    full = matrix.to_dense()
    return lambda x: full @ x


def csr(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    compressed = matrix.to_sparse_csr()

    def pool(x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).reshape(x.shape[1], -1)
        return (compressed @ flat).view(matrix.shape[0], x.shape[0], x.shape[2]).transpose(0, 1).contiguous()

    return pool


@pytest.mark.parametrize("baseline", [gather_scatter, dense, csr], ids=["scatter_add", "dense", "csr"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "{} to {}, {} channels".format(*case))
def bench_mesh_pool(compare, direction, case, baseline):
    coarse, fine, channels = case
    x = torch.randn(BATCH, coarse, channels, requires_grad=True)
    # Corners of a coarse triangle have indices near each other; so have these.
    near = torch.arange(fine)[:, None] * coarse // fine
    columns = (near + torch.stack([torch.randperm(21)[:3] for _ in range(fine)])).remainder(coarse)
    values = torch.rand(fine, 3).softmax(1)
    rows = torch.arange(fine)[:, None].expand(-1, 3)
    matrix = torch.sparse_coo_tensor(
        torch.stack([rows.flatten(), columns.flatten()]), values.flatten(), (fine, coarse)
    ).coalesce()
    theirs = baseline(matrix)
    transform = MeshTransform.prepare(matrix)
    compare(direction(lambda: mesh_pool(x, transform), [x]), direction(lambda: theirs(x), [x]))
