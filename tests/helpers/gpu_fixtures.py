"""A plugin of pytest for the tests on a GPU: each kind of kernel in turn."""

import pytest
import torch
from gpu_cases import DEVICE

from pahm_ops.backends import choose


@pytest.fixture(params=("cuda", "triton"))
def path(request, monkeypatch) -> str:
    """Runs the test once with each kind of kernel that this machine has."""
    monkeypatch.setenv("PAHM_GPU_PATH", request.param)
    # Triton would time several configurations of each kernel for each shape.
    monkeypatch.setenv("PAHM_TRITON_TUNE", "0")
    try:
        return choose("mesh_pool", torch.float32, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))
