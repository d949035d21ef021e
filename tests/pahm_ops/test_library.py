import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pahm_ops
from pahm_ops import _library
from pahm_ops.backends import FUNCTIONS, choose


def run(code, **environment):
    # Not in the repository's root, where Python would import the sources in place of what is installed.
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return result.returncode, result.stdout.strip(), result.stderr.strip()


def library():
    if (path := _library._find("_ops")) is None:
        pytest.skip("nothing was compiled")
    return path


def test_backends_names_every_op_and_what_serves_it():
    served = pahm_ops.backends()
    assert set(served) == {"vertex_sample", "spiral_conv", "mesh_pool"}
    sets = {"plain", "neon", "avx2", "avx512", "reference"}
    assert served["spiral_conv"]["cpu"] in sets | {"avx512_bf16", "amx"}
    assert served["vertex_sample"]["cpu"] in sets
    assert served["mesh_pool"]["cpu"] in sets


def test_every_op_has_a_cpu_kernel_a_fake_and_derivatives():
    library()
    for name in (name for names in FUNCTIONS.values() for name in names):
        for key in ("CPU", "Meta", "Autograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pahm_ops::{name}", key), (name, key)


def test_environment_forces_an_instruction_set(monkeypatch):
    library()
    monkeypatch.setenv("PAHM_CPU_ISA", "plain")
    assert pahm_ops.backends()["spiral_conv"]["cpu"] == "plain"
    monkeypatch.setenv("PAHM_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"PAHM_CPU_ISA must be one of plain, .*amx, got 'sse9'"):
        pahm_ops.backends()
    with pytest.raises(ValueError, match="PAHM_CPU_ISA"):
        pahm_ops.spiral_conv(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


def test_operations_are_counted_whichever_is_imported_first():
    code = """
import torch.utils.flop_counter as counter
import pahm_ops, torch
print(torch.ops.pahm_ops.spiral_conv in counter.flop_registry)
"""
    assert run(code) == (0, "True", "")


def test_import_is_light():
    heavy = [
        "scipy",
        "trimesh",
        "timm",
        "triton",
        "torchvision",
        "pytorch_lightning",
        "pahm",
        "pahm_ops.mesh",
    ]
    code = f"""
import sys, torch
before = set(sys.modules)
import pahm_ops
print(sorted(name for name in {heavy} if name in sys.modules and name not in before))
"""
    assert run(code) == (0, "[]", "")


def test_library_uses_only_the_stable_abi():
    # The C++ names of torch have at, c10 or torch as their outermost namespace; the stable ABI is plain C.
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run([nm, "-D", "-u", library()], capture_output=True, text=True, check=True).stdout
    undefined = [line.split()[-1] for line in listing.splitlines() if line.strip()]
    mangled = re.compile(r"^_?_Z\w*?(2at|3c10|5torch)\w*")
    assert [name for name in undefined if mangled.match(name)] == []
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)


def test_library_carries_the_stable_abi_tag_and_is_no_python_module():
    path = library()
    assert path.name.startswith("_ops.abi3.")
    assert b"PyInit_" not in path.read_bytes()


def test_without_a_library_that_loads_the_reference_serves(tmp_path):
    source = Path(pahm_ops.__file__).parent
    shutil.copytree(source, tmp_path / "pahm_ops", ignore=shutil.ignore_patterns("_ops.*", "__pycache__"))
    (tmp_path / "pahm_ops" / "_ops.abi3.so").write_text("for another machine")
    code = """
import torch, pahm_ops
assert "cannot be loaded" in str(pahm_ops.backends()), pahm_ops.backends()
print(pahm_ops.backends()["spiral_conv"]["cpu"], pahm_ops.backends()["mesh_pool"]["cpu"])
x = torch.ones(1, 2, 3, requires_grad=True)
y = pahm_ops.spiral_conv(x, torch.tensor([[0, 1]]), torch.ones(4, 6), torch.ones(4))
z = pahm_ops.mesh_pool(x, torch.eye(2).to_sparse())
(y.sum() + z.sum()).backward()
print(y.tolist(), z.tolist(), x.grad.tolist())
try:
    pahm_ops.spiral_conv(x, torch.tensor([[0, 2]]), torch.ones(4, 6))
except IndexError as error:
    print(error)
"""
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + code
    status, out, err = run(code, PYTHONPATH=str(tmp_path))
    assert status == 0, err
    assert out.splitlines() == [
        "reference reference",
        "[[[7.0, 7.0, 7.0, 7.0]]] [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]] [[[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]]",
        "indices must lie in [0, 2), got 2",
    ]


@pytest.fixture
def notes(monkeypatch):
    monkeypatch.setattr(_library, "NOTES", [])
    return _library.NOTES


def test_a_cuda_library_that_cannot_be_loaded_is_one_warning(monkeypatch, tmp_path, notes):
    path = tmp_path / "_cuda.abi3.so"
    path.write_text("for another CUDA")
    monkeypatch.setattr(_library, "_find", lambda name: path)
    monkeypatch.setattr(_library, "LOADED", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(UserWarning) as warned:
        monkeypatch.setattr(_library, "CUDA_LOADED", _library._load_cuda())
    assert not _library.CUDA_LOADED and len(warned) == 1
    said = f"{path} cannot be loaded \\({path}: .*\\): GPUs are served by Triton"
    assert re.match(said, str(warned[0].message)) and re.match(said, notes[0])
    assert str(pahm_ops.backends()).endswith(notes[0]) and pahm_ops.backends().notes[:1] == (notes[0],)
    monkeypatch.setenv("PAHM_GPU_PATH", "cuda")
    with pytest.raises(ValueError, match=r"no compiled CUDA library was loaded; .* cannot be loaded"):
        choose("mesh_pool", torch.float32, torch.device("cuda", 0))


def test_a_library_that_is_missing_is_one_warning(monkeypatch, notes):
    monkeypatch.setattr(_library, "_find", lambda name: None)
    with pytest.warns(UserWarning, match="no compiled kernels in .*: the CPU runs plain PyTorch") as warned:
        assert not _library._load() and not _library._load_cuda()
    assert len(warned) == len(notes) == 1


def test_an_inference_tensor_and_no_grad_serve():
    library()
    with torch.inference_mode():
        x = torch.ones(1, 2, 3)
        out = pahm_ops.spiral_conv(x, torch.tensor([[0, 1]]), torch.ones(4, 6))
        assert out.is_inference() and out.tolist() == [[[6.0] * 4]]


def test_packaged_files_are_there():
    assert importlib.util.find_spec("pahm_ops") is not None
    assert (Path(pahm_ops.__file__).parent / "py.typed").exists()
