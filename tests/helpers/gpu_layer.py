"""The program of test_gpu_layer.py: the public ops as on a GPU, by Triton's kernels, interpreted on the CPU.

python tests/helpers/gpu_layer.py "CHECK [ARGUMENT ...]" ..., with TRITON_INTERPRET=1, prints a line of
JSON for each check: how many cases passed, or the error.
"""

import json
import sys
import traceback
from collections.abc import Callable

import pytest
import torch
from op_samples import OPS, Sample, samples
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pahm_ops
from pahm_ops import MeshTransform
from pahm_ops.reference import spiral_conv as reference

ops = torch.ops.pahm_ops


def compare(sample: Sample, tolerance: float, run: Callable[..., Tensor] | None = None) -> None:
    """The result and the first gradients with the definition's in float64."""
    leaves = sample.leaves()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = (run or sample.function)(*leaves), sample.definition(*wide)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(found, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale)


def values(op: str, dtype: str) -> int:
    found = samples(op, getattr(torch, dtype))
    for sample in found:
        compare(sample, 1e-10 if dtype == "float64" else 2e-2)
    assert f"pahm_ops.triton.{op}" in sys.modules
    return len(found)


def compiled(op: str) -> int:
    """In a traced graph without a break."""
    sample = samples(op)[0]
    compare(sample, 1e-10, torch.compile(sample.function, fullgraph=True, backend="aot_eager"))
    return 1


def strided_bias() -> int:
    x, table, _, _, weight, bias, _ = samples("spiral_conv")[0].raw
    indices = table.t().long()
    whole = pahm_ops.spiral_conv(x, indices, weight, bias)
    assert torch.equal(pahm_ops.spiral_conv(x, indices, weight, bias.repeat_interleave(2)[::2]), whole)
    return 1


def empties() -> int:
    """Results that are empty, and sums of nothing."""
    # batch, vertices, rows, spiral length, channels in and out
    shapes = [
        (0, 5, 5, 2, 3, 4),
        (2, 5, 0, 2, 3, 4),
        (2, 5, 5, 2, 0, 4),
        (2, 5, 5, 2, 3, 0),
        (2, 0, 0, 2, 3, 4),
    ]
    for batch, vertices, rows, length, channels, columns in shapes:
        indices = torch.randint(0, max(1, vertices), (rows, length))
        shaped = ((batch, vertices, channels), (columns, length * channels), (columns,))
        compare(
            Sample(
                "empty",
                lambda x, weight, bias, indices=indices: pahm_ops.spiral_conv(
                    x, indices, weight, bias, "elu"
                ),
                lambda x, weight, bias, indices=indices: reference.spiral_conv(
                    x, indices, weight, bias, "elu"
                ),
                tuple(torch.randn(s, dtype=torch.float64) for s in shaped),
                (),
            ),
            1e-10,
        )
    for height, width, batch, channels in (
        (5, 4, 0, 3),
        (5, 4, 2, 0),
        (0, 4, 2, 3),
        (5, 0, 2, 3),
        (5, 4, 2, 3),
    ):
        matrix = torch.zeros(height, width)
        transform = MeshTransform.prepare(matrix.to_sparse())
        x = torch.randn(batch, width, channels, requires_grad=True)
        out = pahm_ops.mesh_pool(x, transform)
        assert out.shape == (batch, height, channels) and not out.any()
        assert not torch.autograd.grad(out, x, torch.ones_like(out))[0].any()
    for batch, count, channels in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        feature = torch.randn(batch, channels, 4, 5, requires_grad=True)
        vertices = torch.rand(batch, count, 2, requires_grad=True)
        out = pahm_ops.vertex_sample(feature, vertices)
        assert out.shape == (batch, count, channels)
        grads = torch.autograd.grad(out, [feature, vertices], torch.ones_like(out))
        assert not any(g.any() for g in grads)
    return len(shapes)


def refusals() -> int:
    """Raw ops refuse what would read beyond a tensor."""
    x, table, *lists, weight, bias, _ = samples("spiral_conv")[0].raw
    grad = torch.randn(x.shape[0], table.shape[1], len(weight), dtype=x.dtype)
    maps, vertices, camera, *options = samples("vertex_sample")[-1].raw
    sampled = torch.randn(*vertices.shape[:2], sum(m.shape[1] for m in maps), dtype=x.dtype)
    needs = [True] * (len(maps) + 2)
    features, pointers, columns, values, *transpose = samples("mesh_pool")[0].raw
    conv, pool = ops._triton_spiral_conv, ops._triton_mesh_pool
    input_grad, weight_grad = ops._triton_spiral_conv_input_grad, ops._triton_spiral_conv_weight_grad
    sample, sample_backward = ops._triton_vertex_sample, ops._triton_vertex_sample_backward
    calls = [
        lambda: conv(x, table, *lists, weight[:, 1:], bias, 0),
        lambda: conv(x, table, *lists, weight, bias[1:], 0),
        lambda: conv(x, table, *lists, weight, bias, 4),
        lambda: conv(x, table, *lists, weight.float(), bias, 0),
        lambda: conv(x, table.long(), *lists, weight, bias, 0),
        lambda: conv(x[0], table, *lists, weight, bias, 0),
        lambda: input_grad(grad[:, 1:], table, *lists, weight, x.shape[1]),
        lambda: input_grad(grad[..., 1:], table, *lists, weight, x.shape[1]),
        lambda: input_grad(grad, table, *lists, weight[:, 1:], x.shape[1]),
        lambda: input_grad(grad, table, *lists, weight, x.shape[1] + 1),
        lambda: weight_grad(grad, x[:1], table, *lists),
        lambda: weight_grad(grad[:, 1:], x, table, *lists),
        lambda: weight_grad(grad, x.float(), table, *lists),
        lambda: pool(features[0], pointers, columns, values, *transpose),
        lambda: pool(features, pointers, columns.long(), values, *transpose),
        lambda: pool(features, pointers, columns, values[1:], *transpose),
        lambda: sample([maps[0], maps[1].float()], vertices, camera, *options),
        lambda: sample([maps[0], maps[1][:1]], vertices, camera, *options),
        lambda: sample(maps, vertices[..., :2], camera, *options),
        lambda: sample(maps, vertices, camera[:1], *options),
        lambda: sample_backward(sampled[:, 1:], maps, vertices, camera, *options, needs),
        lambda: sample_backward(sampled, maps, vertices, camera, *options, needs[1:]),
    ]
    with torch.no_grad():
        for call in calls:
            with pytest.raises(ValueError, match="must"):
                call()
    return len(calls)


def crossings() -> int:
    """A call crosses the dispatcher twice, for the op and for its result; no kernel runs."""
    _tuning = sys.modules["pahm_ops.triton._tuning"]
    _tuning.Kernel.launch = lambda *_, **__: None
    for op in OPS:
        sample = samples(op, torch.float32)[0]
        sample.function(*sample.arguments)  # makes a table that later calls remember
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as record:
            sample.function(*sample.arguments)
        found = [e.name for e in record.events() if e.name.startswith(("aten::", "pahm_ops::"))]
        assert sorted(found) == ["aten::empty", f"pahm_ops::_triton_{op}"], found
    return len(OPS)


if __name__ == "__main__":
    # Triton's ops, which backends defines for GPUs, serve the CPU.
    backends_module = sys.modules["pahm_ops.backends"]
    define = backends_module._TRITON.impl
    backends_module._TRITON.impl = lambda name, function, key: key == "CUDA" and define(name, function, "CPU")
    import pahm_ops.triton.mesh_pool
    import pahm_ops.triton.spiral_conv
    import pahm_ops.triton.vertex_sample

    for module in (pahm_ops.triton.mesh_pool, pahm_ops.triton.spiral_conv, pahm_ops.triton.vertex_sample):
        backends_module._COMPILED.update(module.OPS)
    for check in sys.argv[1:]:
        function, *arguments = check.split()
        torch.manual_seed(0)
        try:
            print(json.dumps(globals()[function](*arguments)), flush=True)
        except Exception:
            print(json.dumps(traceback.format_exc()), flush=True)
