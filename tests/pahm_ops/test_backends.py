"""What serves a device: the table of paths, the variable that forces one, the overload that is called."""

import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from repository import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

import pahm_ops
from pahm_ops import _library

# The name in the package is the function.
module = sys.modules["pahm_ops.backends"]

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretends that the machine has these paths."""

    def has(*paths: str) -> None:
        monkeypatch.setattr(module, "available", lambda path, device: path in (*paths, "reference"))
        monkeypatch.setattr(module, "_CHOSEN", {})

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
    assert module.choose(op, dtype, CUDA, columns) == path
    machine("triton")
    assert module.choose(op, dtype, CUDA, columns) == "triton"
    machine()
    assert module.choose(op, dtype, CUDA, columns) == "reference"


def test_tf32_is_used_where_pytorch_allows_it(machine):
    machine("cuda", "triton")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert module.choose("spiral_conv", torch.float32, CUDA) == "triton"
        assert module.choose("spiral_conv", torch.float64, CUDA) == "cuda"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_newer_way_to_allow_tf32_is_understood(precision):
    code = (
        "import torch; from pahm_ops.backends import tf32_allowed; "
        f"torch.backends.cuda.matmul.fp32_precision = {precision!r}; print(tf32_allowed())"
    )
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one way only")
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == str(precision == "tf32")


def test_the_choice_is_a_constant_of_a_traced_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def doubled_where_served(x):
        return 2 * x if module.served(CUDA) else x

    assert torch.equal(doubled_where_served(torch.ones(2)), torch.ones(2) * (1 + module.served(CUDA)))


def test_the_driver_is_asked_once_unless_a_capture_may_have_refused(monkeypatch):
    asked, capturing = [], [True]
    answers = types.SimpleNamespace(_cuda_runs=lambda index: asked.append(index) or index == 1)
    monkeypatch.setattr(torch.ops, "pahm_ops", answers)
    monkeypatch.setattr(_library, "CUDA_LOADED", True)
    monkeypatch.setattr(module, "capturing", lambda device: bool(capturing))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_RUNS", {})
    runs = [module._cuda_runs(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    capturing.clear()
    runs += [module._cuda_runs(torch.device("cuda", index)) for index in (0, 1, 0, 1)]
    assert runs == [False, True] * 4 and asked == [0, 1, 0, 0]


def test_fake_tensors_of_a_gpu_need_no_gpu():
    with FakeTensorMode():
        x = torch.empty(2, 7, 4, device="cuda")
        indices = torch.empty(7, 3, dtype=torch.int64, device="cuda")
        out = pahm_ops.spiral_conv(x, indices, torch.empty(5, 12, device="cuda"))
    assert out.shape == (2, 7, 5) and out.device.type == "cuda"


def test_a_variable_forces_a_path(machine, monkeypatch):
    machine("cuda", "triton")
    for path in ("cuda", "triton", "reference"):
        monkeypatch.setenv("PAHM_GPU_PATH", path)
        assert module.choose("mesh_pool", torch.float32, CUDA) == path
    assert not module.served(CUDA)
    machine("triton")
    monkeypatch.setenv("PAHM_GPU_PATH", "cuda")
    with pytest.raises(ValueError, match="PAHM_GPU_PATH=cuda, but"):
        module.choose("mesh_pool", torch.float32, CUDA)
    monkeypatch.setenv("PAHM_GPU_PATH", "fast")
    with pytest.raises(ValueError, match="must be cuda, triton or reference, got 'fast'"):
        module.served(CUDA)


def test_backends_print_a_row_for_each_dtype_that_is_served_apart(machine, monkeypatch):
    machine("cuda", "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    table = pahm_ops.backends()
    assert table["spiral_conv"]["cuda"]["bfloat16"] == "triton"
    assert table["mesh_pool"]["cuda"] == {"any": "cuda"}
    lines = str(table).splitlines()
    assert len(lines) == 1 + 3 + sum(len(rows) for rows in module.PATHS.values())
    assert any(line.split() == ["spiral_conv", "cuda", "float64", "cuda"] for line in lines)
    machine("triton")
    monkeypatch.setenv("PAHM_GPU_PATH", "cuda")
    with pytest.raises(ValueError, match="PAHM_GPU_PATH=cuda, but"):
        pahm_ops.backends()


@pytest.mark.parametrize("name", [name for names in module.FUNCTIONS.values() for name in names])
def test_every_function_has_a_kernel_for_each_path(machine, name):
    if not _library.LOADED or importlib.util.find_spec("triton") is None:
        pytest.skip("nothing was compiled, or no Triton here")
    compiled = getattr(torch.ops.pahm_ops, name).default
    assert module.kernel(name, torch.ones(1)) is compiled
    with FakeTensorMode():
        x = torch.ones(1, device="cuda")
    machine("cuda")
    assert module.kernel(name, x) is compiled
    machine("triton")
    serves = module.kernel(name, x)
    assert str(serves) == f"pahm_ops._triton_{name.lstrip('_')}.default"
    ours, theirs = ([(a.name, str(a.type)) for a in op._schema.arguments] for op in (compiled, serves))
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    for key in ("CUDA", "XPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pahm_ops::_triton_{name.lstrip('_')}", key)
    machine()
    with pytest.raises(NotImplementedError, match="no kernel of pahm_ops"):
        module.kernel(name, x)


def test_the_compiled_library_has_the_functions_of_every_op():
    if not _library.LOADED:
        pytest.skip("nothing was compiled")
    text = (ROOT / "csrc" / "ops.cpp").read_text(encoding="utf-8")
    declared = set(re.findall(r'm\.def\("(\w+)\(', text)) - {"_cpu_isa", "_cuda_runs"}
    private = ("_depthwise_conv", "_batch_norm", "_frozen")
    declared = {name for name in declared if not name.startswith(private)}
    assert declared == {name for names in module.FUNCTIONS.values() for name in names}
