"""mesh_pool's CUDA kernel, run on the CPU by the machine of tests/simt."""

import pytest
import torch
from paper_levels import CHANNELS, levels
from simt_kernels import DTYPES, SEEDS, needs_gxx
from simt_ops import (
    MESH_POOL,
    assert_same_sum,
    hostile,
    list_bound,
    pool,
    pool_least_bytes,
    wide_numbers,
)

from pahm_ops import MeshTransform
from pahm_ops.reference import mesh_pool as reference

pytestmark = needs_gxx

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def up_sampling(rows: int, vertices: int, dtype: torch.dtype = torch.float32) -> MeshTransform:
    """Three entries a row but for the last, which has none."""
    columns = torch.randint(0, vertices, (3 * (rows - 1),))
    places = torch.stack([torch.arange(rows - 1).repeat_interleave(3), columns])
    values = torch.rand(columns.numel(), dtype=dtype)
    return MeshTransform.prepare(torch.sparse_coo_tensor(places, values, (rows, vertices)))


def check(x, transform, transposed=False, **options):
    pointers, columns, values = transform.backward if transposed else transform.forward
    wanted = reference.mesh_pool(x.double(), pointers, columns, values)
    out, counts = pool(x, transform, transposed=transposed, **options)
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=TOLERANCE[x.dtype] * scale)
    return counts


@pytest.mark.parametrize("channels", [1, 3, 30, 64, 71, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_reference(dtype, channels, transposed, values):
    vertices, rows = (5, 9) if channels > 100 else (20, 39)
    x = torch.randn(2, rows if transposed else vertices, channels).to(dtype)
    check(x, up_sampling(rows, vertices, values), transposed)


@pytest.mark.parametrize(("rows", "vertices"), [(1, 1), (2, 1), (1, 98), (778, 98), (6890, 778)])
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size(dtype, rows, vertices, processors):
    check(torch.randn(1, vertices, 4).to(dtype), up_sampling(rows, vertices), processors=processors)


def test_no_mesh():
    check(torch.randn(0, 4, 8), up_sampling(5, 4))


def test_a_matrix_without_entries():
    empty = MeshTransform.prepare(torch.sparse_coo_tensor(torch.zeros(2, 0).long(), torch.zeros(0), (5, 4)))
    assert not pool(torch.randn(2, 4, 8), empty)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_numbers_survive_both_conversions(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers.nan_to_num(1.0, torch.inf, -torch.inf).view(1, 64, 1024)
    identity = MeshTransform.prepare(torch.eye(64).to_sparse())
    assert torch.equal(pool(x, identity)[0], x)


@pytest.mark.parametrize("channels", [64, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_order(dtype, channels):
    x, transform = torch.randn(2, 20, channels).to(dtype), up_sampling(39, 20)
    first, _ = pool(x, transform)
    for seed in SEEDS:
        assert torch.equal(pool(x, transform, seed=seed)[0], first)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_traffic_at_the_papers_levels(dtype, level, transposed):
    transform, channels = levels()[level].up, CHANNELS[level][0]
    x = torch.randn(2, transform.shape[0 if transposed else 1], channels).to(dtype)
    _, counts = pool(x, transform, processors=108, transposed=transposed)
    assert counts.dram_bytes <= 1.1 * pool_least_bytes(x, transform, transposed)
    # 64 channels of half precision leave four rows a warp, whose tables lie apart.
    narrow = channels * x.element_size() < 256
    assert counts.sectors <= (1.14 if narrow else 1.1) * counts.ideal_sectors
    assert counts.atomics == counts.shared_requests == 0


def test_sanitizers_find_nothing():
    check(torch.randn(2, 20, 8), up_sampling(39, 20), sanitize=True)
    check(torch.randn(1, 20, 3), up_sampling(39, 20), sanitize=True)


@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("what", ["columns", "row_pointers", "no vertices"])
def test_memory_is_safe_whatever_the_matrix_says(what, dtype, channels):
    vertices, rows = (0 if what == "no vertices" else 10), 20
    pointers, columns = torch.arange(0, 3 * rows + 1, 3).int(), torch.arange(3 * rows).int() % 10
    if what == "columns":
        columns = hostile(columns, vertices)
    if what == "row_pointers":
        pointers = hostile(pointers, len(columns), 2)
    x, values = torch.randn(2, vertices, channels).to(dtype), torch.rand(len(columns))
    out = torch.full((2, rows, channels), torch.nan, dtype=dtype)
    sizes = (2, vertices, rows, channels, len(columns), 4)
    MESH_POOL.call("mesh_pool", dtype, int(dtype == torch.float64), x, pointers, columns, values, out, *sizes)

    wanted = torch.zeros(2, rows, channels, dtype=torch.float64)
    for row in range(rows):
        begin, end = (list_bound(p, len(columns)) for p in pointers[row : row + 2])
        for e in range(begin, end):
            if 0 <= columns[e] < vertices:
                wanted[:, row] += values[e].double() * x[:, int(columns[e])].double()
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("channels", [8, 3])
def test_the_entries_of_a_row_are_added_up_in_their_order(channels):
    x, columns = wide_numbers(1, 30, channels), torch.randperm(30)
    out = torch.full((1, 1, channels), torch.nan)
    tables = torch.tensor([0, 30], dtype=torch.int32), columns.int(), torch.ones(30)
    MESH_POOL.call("mesh_pool", x.dtype, 0, x, *tables, out, 1, 30, 1, channels, 30, 4)
    assert_same_sum(out[0, 0], x[0, columns])
