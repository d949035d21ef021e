"""CUDA kernels on the CPU: the machine of tests/simt catches planted faults; kernels equal the reference."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pahm_ops import MeshTransform
from pahm_ops.reference import mesh_pool as reference_pool

SIMT = Path(__file__).parent / "simt"
FLAGS = [
    "-O1",
    "-std=c++20",
    "-Wall",
    "-Wno-unknown-pragmas",
    f"-I{SIMT.parent.parent / 'csrc'}",
    f"-I{SIMT}",
]
#: as tests/simt/run.h numbers them
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SEEDS = range(20)
RACE = (
    "two threads touch shared memory, one writes, no barrier between",
    "shared memory is overwritten that another thread may yet read",
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def build(folder: Path, source: str, *flags: str) -> Path:
    result = folder / source.replace(".cpp", "")
    command = ["g++", *FLAGS, *flags, str(SIMT / source), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="module")
def faults(folder: Path) -> Path:
    return build(folder, "faults.cpp")


def said(faults: Path, name: str) -> set[str]:
    """What the machine says of a kernel of faults.cpp, over all seeds."""
    done = subprocess.run([faults, name, str(len(SEEDS))], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(SEEDS)
    return set(lines)


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("reverse", "sum 8128.000000, first 127.000000, conflicts 0, sectors 32 of 32, atomics 0"),
        ("tree_sum", "sum 8128.000000, first 8128.000000, conflicts 0, sectors 17 of 17, atomics 0"),
        ("neighbour", "sum 8128.000000, first 32.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        (
            "neighbour in the warp",
            "sum 8128.000000, first 1.000000, conflicts 0, sectors 16 of 16, atomics 0",
        ),
        ("overwrite", "sum 384.000000, first 3.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        ("crowd", "sum 384.000000, first 3.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        ("count_up", "sum 128.000000, first 128.000000, conflicts 0, sectors 4 of 4, atomics 128"),
        ("barrier", "sum 128.000000, first 1.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        ("warp_sum", "sum 8128.000000, first 496.000000, conflicts 0, sectors 20 of 20, atomics 0"),
        ("warp_sum of half", "sum 3552.000000, first 120.000000, conflicts 0, sectors 20 of 20, atomics 0"),
        ("vote", "sum 2048.000000, first 16.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        ("shift", "sum 8128.000000, first 0.000000, conflicts 0, sectors 32 of 32, atomics 0"),
        ("unwritten", "sum 256.000000, first 2.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        ("column", "sum 65472.000000, first 0.000000, conflicts 0, sectors 16 of 16, atomics 0"),
        ("column, conflict", "sum 63488.000000, first 0.000000, conflicts 124, sectors 16 of 16, atomics 0"),
        ("strided", "sum 1984.000000, first 0.000000, conflicts 0, sectors 32 of 32, atomics 0"),
        ("strided, far", "sum 15872.000000, first 0.000000, conflicts 0, sectors 144 of 32, atomics 0"),
    ],
)
def test_sound_kernels_run_the_same_in_any_order_and_are_counted(faults, name, result):
    assert said(faults, name) == {result}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "reverse, no barrier",
            ("shared memory is read that nobody wrote", "two threads touch shared memory"),
        ),
        ("tree_sum, missing barrier", ("shared memory is overwritten", "two threads touch shared memory")),
        ("neighbour, no barrier", RACE),
        ("neighbour, warp barrier only", RACE),
        ("overwrite, warp barrier only", RACE),
        ("crowd, all", RACE[:1]),
        ("barrier, half has ended", ("a barrier is not reached by a thread that has ended",)),
        ("barrier, two places", ("threads wait at different barriers",)),
        ("warp_sum, absent lanes", ("a warp operation waits for lane 16",)),
        ("warp_sum, lane left out", ("a shuffle reads lane", "lane")),
        ("vote, not asked", ("lane 31 is not in its own mask",)),
        ("shift, off by one", ("an access of 4 bytes outside every buffer",)),
        ("unwritten, half", ("shared memory is read that nobody wrote",)),
    ],
)
def test_planted_faults_are_caught_in_every_order(faults, name, complaint):
    for line in said(faults, name):
        assert line.startswith(tuple(f"failed: {part}" for part in complaint)), line


def test_a_race_in_global_memory_shows_between_orders(faults):
    assert len(said(faults, "count_up, race")) > 1


class Counts(ctypes.Structure):
    """simt::Counts."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "loaded_bytes",
            "stored_bytes",
            "requests",
            "sectors",
            "ideal_sectors",
            "atomics",
            "shared_requests",
            "bank_conflicts",
        )
    ]


class Kernels:
    """A library of kernels; `call` names the tensors that they may touch and raises what the machine says."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: object, seed: int = 0) -> Counts:
        self.library.forget_buffers()
        raw, counts = [], Counts()
        for value in arguments:
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                self.library.allow(ctypes.c_void_p(value.data_ptr()), ctypes.c_size_t(value.nbytes))
                raw.append(ctypes.c_void_p(value.data_ptr()))
            else:
                raw.append(value)
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        complaint = function(*raw, ctypes.c_uint64(seed), ctypes.byref(counts))
        if complaint is not None:
            raise RuntimeError(complaint.decode())
        return counts


@pytest.fixture(scope="module")
def pool(folder: Path) -> Kernels:
    return Kernels(build(folder, "mesh_pool.cpp", "-shared", "-fPIC"))


def up_sampling(rows: int, vertices: int) -> MeshTransform:
    """Three entries a row but for the last, which has none."""
    columns = torch.randint(0, vertices, (3 * (rows - 1),))
    places = torch.stack([torch.arange(rows - 1).repeat_interleave(3), columns])
    values = torch.rand(columns.numel())
    return MeshTransform.prepare(torch.sparse_coo_tensor(places, values, (rows, vertices)))


def run_pool(
    pool: Kernels, x: Tensor, transform: MeshTransform, together: int = 16, seed: int = 0
) -> tuple[Tensor, Counts]:
    pointers, columns, values = transform.forward
    out = torch.full((x.shape[0], transform.shape[0], x.shape[2]), torch.nan, dtype=x.dtype)
    sizes = (ctypes.c_int64 * 4)(x.shape[0], x.shape[1], transform.shape[0], x.shape[2])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tables = pointers.int(), columns.int(), values.to(wide)
    counts = pool.call("mesh_pool", DTYPES[x.dtype], together, x, *tables, out, sizes, 2, seed=seed)
    return out, counts


TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("channels", [1, 3, 30, 64, 71, 1025])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mesh_pool_equals_the_reference(pool, dtype, channels):
    batch, vertices, rows = (2, 5, 9) if channels > 100 else (2, 20, 39)
    x = torch.randn(batch, vertices, channels).to(dtype)
    transform = up_sampling(rows, vertices)
    pointers, columns, values = transform.forward
    expected = reference_pool.mesh_pool(x.double(), pointers, columns, values.double())
    for together in (1, 16):
        if together > 1 and channels * x.element_size() % 16:
            continue
        out, _ = run_pool(pool, x, transform, together)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_numbers_survive_both_conversions(pool, dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers.nan_to_num(1.0, torch.inf, -torch.inf).view(1, 64, 1024)
    identity = MeshTransform.prepare(torch.eye(64).to_sparse())
    assert torch.equal(run_pool(pool, x, identity)[0], x)


def test_mesh_pool_has_the_same_bits_in_any_order(pool):
    x, transform = torch.randn(1, 20, 64), up_sampling(39, 20)
    first, _ = run_pool(pool, x, transform)
    for seed in SEEDS:
        assert torch.equal(run_pool(pool, x, transform, seed=seed)[0], first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mesh_pool_reads_and_writes_whole_sectors(pool, dtype):
    x, transform = torch.randn(1, 20, 64).to(dtype), up_sampling(39, 20)
    _, counts = run_pool(pool, x, transform)
    assert counts.stored_bytes == 39 * 64 * x.element_size()
    assert counts.atomics == counts.shared_requests == 0
    assert counts.sectors <= 1.1 * counts.ideal_sectors


def test_mesh_pool_is_stopped_outside_its_buffers(pool):
    x, transform = torch.randn(1, 20, 64), up_sampling(39, 20)
    transform.forward[1][0] = 20
    with pytest.raises(RuntimeError, match="an access of 16 bytes outside every buffer"):
        run_pool(pool, x, transform)
