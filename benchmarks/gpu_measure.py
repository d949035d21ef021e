"""A pytest plugin for bench_gpu.py and bench_gpu_network.py that measures time with the device's own clock.

A time is measured between two events on the stream, with a cold L2 cache. Before each call the cache is
flushed and the device sleeps until the host has launched the whole call, so the device never waits for a
launch: the result is the device's time, as in a CUDA graph. "Wall" is the time of a loop of calls with a warm
cache, including launches. Results are compared first. Contenders take turns in a rotating order; times are
medians.
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from gpu_report import table
from torch import Tensor

from pahm_ops.backends import available

Contender = Callable[[], tuple[Tensor, ...]]
Interval = tuple[torch.cuda.Event, torch.cuda.Event]
DEVICE = torch.device("cuda", 0)
ROUNDS = 25
WALL_SECONDS = 5e-3
PATH = "PAHM_GPU_PATH"
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 4e-2}
ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Skip here and not with a mark, so that pytest reports all skips in one line.
    if "compare_on_gpu" in getattr(item, "fixturenames", ()) and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


class DeviceClock:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self._flushed = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=DEVICE)
        cycles = 10_000_000
        torch.cuda._sleep(cycles)
        begin, end = self._between(lambda: torch.cuda._sleep(cycles))
        torch.cuda.synchronize(DEVICE)
        self._cycles_a_second = cycles / (begin.elapsed_time(end) * 1e-3)

    @staticmethod
    def _between(function: Callable[[], object]) -> Interval:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        return begin, end

    def launch_seconds(self, function: Contender) -> float:
        """The host's time to launch a call."""
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize(DEVICE)
            start = time.perf_counter()
            function()
            best = min(best, time.perf_counter() - start)
        torch.cuda.synchronize(DEVICE)
        return best

    def in_turns(self, contenders: dict[str, Contender]) -> dict[str, float]:
        """Device seconds per call."""
        covers = {
            name: int((2 * self.launch_seconds(function) + 5e-5) * self._cycles_a_second)
            for name, function in contenders.items()
        }
        events: dict[str, list[Interval]] = {name: [] for name in contenders}
        order = deque(contenders)
        for _ in range(ROUNDS):
            for name in order:
                self._flushed.zero_()
                torch.cuda._sleep(covers[name])
                events[name].append(self._between(contenders[name]))
            order.rotate()
        torch.cuda.synchronize(DEVICE)
        return {name: median(b.elapsed_time(e) * 1e-3 for b, e in found) for name, found in events.items()}

    def wall_in_turns(self, contenders: dict[str, Contender]) -> dict[str, float]:
        """Seconds per call in a loop, by the host's clock."""
        calls = {
            name: max(1, int(WALL_SECONDS / self.launch_seconds(function)))
            for name, function in contenders.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        order = deque(contenders)
        for _ in range(len(contenders)):
            for name in order:
                torch.cuda.synchronize(DEVICE)
                start = time.perf_counter()
                for _ in range(calls[name]):
                    contenders[name]()
                torch.cuda.synchronize(DEVICE)
                seconds[name].append((time.perf_counter() - start) / calls[name])
            order.rotate()
        return {name: median(found) for name, found in seconds.items()}


def peak_bytes(function: Contender) -> int:
    """How much more memory is allocated at the peak of a call than before it."""
    torch.cuda.synchronize(DEVICE)
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    function()
    return torch.cuda.max_memory_allocated(DEVICE) - before


def waited_for(function: Contender) -> None:
    function()
    torch.cuda.synchronize(DEVICE)


def on_path(path: str, function: Contender) -> Contender:
    """`function` with our ops on the given path."""

    def run() -> tuple[Tensor, ...]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(PATH, path)
            return function()

    return run


def check_equal(
    name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float | None = None
) -> None:
    """`limit`: of the largest value; by default that of the dtype."""
    limit = limit or TOLERANCE[expected[0].dtype]
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"result {i} of {name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        assert error <= limit, f"result {i} of {name} is off by {error:.2e} of the largest value"


def usable(contenders: dict[str, Contender]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run here, always including ours and the reference, and why the others do not."""
    found, reasons = dict(contenders), {}
    for name in list(contenders)[2:]:
        try:
            contenders[name]()
        except (RuntimeError, NotImplementedError) as error:
            reasons[name] = str(error).splitlines()[0]
            del found[name]
    return found, reasons


@pytest.fixture(scope="session")
def clock() -> DeviceClock:
    return DeviceClock()


@pytest.fixture
def compare_on_gpu(benchmark: Any, clock: DeviceClock, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`compare_on_gpu(case, served, contenders)`: ours, the reference, others; `served` is our path.

    `tolerance`: see `check_equal`. `paths`: also time ours with each kind of kernel forced.
    """

    def run(
        case: str,
        served: str,
        contenders: dict[str, Contender],
        tolerance: float | None = None,
        paths: bool = True,
    ) -> None:
        ours, reference, *_ = contenders
        expected = contenders[reference]()
        contenders, left_out = usable(contenders)
        forced = {
            path: on_path(path, contenders[ours])
            for path in ("cuda", "triton")
            if paths and PATH not in os.environ and available(path, DEVICE)
        }
        for name, function in (contenders | forced).items():
            if name != reference:
                check_equal(name, function(), expected, tolerance)
        benchmark.pedantic(waited_for, (contenders[ours],), rounds=ROUNDS, warmup_rounds=1)
        if benchmark.disabled:
            return
        seconds = clock.in_turns(contenders | forced)
        row = {
            "gpu_case": case,
            "device": torch.cuda.get_device_name(DEVICE),
            "served": served,
            "device_seconds": {name: seconds[name] for name in contenders},
            "path_seconds": {name: seconds[name] for name in forced},
            "wall_seconds": clock.wall_in_turns(contenders),
            "peak_bytes": {name: peak_bytes(function) for name, function in contenders.items()},
            "result_bytes": sum(t.nbytes for t in expected),
            "left_out": left_out,
        }
        benchmark.extra_info.update(row)
        request.config.stash.setdefault(ROWS, []).append(row)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows and not config.getoption("benchmark_quiet"):
        terminalreporter.write_sep("-", f"medians of {ROUNDS} rounds in turns, {rows[0]['device']}")
        for line in table(rows, {}):
            terminalreporter.write_line(line)
