"""The program of tests/simt/test_cuda_layer.py: the public ops by csrc/cuda, on the CPU.

python tests/helpers/cuda_layer.py LIBRARY, where LIBRARY is tests/simt/cuda_layer.cpp, compiled
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

import torch
from gpu_layer import compare
from op_samples import OPS, Sample, samples
from torch.profiler import ProfilerActivity, profile

from pahm_ops import spiral_conv


class Counter:
    def __init__(self, library: str) -> None:
        self._allocations = ctypes.CDLL(library).pahm_allocations
        self._allocations.restype = ctypes.c_int64

    def count(self, function: Callable[[], object]) -> dict[str, object]:
        """The ops that a call takes through the dispatcher, and the memory that csrc/cuda asks for."""
        function()
        before = self._allocations()
        with profile(activities=[ProfilerActivity.CPU]) as record:
            function()
        # The others are autograd's nodes.
        ops = [event.name for event in record.events() if event.name.startswith(("aten::", "pahm_ops::"))]
        return {"ops": sorted(ops), "allocations": self._allocations() - before}


def backward(sample: Sample) -> Callable[[], object]:
    leaves = sample.leaves()
    out = sample.function(*leaves)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    counter = Counter(sys.argv[1])
    found = {}
    for op in OPS:
        for sample in samples(op, torch.float32)[::3]:
            compare(sample, 1e-4)
        compare(samples(op, torch.float64)[-1], 1e-10)
        # With a camera, and without an activation.
        sample = samples(op, torch.float32)[9 if op == "vertex_sample" else 0]
        with torch.no_grad():
            forward = counter.count(lambda sample=sample: sample.function(*sample.arguments))
        found[op] = {"forward": forward, "backward": counter.count(backward(sample))}
    # So few rows and so long a sum that the sum is split between blocks.
    x, weight, indices = torch.randn(1, 4, 64), torch.randn(32, 9 * 64), torch.randint(0, 4, (4, 9))
    found["spiral_conv, split"] = {"forward": counter.count(lambda: spiral_conv(x, indices, weight))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
