"""What setup.py decides about the CUDA library, with a script as nvcc; and the library that is installed."""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from repository import ROOT

from pahm_ops import _library

CUDA_13 = {"75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121"}


def load():
    spec = importlib.util.spec_from_file_location("build_tools_cuda", ROOT / "build_tools" / "cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cuda = load()
ENVIRONMENT = dict(os.environ)

# Writes what it was asked for, and fails where a source says so.
NVCC = (
    f"#!{sys.executable}"
    + """
import os, sys
from pathlib import Path
home, arguments = Path(__file__).parent.parent, sys.argv[1:]
if "--version" in arguments:
    print("Cuda compilation tools, release VERSION, VERSION.88")
elif "--list-gpu-arch" in arguments:
    print("compute_75\\ncompute_80\\ncompute_90\\ncompute_100")
elif "--dryrun" in arguments:
    print(f"#$ _HERE_={home}/bin\\n#$ TOP={home}/bin/..", file=sys.stderr)
else:
    out = Path(arguments[arguments.index("-o") + 1])
    if "-c" in arguments:
        source = Path(arguments[arguments.index("-c") + 1])
        if "wrong" in source.read_text():
            sys.exit("error: wrong")
        header = Path(arguments[arguments.index("-I") + 1]) / "one.cuh"
        needed = " ".join(str(path).replace(" ", "\\\\ ") for path in (source, header))
        Path(arguments[arguments.index("-MF") + 1]).write_text(f"{out} : {needed}")
    out.write_text(" ".join(arguments))
    with open(home / "log", "a") as log:
        print(out.name, os.environ.get("NVCC_APPEND_FLAGS", ""), file=log)
"""
)


@pytest.fixture(autouse=True)
def no_other_compilers(monkeypatch):
    """Settings of the user are not seen, nor is an installed compiler."""
    for name in ("PAHM_CUDA", "PAHM_CUDA_HOME", "PAHM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MAX_JOBS", "CXX", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "_from_pypi", lambda major: [])


def toolkit(folder, version="13.0"):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.replace("VERSION", version))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return folder


def only(*folders):
    """An environment whose PATH is these folders."""
    return {"PATH": os.pathsep.join(map(str, folders))}


@pytest.mark.parametrize(
    ("torch_cuda", "environ", "reason"),
    [
        ("13.0", {"PAHM_CUDA": "0"}, "PAHM_CUDA=0"),
        (None, {}, "this torch has no CUDA"),
        ("12.8", {}, r"no nvcc of CUDA 12 found, for torch's 12.8 \(PAHM_CUDA_HOME names a toolkit\)"),
    ],
)
def test_no_library_is_built(torch_cuda, environ, reason):
    with pytest.raises(cuda.Skip, match=f"^{reason}$"):
        cuda.find(torch_cuda, {"PATH": "", **environ})


def test_off_wins_over_a_toolkit(tmp_path):
    with pytest.raises(cuda.Skip, match="PAHM_CUDA=0"):
        cuda.find("13.0", {"PAHM_CUDA": "0", "PAHM_CUDA_HOME": str(toolkit(tmp_path))})


def test_the_compiler_from_pypi_comes_before_the_path(tmp_path, monkeypatch):
    pypi, other = toolkit(tmp_path / "nvidia" / "cu13"), toolkit(tmp_path / "other", "13.1")
    monkeypatch.setattr(
        cuda, "_from_pypi", lambda major: [tmp_path / "empty", tmp_path / "nvidia" / f"cu{major}"]
    )
    found = cuda.find("13.0", only(other / "bin"))
    assert (found.nvcc, found.version) == (pypi / "bin" / "nvcc", (13, 0))


def test_a_named_toolkit_comes_before_the_compiler_from_pypi(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "_from_pypi", lambda major: [toolkit(tmp_path / "pypi")])
    a, b = toolkit(tmp_path / "a"), toolkit(tmp_path / "b")
    assert cuda.find("13.0", {"CUDA_HOME": str(a)}).nvcc == a / "bin" / "nvcc"
    assert cuda.find("13.0", {"CUDA_HOME": str(a), "PAHM_CUDA_HOME": str(b)}).nvcc == b / "bin" / "nvcc"


def test_cuda_12_takes_an_installed_toolkit(tmp_path):
    assert cuda.find("12.8", {"CUDA_HOME": str(toolkit(tmp_path, "12.4"))}).version == (12, 4)


def test_a_named_toolkit_of_another_version_is_one_sentence(tmp_path, monkeypatch, capsys):
    old, pypi = toolkit(tmp_path / "old", "12.4"), toolkit(tmp_path / "pypi")
    monkeypatch.setattr(cuda, "_from_pypi", lambda major: [pypi])
    sentence = f"={old} has CUDA 12.4, but torch needs CUDA 13"
    with pytest.raises(ValueError, match=f"^PAHM_CUDA_HOME{sentence}$"):
        cuda.find("13.0", {"PAHM_CUDA_HOME": str(old)})
    with pytest.raises(ValueError, match=r"has no bin/nvcc that runs, but torch needs CUDA 13$"):
        cuda.find("13.0", {"PAHM_CUDA_HOME": str(tmp_path)})
    # CUDA_HOME is often set for something else.
    assert cuda.find("13.0", {"CUDA_HOME": str(old)}).nvcc == pypi / "bin" / "nvcc"
    assert capsys.readouterr().out == f"pahm: CUDA_HOME{sentence}: passed over\n"


def test_nvcc_on_the_path_may_be_a_script_elsewhere(tmp_path):
    real = toolkit(tmp_path / "cuda-13.0")
    script = tmp_path / "somewhere" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    assert cuda.find("13.0", only(script.parent)).nvcc == real / "bin" / "nvcc"
    with pytest.raises(cuda.Skip):
        cuda.find("12.8", only(script.parent))


def gencodes(options):
    assert all(option.startswith("-gencode=arch=compute_") for option in options)
    return [option.removeprefix("-gencode=arch=compute_") for option in options]


def test_default_architectures():
    pairs = (75, 75), (80, 80), (80, 86), (90, 90), (100, 100), (100, 120)
    sass = [f"{ptx},code=sm_{arch}" for ptx, arch in pairs]
    assert gencodes(cuda.architectures({}, CUDA_13)) == [*sass, "100,code=compute_100"]


def test_default_architectures_are_those_of_an_older_compiler():
    older = gencodes(cuda.architectures({}, {"70", "75", "80", "86", "89", "90"}))
    assert older[-2:] == ["90,code=sm_90", "90,code=compute_90"] and len(older) == 5


@pytest.mark.parametrize("text", ["80;90a+PTX", "8.0 9.0a+PTX", "80, 9.0a+PTX", ";80;;90a+PTX;"])
@pytest.mark.parametrize("name", ["PAHM_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
def test_architectures_asked_for(name, text):
    assert gencodes(cuda.architectures({name: text}, CUDA_13)) == [
        "80,code=sm_80",
        "90a,code=sm_90a",
        "90a,code=compute_90a",
    ]


def test_ptx_is_shared_only_with_what_is_asked_for():
    asked = {"PAHM_CUDA_ARCHS": "86+PTX;100+PTX;120+PTX"}
    expected = ["86,code=sm_86", "100,code=sm_100", "100,code=sm_120"]
    assert gencodes(cuda.architectures(asked, CUDA_13)) == [
        *expected,
        "86,code=compute_86",
        "100,code=compute_100",
    ]


def test_own_variable_wins_and_an_empty_one_is_none():
    both = {"PAHM_CUDA_ARCHS": "120", "TORCH_CUDA_ARCH_LIST": "8.0"}
    assert gencodes(cuda.architectures(both, CUDA_13)) == ["120,code=sm_120"]
    assert gencodes(cuda.architectures({**both, "PAHM_CUDA_ARCHS": ""}, CUDA_13)) == ["80,code=sm_80"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Hopper", "PAHM_CUDA_ARCHS must look like 80;90+PTX or 8.0;9.0+PTX, got 'Hopper' in it"),
        ("9", "PAHM_CUDA_ARCHS must look like .*, got '9' in it"),
        ("50;80", "PAHM_CUDA_ARCHS asks for code for 50; this nvcc has 75, 80"),
        (" ; ", "PAHM_CUDA_ARCHS asks for code for nothing; this nvcc has 75, 80"),
    ],
)
def test_architectures_that_cannot_be(text, sentence):
    with pytest.raises(ValueError, match=f"^{re.sub(r'([+])', r'[+]', sentence)}$"):
        cuda.architectures({"PAHM_CUDA_ARCHS": text}, {"75", "80"})


def test_jobs_fit_the_cores_and_the_memory(monkeypatch):
    monkeypatch.setattr(cuda.os, "sched_getaffinity", lambda process: set(range(16)))
    for gib, expected in ((1, 1), (5, 2), (31, 15), (200, 16)):
        monkeypatch.setattr(cuda, "_free_memory", lambda gib=gib: gib << 30)
        assert cuda.jobs({}) == expected
    assert cuda.jobs({"MAX_JOBS": "40"}) == 40


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_jobs_that_cannot_be(text):
    with pytest.raises(ValueError, match=f"^MAX_JOBS must be a whole number from 1, got '{text}'$"):
        cuda.jobs({"MAX_JOBS": text})


def test_free_memory_is_that_of_the_machine_at_most():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < cuda._free_memory() <= total


@pytest.mark.parametrize(("jobs", "files_threads"), [(1, (1, 1)), (2, (1, 2)), (8, (1, 8)), (64, (8, 8))])
def test_jobs_are_shared_out_to_files_and_architectures(jobs, files_threads):
    assert cuda.shared_out(jobs, 8) == files_threads


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a source and a header, and `build(**environment)`, which tells what was compiled."""
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    home, root = toolkit(tmp_path / "cuda"), tmp_path / "a project"
    (root / "csrc").mkdir(parents=True)
    for name in ("one.cu", "two.cu", "one.cuh"):
        (root / "csrc" / name).write_text("")
    monkeypatch.chdir(root)

    def build(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        log = home / "log"
        log.write_text("")
        kit = cuda.Toolkit.at(home)
        library = Path("out/pahm_ops/_cuda.abi3.so")
        cuda.build(kit, ["csrc/one.cu", "csrc/two.cu"], library, Path("out/temp"), tmp_path / "torch")
        return sorted(line.split(" ", 1)[0] for line in log.read_text().splitlines()), log.read_text()

    return build


def test_build_compiles_what_changed(project):
    everything = ["_cuda.abi3.so", "one.o", "two.o"]
    compiled, log = project(MAX_JOBS="3", NVCC_APPEND_FLAGS="-lineinfo")
    assert compiled == everything
    assert log.count("-lineinfo --threads=3") == 3
    assert project(MAX_JOBS="1")[0] == []
    os.utime("csrc/two.cu", (2e9, 2e9))
    assert project()[0] == ["_cuda.abi3.so", "two.o"]
    os.utime("csrc/one.cuh", (2.1e9, 2.1e9))
    assert project()[0] == everything
    assert project(PAHM_CUDA_ARCHS="8.0")[0] == everything


def test_build_asks_for_what_the_library_must_be(project):
    project(PAHM_CUDA_ARCHS="8.0")
    compiled = Path("out/temp/one.o").read_text()
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in compiled
    assert "-gencode=arch=compute_80,code=sm_80" in compiled and "sm_90" not in compiled
    assert "-ccbin" not in compiled
    linked = Path("out/pahm_ops/_cuda.abi3.so").read_text()
    assert "-cudart=static" in linked and linked.index("one.o") < linked.index("-ltorch_cuda")
    project(CXX="g++-14")
    assert "-ccbin g++-14" in Path("out/temp/one.o").read_text()


def test_a_source_that_does_not_compile_fails_the_build(project, capfd):
    Path("csrc/two.cu").write_text("wrong")
    with pytest.raises(subprocess.CalledProcessError):
        project()
    assert "error: wrong" in capfd.readouterr().out
    assert not Path("out/pahm_ops/_cuda.abi3.so").exists()


def library():
    path = _library._find("_cuda")
    if path is None:
        pytest.skip("no CUDA library was built")
    return path


def test_library_has_code_for_every_architecture():
    """Holds where the environment asks for the architectures that the library was built for."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("triton has no cuobjdump here")
    found = {}
    for kind in ("elf", "ptx"):
        listing = subprocess.run(
            [tool, f"--list-{kind}", library()], capture_output=True, text=True, check=True
        )
        found[kind] = Counter(re.findall(r"sm_(\w+)\.", listing.stdout))
    files = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    asked = gencodes(cuda.architectures(ENVIRONMENT, CUDA_13))
    for kind, code in (("elf", "sm"), ("ptx", "compute")):
        assert found[kind] == {a.split("_")[1]: files for a in asked if f"code={code}_" in a}


def test_library_needs_nothing_but_torch_and_the_system():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    listing = subprocess.run([readelf, "-d", library()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", listing))
    system = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so|ld-linux")
    rest = {name for name in needed if not system.match(name)}
    assert "libtorch_cuda.so" in rest
    assert rest <= {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"}
    assert "RPATH" not in listing and "RUNPATH" not in listing


def test_library_keeps_its_cuda_runtime_to_itself():
    # Else its calls would reach the runtime that torch has loaded, which may be older.
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run([nm, "-D", library()], capture_output=True, text=True, check=True).stdout
    assert [line for line in listing.splitlines() if re.search(r" cud?a?[A-Z]|__cuda", line)] == []


def test_library_loads_without_a_driver():
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, and does not load the library")
    library()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("pahm_ops::mesh_pool", "CUDA")
    assert torch.ops.pahm_ops._cuda_runs(torch.cuda.device_count()) is False
