"""From the public ops down to Triton's kernels, as on a GPU, but interpreted on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from repository import HELPERS

from pahm_ops import _library

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here"),
    pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled"),
]
PROGRAM = HELPERS / "gpu_layer.py"


#: how many cases each has
CHECKS = {
    "values spiral_conv float64": 10,
    "values mesh_pool float64": 3,
    "values mesh_pool bfloat16": 3,
    "values vertex_sample float64": 12,
    "compiled spiral_conv": 1,
    "compiled mesh_pool": 1,
    "compiled vertex_sample": 1,
    "strided_bias": 1,
    "empties": 5,
    "refusals": 22,
    "crossings": 3,  # last, because it watches every launch from then on
}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, int | str]:
    """What the checks that were asked for come to: a number of cases, or an error."""
    asked = [
        item.callspec.params["check"]
        for item in request.session.items
        if item.function.__name__ == "test_ops_as_on_a_gpu"  # type: ignore[attr-defined]
    ]
    # In another process: Triton reads the environment when it is imported, and ops are overridden.
    command, environment = [sys.executable, PROGRAM, *asked], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("check", CHECKS)
def test_ops_as_on_a_gpu(found, check):
    assert found[check] == CHECKS[check], found[check]
