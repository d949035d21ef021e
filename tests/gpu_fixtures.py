"""A plugin of pytest for the tests that need a GPU: skips them where there is none, and forces a path."""

import pytest
import torch
from gpu_cases import DEVICE

from pahm_ops import _paths


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Here and not in a mark: what is skipped at one place is one line of pytest's report.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=("cuda", "triton"))
def path(request, monkeypatch) -> str:
    """Runs the test once with each kind of kernel that this machine has."""
    monkeypatch.setenv("PAHM_GPU_PATH", request.param)
    # Triton would time several configurations of each kernel for each shape.
    monkeypatch.setenv("PAHM_TRITON_TUNE", "0")
    try:
        return _paths.choose("mesh_pool", torch.float32, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))
