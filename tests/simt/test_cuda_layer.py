"""csrc/cuda between the dispatcher and the kernels, on the CPU: results, allocations, crossings."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import HELPERS
from simt_kernels import SIMT, build, needs_gxx

from pahm_ops import _library

pytestmark = [needs_gxx, pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled")]

TORCH = Path(torch.__file__).parent
FLAGS = (
    *("-O0", "-shared", "-fPIC", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *(f"-I{SIMT / 'stubs'}", "-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}"),
    *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
)


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """Of a process of its own, where csrc/cuda takes the place of the CPU's kernels."""
    library = build("cuda_layer.cpp", *FLAGS)
    command = [sys.executable, HELPERS / "cuda_layer.py", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("op", ["spiral_conv", "mesh_pool", "vertex_sample"])
def test_a_call_crosses_the_dispatcher_for_the_op_and_for_its_result(counts, op):
    assert counts[op]["forward"] == {"ops": [f"pahm_ops::{op}"], "allocations": 1}


def test_a_sum_that_is_split_between_blocks_asks_for_a_workspace_too(counts):
    found = counts["spiral_conv, split"]["forward"]
    assert found == {"ops": ["pahm_ops::spiral_conv"], "allocations": 2}


@pytest.mark.parametrize(
    ("op", "ops", "allocations"),
    [
        # Of the sum for the bias PyTorch makes two more ops.
        ("spiral_conv", ["_spiral_conv_input_grad", "_spiral_conv_weight_grad"], 2),
        ("mesh_pool", ["mesh_pool"], 1),
        # The gradients of two maps, the vertices and the camera, and one workspace.
        ("vertex_sample", ["_vertex_sample_backward"], 5),
    ],
)
def test_a_backward_asks_for_its_gradients_and_one_workspace(counts, op, ops, allocations):
    found = counts[op]["backward"]
    assert [name for name in found["ops"] if name.startswith("pahm_ops")] == [f"pahm_ops::{o}" for o in ops]
    others = [name for name in found["ops"] if name.startswith("aten")]
    assert others == (["aten::as_strided", "aten::fill_", "aten::sum"] if op == "spiral_conv" else [])
    assert found["allocations"] == allocations
