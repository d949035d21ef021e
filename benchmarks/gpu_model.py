"""A model, not a measurement: the least time of the CUDA kernels on GPUs that were never timed.

python benchmarks/gpu_model.py [--batch 32] [--output FILE]

The kernels run on the CPU, in the machine of tests/simt, which counts what they move. The modelled time is
the longer of two: those bytes over the GPU's published bandwidth, and the floating-point operations over its
rate. It leaves out launches and latencies, and it takes the L2 cache to keep what one launch touches.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import simt_ops
from paper_levels import CHANNELS, LENGTH, MAPS, Level, levels


class Gpu(NamedTuple):
    """Published figures: multiprocessors, bytes per second, operations per second without tensor cores."""

    processors: int
    bandwidth: float
    float32: float
    float64: float


#: NVIDIA's data sheets: A100 80 GB SXM, H100 SXM, HGX B200.
GPUS = {
    "A100": Gpu(108, 2.039e12, 19.5e12, 9.7e12),
    "H100": Gpu(132, 3.35e12, 67e12, 34e12),
    "B200": Gpu(148, 7.7e12, 75e12, 37e12),
}
HEAD = (64, 3)


class Case(NamedTuple):
    name: str
    least_bytes: int
    operations: int
    float64: bool
    run: Callable[[int], simt_ops.Counts]
    """The counts of the kernels on a GPU with the given number of multiprocessors."""


class Row(NamedTuple):
    name: str
    least_bytes: int
    operations: int
    float64: bool
    dram_bytes: int
    l2_bytes: int
    sectors: float
    """The ratio to the ideal."""
    launches: int

    def seconds(self, gpu: Gpu) -> float:
        rate = gpu.float64 if self.float64 else gpu.float32
        return max(self.dram_bytes / gpu.bandwidth, self.operations / rate)

    def bound(self, gpu: Gpu) -> str:
        rate = gpu.float64 if self.float64 else gpu.float32
        return "memory" if self.dram_bytes / gpu.bandwidth > self.operations / rate else "arithmetic"


def cases(batch: int, dtype: torch.dtype) -> list[Callable[[], Case]]:
    """A function for each case, which makes the case's tensors when it runs."""
    pixels = [
        partial(sample_case, level, shape, last, direction, batch, dtype)
        for level, shape in zip(levels(), MAPS, strict=True)
        for last in (True, False)
        for direction in ("forward", "backward")
    ]
    pools = [
        partial(pool_case, level, channels, direction, batch, dtype)
        for level, (channels, _) in zip(levels()[1:], CHANNELS[1:], strict=True)
        for direction in ("forward", "backward")
    ]
    products = [
        partial(spiral_case, level, channels, product, batch, dtype)
        for level, channels in [*zip(levels(), CHANNELS, strict=True), (levels()[-1], HEAD)]
        for product in ("forward", "input_grad", "weight_grad")
    ]
    return [*pixels, *pools, *products]


def _case(
    name: str,
    batch: int,
    dtype: torch.dtype,
    least_bytes: int,
    operations: int,
    run: Callable[[int], simt_ops.Counts],
) -> Case:
    full_name = f"{name} {str(dtype).removeprefix('torch.')} batch {batch}"
    return Case(full_name, least_bytes, operations, dtype == torch.float64, run)


def sample_case(
    level: Level, shape: tuple[int, int], last: bool, direction: str, batch: int, dtype: torch.dtype
) -> Case:
    scene = simt_ops.level_scene(level, shape, dtype, batch, last)
    channels, size = shape
    forward = direction == "forward"
    call = simt_ops.sample if forward else simt_ops.sample_backward
    return _case(
        f"vertex_sample {level.count} on {size}x{size} {'channels_last' if last else 'NCHW'} {direction}",
        batch,
        dtype,
        simt_ops.sample_least_bytes(scene, direction),
        (8 if forward else 16) * batch * level.count * channels,
        lambda processors: call(scene, processors=processors, races=False)[-1],
    )


def pool_case(level: Level, channels: int, direction: str, batch: int, dtype: torch.dtype) -> Case:
    up, transposed = level.up, direction == "backward"
    assert up is not None
    fine, coarse = up.shape
    x = torch.randn(batch, fine if transposed else coarse, channels).to(dtype)
    return _case(
        f"mesh_pool {coarse}-{fine} {channels} {direction}",
        batch,
        dtype,
        simt_ops.pool_least_bytes(x, up, transposed),
        2 * batch * channels * up.forward[1].numel(),
        lambda processors: simt_ops.pool(x, up, processors, transposed=transposed, races=False)[1],
    )


def spiral_case(
    level: Level, channels: tuple[int, int], product: str, batch: int, dtype: torch.dtype
) -> Case:
    tensors = simt_ops.spiral_inputs((batch, level.count, level.count, LENGTH, *channels), dtype)
    tensors = (tensors[0], level.indices, *tensors[2:])
    return _case(
        f"spiral_conv {level.count} {channels[0]}-{channels[1]} {product}",
        batch,
        dtype,
        simt_ops.spiral_least_bytes(product, tensors),
        2 * batch * level.count * LENGTH * channels[0] * channels[1],
        lambda processors: simt_ops.spiral_product(product, tensors, processors=processors, races=False)[1],
    )


def count(job: tuple[int, torch.dtype, int, int]) -> Row:
    """One case, in its own process."""
    batch, dtype, index, processors = job
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = cases(batch, dtype)[index]()
    counts = case.run(processors)
    return Row(
        *case[:4],
        counts.dram_bytes,
        counts.l2_bytes,
        counts.sectors / counts.ideal_sectors,
        counts.launches,
    )


def rows(batch: int, dtypes: tuple[torch.dtype, ...], processors: int = 132) -> list[Row]:
    jobs = [(batch, dtype, i, processors) for dtype in dtypes for i in range(len(cases(batch, dtype)))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(count, jobs))


def model_times(device_name: str, batch: int = 32) -> dict[str, float]:
    """Seconds by bench_gpu.py's case names, on the GPU whose name `device_name` contains; empty for another.

    spiral_conv has only float32: half precision runs in Triton, which nothing here counts.
    """
    gpu = next((gpu for name, gpu in GPUS.items() if name in device_name), None)
    if gpu is None:
        return {}
    seconds: dict[str, float] = {}
    for row in rows(batch, (torch.float32, torch.float16), gpu.processors):
        if row.name.startswith("spiral_conv") and "float16" in row.name:
            continue
        both = re.sub(r" (forward|backward|input_grad|weight_grad) ", " forward + backward ", row.name)
        seconds[both] = seconds.get(both, 0.0) + row.seconds(gpu)
        if " forward " in row.name:
            seconds[row.name] = row.seconds(gpu)
    return seconds


INTRODUCTION = """\
A model, not a measurement: no GPU was timed. MB is what a launch must move where the L2 cache keeps all that
it touches, counted by running the kernels on the CPU; `over least` is that over the sectors of inputs and
results, each once. `sectors over ideal` is what the requests of warps touch over what the same bytes would
take side by side. The time is those bytes over the published bandwidth, or the operations over the published
rate without tensor cores, whichever is longer: no launch, no latency. Half-precision `spiral_conv` is served
by Triton on tensor cores; its rows here are the CUDA kernels'.""".splitlines()


def table(found: list[Row]) -> list[str]:
    lines = [
        "# Modelled times of the CUDA kernels",
        "",
        "    python benchmarks/gpu_model.py --output docs/gpu_model.md",
        "",
        *INTRODUCTION,
        "",
        "| kernel | MB | over least | sectors over ideal | from L2 over least | MFLOP | bound on H100 | "
        + " | ".join(f"{name} us" for name in GPUS)
        + " |",
        "|---|---:|---:|---:|---:|---:|---|" + "---:|" * len(GPUS),
    ]
    for row in found:
        times = " | ".join(f"{row.seconds(gpu) * 1e6:.1f}" for gpu in GPUS.values())
        lines.append(
            f"| {row.name} | {row.dram_bytes / 1e6:.2f} | {row.dram_bytes / row.least_bytes:.2f} | "
            f"{row.sectors:.2f} | {row.l2_bytes / row.least_bytes:.2f} | {row.operations / 1e6:.1f} | "
            f"{row.bound(GPUS['H100'])} | {times} |"
        )
    for op in ("vertex_sample", "mesh_pool", "spiral_conv"):
        own = [row for row in found if row.name.startswith(op)]
        moved, least = sum(row.dram_bytes for row in own), sum(row.least_bytes for row in own)
        lines.append(f"| all of {op} | {moved / 1e6:.1f} | {moved / least:.2f} | | | | |" + " |" * len(GPUS))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, help="write the table there as well")
    options = parser.parse_args()
    lines = table(rows(options.batch, (torch.float32, torch.float16)))
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
