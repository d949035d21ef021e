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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import simt_ops
from paper_levels import CHANNELS, LENGTH, MAPS, levels


class Gpu(NamedTuple):
    """Published figures: multiprocessors, bytes a second, operations a second without tensor cores."""

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
    """What the kernels count on a GPU of so many multiprocessors."""


class Row(NamedTuple):
    name: str
    least_bytes: int
    operations: int
    float64: bool
    dram_bytes: int
    l2_bytes: int
    sectors: float
    """Over the ideal."""
    launches: int

    def seconds(self, gpu: Gpu) -> float:
        rate = gpu.float64 if self.float64 else gpu.float32
        return max(self.dram_bytes / gpu.bandwidth, self.operations / rate)

    def bound(self, gpu: Gpu) -> str:
        rate = gpu.float64 if self.float64 else gpu.float32
        return "memory" if self.dram_bytes / gpu.bandwidth > self.operations / rate else "arithmetic"


def cases(batch: int, dtype: torch.dtype) -> Iterator[Case]:
    torch.manual_seed(0)
    name, double = str(dtype).removeprefix("torch."), dtype == torch.float64
    tail = f"{name} batch {batch}"
    for level, (channels, size) in zip(levels(), MAPS, strict=True):
        for last in (True, False):
            scene = simt_ops.level_scene(level, (channels, size), dtype, batch, last)
            where = f"{level.count} on {size}x{size} {'channels_last' if last else 'NCHW'}"
            for direction, operations, call in (
                ("forward", 8, simt_ops.sample),
                ("backward", 16, simt_ops.sample_backward),
            ):
                yield Case(
                    f"vertex_sample {where} {direction} {tail}",
                    simt_ops.sample_least_bytes(scene, direction),
                    operations * batch * level.count * channels,
                    double,
                    lambda p, s=scene, call=call: call(s, processors=p, races=False)[-1],
                )
    for level, (channels, _) in zip(levels()[1:], CHANNELS[1:], strict=True):
        assert level.up is not None
        fine, coarse = level.up.shape
        for transposed in (False, True):
            x = torch.randn(batch, fine if transposed else coarse, channels).to(dtype)
            yield Case(
                f"mesh_pool {coarse}-{fine} {channels} {'backward' if transposed else 'forward'} {tail}",
                simt_ops.pool_least_bytes(x, level.up, transposed),
                2 * batch * channels * level.up.forward[1].numel(),
                double,
                lambda p, x=x, t=level.up, back=transposed: simt_ops.pool(
                    x, t, p, transposed=back, races=False
                )[1],
            )
    for level, (channels, out_channels) in [*zip(levels(), CHANNELS, strict=True), (levels()[-1], HEAD)]:
        tensors = simt_ops.spiral_inputs(
            (batch, level.count, level.count, LENGTH, channels, out_channels), dtype
        )
        tensors = (tensors[0], level.indices, *tensors[2:])
        for product in ("forward", "input_grad", "weight_grad"):
            yield Case(
                f"spiral_conv {level.count} {channels}-{out_channels} {product} {tail}",
                simt_ops.spiral_least_bytes(product, tensors),
                2 * batch * level.count * LENGTH * channels * out_channels,
                double,
                lambda p, t=tensors, product=product: simt_ops.spiral_product(
                    product, t, processors=p, races=False
                )[1],
            )


def count(job: tuple[int, torch.dtype, int, int]) -> Row:
    """One case, in a process of its own."""
    batch, dtype, index, processors = job
    torch.set_num_threads(1)
    case = next(c for i, c in enumerate(cases(batch, dtype)) if i == index)
    counts = case.run(processors)
    return Row(
        *case[:4],
        counts.dram_bytes,
        counts.l2_bytes,
        counts.sectors / counts.ideal_sectors,
        counts.launches,
    )


def rows(batch: int, dtypes: tuple[torch.dtype, ...], processors: int = 132) -> list[Row]:
    jobs = [(batch, dtype, i, processors) for dtype in dtypes for i in range(sum(1 for _ in cases(1, dtype)))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(count, jobs))


def model_times(device_name: str, batch: int = 32) -> dict[str, float]:
    """Seconds by bench_gpu.py's case names, on the GPU whose name `device_name` contains; empty for another.

    spiral_conv has float32 alone: half precision is Triton's, which nothing here counts.
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
