"""From the public ops down to Triton's kernels, as on a GPU, but interpreted on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pahm_ops import _library

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here"),
    pytest.mark.skipif(not _library.LOADED, reason="nothing was compiled"),
]

SCRIPT = """
import sys
import pahm_ops
import torch
from op_samples import samples
from pahm_ops import _gpu, _library, _paths, _tables

override = torch.library.Library("pahm_ops", "IMPL")
for schema in _library.SCHEMAS:
    name = schema.split("(")[0]
    override.impl(name, getattr(_gpu, name), "CPU", allow_override=True)
_paths.choose = lambda *arguments: "triton"

op, dtype = sys.argv[1], getattr(torch, sys.argv[2])
tolerance = 1e-10 if dtype == torch.float64 else 2e-2
count = 0
for sample in samples(op, dtype):
    leaves = sample.leaves()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = sample.function(*leaves), sample.definition(*wide)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(found, torch.autograd.grad(expected, wide, grad.double())):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)
    count += 1
if op == "spiral_conv":
    x, indices, weight, bias, activation = samples(op, dtype)[0].raw
    strided = bias.repeat_interleave(2)[::2]
    whole = pahm_ops.spiral_conv(x, indices, weight, bias)
    assert torch.equal(pahm_ops.spiral_conv(x, indices, weight, strided), whole)
assert "pahm_ops.triton." + op in sys.modules
print(count)
"""


def run(*arguments: str) -> str:
    # From here, where the installed package is imported, and op_samples too.
    folder, environment = Path(__file__).parent, {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("op", "dtype", "count"),
    [
        ("spiral_conv", "float64", 10),
        ("mesh_pool", "float64", 3),
        ("mesh_pool", "bfloat16", 3),
        ("vertex_sample", "float64", 24),
    ],
)
def test_ops_and_gradients_equal_their_definition(op, dtype, count):
    assert run(op, dtype) == str(count)
