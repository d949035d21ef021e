"""What serves a GPU: the table of paths, the variable that forces one, the tables that kernels take."""

import gc
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pahm_ops
from pahm_ops import _library, _paths, _tables

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretends that the machine has these paths."""

    def has(*paths: str) -> None:
        monkeypatch.setattr(_paths, "_has", lambda path, device: path in (*paths, "reference"))

    monkeypatch.delenv("PAHM_GPU_PATH", raising=False)
    return has


@pytest.mark.parametrize(
    ("op", "dtype", "columns", "path"),
    [
        ("spiral_conv", torch.float32, 64, "cuda"),
        ("spiral_conv", torch.float64, 64, "cuda"),
        ("spiral_conv", torch.float16, 64, "triton"),
        ("spiral_conv", torch.bfloat16, 16, "triton"),
        ("spiral_conv", torch.bfloat16, 3, "cuda"),
        ("mesh_pool", torch.bfloat16, 64, "cuda"),
        ("vertex_sample", torch.float16, 64, "cuda"),
    ],
)
def test_the_first_path_that_the_machine_has_serves(machine, op, dtype, columns, path):
    machine("cuda", "triton")
    assert _paths.choose(op, dtype, CUDA, columns) == path
    machine("triton")
    assert _paths.choose(op, dtype, CUDA, columns) == "triton"
    machine()
    assert _paths.choose(op, dtype, CUDA, columns) == "reference"


def test_tf32_is_used_where_pytorch_allows_it(machine):
    machine("cuda", "triton")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert _paths.choose("spiral_conv", torch.float32, CUDA) == "triton"
        assert _paths.choose("spiral_conv", torch.float64, CUDA) == "cuda"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_newer_way_to_allow_tf32_is_understood(precision):
    code = (
        "import torch; from pahm_ops import _paths; "
        f"torch.backends.cuda.matmul.fp32_precision = {precision!r}; print(_paths.tf32_allowed())"
    )
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one way only")
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == str(precision == "tf32")


def test_the_choice_is_a_constant_of_a_traced_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def doubled_where_served(x):
        return 2 * x if _paths.served(CUDA) else x

    assert torch.equal(doubled_where_served(torch.ones(2)), torch.ones(2) * (1 + _paths.served(CUDA)))


def test_the_driver_is_asked_once_unless_a_capture_may_have_refused(monkeypatch):
    asked, capturing = [], [True]
    answers = types.SimpleNamespace(cuda_runs=lambda index: asked.append(index) or index == 1)
    monkeypatch.setattr(torch.ops, "pahm_ops", answers)
    monkeypatch.setattr(_library, "CUDA_LOADED", True)
    monkeypatch.setattr(_library, "capturing", lambda device: bool(capturing))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_paths, "_RUNS", {})
    runs = [_paths._cuda_runs(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    capturing.clear()
    runs += [_paths._cuda_runs(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    assert runs == [False, True] * 4 and asked == [0, 1, 0, 0]


def test_fake_tensors_of_a_gpu_need_no_gpu():
    with FakeTensorMode():
        x = torch.empty(2, 7, 4, device="cuda")
        indices = torch.empty(7, 3, dtype=torch.int64, device="cuda")
        out = pahm_ops.spiral_conv(x, indices, torch.empty(5, 12, device="cuda"))
    assert out.shape == (2, 7, 5) and out.device.type == "cuda"


def test_tables_are_made_by_many_threads_at_once():
    def make(_: int) -> bool:
        indices = torch.randint(0, 7, (9, 4))
        return torch.equal(_tables.spirals(indices, 7).table, indices.t())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(make, range(400)))


def test_a_variable_forces_a_path(machine, monkeypatch):
    machine("cuda", "triton")
    for path in ("cuda", "triton", "reference"):
        monkeypatch.setenv("PAHM_GPU_PATH", path)
        assert _paths.choose("mesh_pool", torch.float32, CUDA) == path
    assert not _paths.served(CUDA)
    machine("triton")
    monkeypatch.setenv("PAHM_GPU_PATH", "cuda")
    with pytest.raises(ValueError, match="PAHM_GPU_PATH=cuda, but"):
        _paths.choose("mesh_pool", torch.float32, CUDA)
    monkeypatch.setenv("PAHM_GPU_PATH", "fast")
    with pytest.raises(ValueError, match="must be cuda, triton or reference, got 'fast'"):
        _paths.served(CUDA)


def test_backends_print_a_row_for_each_dtype_that_is_served_apart(machine, monkeypatch):
    machine("cuda", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    table = pahm_ops.backends()
    assert table["spiral_conv"]["cuda"]["bfloat16"] == "triton"
    assert table["mesh_pool"]["cuda"] == {"any": "cuda"}
    lines = str(table).splitlines()
    assert len(lines) == 1 + 3 + sum(len(rows) for rows in _paths.PATHS.values())
    assert any(line.split() == ["spiral_conv", "cuda", "float64", "cuda"] for line in lines)
    machine("triton")
    monkeypatch.setenv("PAHM_GPU_PATH", "cuda")
    with pytest.raises(ValueError, match="PAHM_GPU_PATH=cuda, but"):
        pahm_ops.backends()


def test_schemas_are_those_of_the_compiled_library():
    if not _library.LOADED:
        pytest.skip("nothing was compiled")
    for schema in _library.SCHEMAS:
        name = schema.split("(")[0]
        assert str(getattr(torch.ops.pahm_ops, name).default._schema) == f"pahm_ops::{schema}"


def test_every_public_op_has_a_kernel_for_gpus():
    for schema in _library.SCHEMAS:
        name = f"pahm_ops::{schema.split('(')[0]}"
        for key in ("CUDA", "XPU"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_the_lists_of_a_transposed_table():
    indices = torch.randint(0, 7, (9, 4))
    table, pointers, rows = _tables.spirals(indices, 7)
    assert torch.equal(table, indices.t()) and table.is_contiguous()
    assert {t.dtype for t in (table, pointers, rows)} == {torch.int32}
    for position in range(4):
        for n in range(7):
            begin, end = pointers[position * 7 + n : position * 7 + n + 2].tolist()
            assert rows[begin:end].tolist() == (indices[:, position] == n).nonzero().flatten().tolist()


def test_tables_are_made_once_also_for_views_and_anew_when_values_change():
    indices = torch.randint(0, 7, (9, 4))
    first = _tables.spirals(indices, 7)
    assert _tables.spirals(indices.detach(), 7) is first
    prefix = _tables.spirals(indices[:, :2], 7)
    assert _tables.spirals(indices[:, :2], 7) is prefix and prefix.table.shape == (2, 9)
    assert _tables.spirals(indices, 8) is not first
    indices[0, 0] = (indices[0, 0] + 1) % 7
    changed = _tables.spirals(indices, 7)
    assert changed is not first and changed.table[0, 0] == indices[0, 0]


def test_tables_die_with_their_source():
    before = len(_tables._MADE)
    for _ in range(20):
        _tables.spirals(torch.randint(0, 7, (9, 4)), 7)
    gc.collect()
    _tables.spirals(torch.randint(0, 7, (9, 4)), 7)
    assert len(_tables._MADE) <= before + 1


def test_tables_of_a_device_that_was_not_synchronised_stay(monkeypatch):
    """A kernel may still read them. "meta" stands for a second device."""
    monkeypatch.setattr(_tables, "_MADE", {})

    def make_once(device, make=lambda: None):
        source = torch.empty(3, device=device)
        _tables.made_once(source, "a table", make)
        return source

    def devices():
        return sorted(key[0].type for key in _tables._MADE)

    late = [make_once("cpu")]
    make_once("cpu")
    make_once("meta")
    assert devices() == ["cpu", "cpu", "meta"]
    make_once("cpu", late.clear)  # What dies meanwhile may be in use after the device was synchronised.
    assert devices() == ["cpu", "cpu", "meta"]
    kept = make_once("cpu")
    assert devices() == ["cpu", "meta"] and kept is not None


def test_a_tensor_of_inference_mode_is_not_remembered():
    with torch.inference_mode():
        indices = torch.zeros(2, 3, dtype=torch.int64)
        assert not _tables.spirals(indices, 7).table.any()
        indices[1, 2] = 5
        assert _tables.spirals(indices, 7).table[2, 1] == 5


@pytest.mark.parametrize("value", [-1, 7])
def test_indices_are_checked_when_a_table_is_made(value):
    indices = torch.randint(0, 7, (9, 4))
    indices[3, 2] = value
    with pytest.raises(IndexError, match=rf"indices must lie in \[0, 7\), got {value}"):
        _tables.spirals(indices, 7)
    columns = indices.flatten()[:12]
    columns[5] = value
    pointers = torch.tensor([0, 4, 12])
    with pytest.raises(IndexError, match=rf"columns must lie in \[0, 7\), got {value}"):
        _tables.rows(pointers, columns, torch.ones(12), 7, torch.float32)


@pytest.mark.parametrize("pointers", [[0, 5, 4], [1, 2, 4], [0, 2, 3]])
def test_row_pointers_are_checked(pointers):
    with pytest.raises(IndexError, match="row_pointers must rise from 0 to the number of entries"):
        _tables.rows(
            torch.tensor(pointers), torch.zeros(4, dtype=torch.int64), torch.ones(4), 7, torch.float32
        )


def test_more_indices_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match="below 2147483648 on a GPU, got 4294967296"):
        _tables.spirals(torch.zeros(1, dtype=torch.int64).expand(1, 2), 2**31)
