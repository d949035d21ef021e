"""Mesh up-sampling with three entries per row: ours against gather + scatter_add, dense and CSR products."""

from collections.abc import Callable

import pytest
import torch
from measure import FLOAT, Work
from torch import Tensor

from pahm_ops import MeshTransform, mesh_pool

ENTRIES = 3
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


def work(batch: int, case: tuple[int, int, int], direction: str) -> Work:
    coarse, fine, channels = case
    passes = 1 if direction == "forward" else 2
    operations = 2 * ENTRIES * batch * fine * channels
    return Work(operations * passes, FLOAT * batch * (coarse + fine) * channels * passes)


@pytest.mark.parametrize("batch", [32, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "{} to {}, {} channels".format(*case))
def bench_mesh_pool(compare, compiled, timed, direction, case, batch):
    coarse, fine, channels = case
    x = torch.randn(batch, coarse, channels, requires_grad=True)
    # Corners of a coarse triangle have nearby indices, so do the same here.
    near = torch.arange(fine)[:, None] * coarse // fine
    columns = (near + torch.stack([torch.randperm(21)[:ENTRIES] for _ in range(fine)])).remainder(coarse)
    values = torch.rand(fine, ENTRIES).softmax(1)
    rows = torch.arange(fine)[:, None].expand(-1, ENTRIES)
    matrix = torch.sparse_coo_tensor(
        torch.stack([rows.flatten(), columns.flatten()]), values.flatten(), (fine, coarse)
    ).coalesce()
    transform = MeshTransform.prepare(matrix)
    contenders = {
        "ours": lambda x: mesh_pool(x, transform),
        "gather + scatter_add": gather_scatter(matrix),
        "dense": dense(matrix),
        "CSR": csr(matrix),
        **compiled(gather_scatter(matrix)),
    }
    compare(
        f"mesh_pool, batch {batch}, {direction}",
        {name: timed(lambda f=f: f(x), [x]) for name, f in contenders.items()},
        work(batch, case, direction),
    )
