import os
import platform

# Workers of pytest-xdist share the cores: threads without work must not spin. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import pahm_ops

ISAS = ("neon",) if platform.machine() == "aarch64" else ("plain", "avx2", "avx512", "avx512_bf16", "amx")


#: Files of few tests that take long. They come first: pytest-xdist would start them last, and at the end one
#: worker would be left with one of them.
LONG = (
    "test_triton.py",
    "test_triton_compile.py",
    "test_processes.py",
    "test_resume.py",
    "test_export.py",
    "test_gpu_layer.py",
    "test_trainer.py",
    "test_generate.py",
    "test_page.py",
    "test_browser.py",
    "test_ablation.py",
    "test_cuda_budget.py",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist's: files with many tests first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here and not in a mark: what is skipped at one place is one line of pytest's report.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    """Runs the test once for each instruction set that this CPU has."""
    monkeypatch.setenv("PAHM_CPU_ISA", request.param)
    try:
        name = pahm_ops.backends()["spiral_conv"]["cpu"]
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    if name == "reference":
        pytest.skip("nothing was compiled")
    return name


@pytest.fixture(params=["compiled", "reference"])
def backend(request, monkeypatch) -> str:
    """Runs the test with the compiled kernels and with the reference that serves where there are none."""
    if request.param == "reference":
        monkeypatch.setattr("pahm_ops._library.LOADED", False)
    elif pahm_ops.backends()["spiral_conv"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    return request.param
