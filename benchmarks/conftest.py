"""Times several ways of computing the same thing, in turns; `pytest benchmarks --benchmark-only` runs all.

A benchmark requests `compare` and calls it with functions that take no arguments and return a tensor or a
tuple of tensors: ours, what users have today, and `torch.compile` of that. Results are compared first; no
time is reported for a wrong result. Each round then runs all functions and the machine's ceilings, so that a
drifting machine favours none. A round calls each function as many times in a row as ours needs for 4 ms.
The table of pytest-benchmark shows our times, the other table the best round of each; both are for one call.
`--benchmark-json FILE` keeps everything: `python benchmarks/report.py FILE` makes a table and a plot of it.

`--no-compile` leaves out torch.compile, which takes most of the time. On a shared machine,
`OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only --benchmark-timer=time.process_time` counts CPU time.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import Ceilings, Work, peak_bytes
from pytest_benchmark.utils import load_timer
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]
Contender = Callable[[], Result]
ROUNDS = 9
ROUND_SECONDS = 4e-3
ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out of the comparisons")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def processor() -> str:
    """The CPU's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    from pahm_ops import backends

    served = backends()["spiral_conv"]["cpu"]
    return f"{processor()}, {torch.get_num_threads()} threads, {served}, torch {torch.__version__}"


def pytest_report_header() -> str:
    return machine()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["pahm"] = machine()


def check_equal(name: str, result: Result, expected: Result, tolerance: float) -> None:
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape, (
            f"result {i} of {name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        )
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        assert error <= tolerance, f"result {i} of {name} is off by {error:.2e} of the largest value"


def repeat(function: Contender, calls: int) -> None:
    for _ in range(calls):
        function()


def calls_in_a_round(function: Contender, timer: Callable[[], float]) -> int:
    function()
    calls = 1
    while True:
        start = timer()
        repeat(function, calls)
        if timer() - start >= ROUND_SECONDS:
            return calls
        calls *= 2


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`compare(group, contenders, work)`: contenders by name, ours first, the reference second.

    Each group gets a mean. Without work there is no ceiling.
    """

    def run(
        group: str, contenders: dict[str, Contender], work: Work | None = None, tolerance: float = 1e-4
    ) -> None:
        ours, reference, *_ = contenders
        expected = contenders[reference]()
        result_bytes = sum(r.nbytes for r in (expected if isinstance(expected, tuple) else (expected,)))
        for name, function in contenders.items():
            if name != reference:
                check_equal(name, function(), expected, tolerance)
        del expected
        if benchmark.disabled:
            benchmark(contenders[ours])
            return
        timer = load_timer(request.config.getoption("benchmark_timer")).target
        memory = {name: peak_bytes(function) for name, function in contenders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in contenders if name != ours}
        calls = calls_in_a_round(contenders[ours], timer)
        ceilings = None if work is None else Ceilings(work, timer, calls)

        def time_other(name: str) -> None:
            start = timer()
            repeat(contenders[name], calls)
            seconds[name].append((timer() - start) / calls)

        turns = deque(partial(time_other, name) for name in seconds)
        if ceilings is not None:
            turns.extend([ceilings.sample_arithmetic, ceilings.sample_copy])

        def run_others() -> None:
            assert benchmark.stats is not None
            benchmark.stats.iterations = calls
            for turn in turns:
                turn()
            # The previous call decides what is in the cache, so rotate: each follows each in some round.
            turns.rotate()

        benchmark.pedantic(
            repeat, (contenders[ours], calls), setup=run_others, rounds=ROUNDS, warmup_rounds=2
        )
        best = {ours: benchmark.stats.stats.min, **{name: min(taken) for name, taken in seconds.items()}}
        row = {
            "group": group,
            "case": request.node.name.removeprefix("bench_"),
            "seconds": best,
            "peak_bytes": memory,
            "result_bytes": result_bytes,
        }
        if work is not None and ceilings is not None:
            row |= ceilings.record(work)
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return run


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Callable[[Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """`{"torch.compile": compiled function}`, or an empty dict with --no-compile."""

    def make(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        if request.config.getoption("--no-compile"):
            return {}
        torch._dynamo.reset()
        return {"torch.compile": torch.compile(function)}

    return make


def forward(function: Callable[[], Tensor], inputs: list[Tensor]) -> Contender:
    return torch.no_grad()(function)


def forward_and_backward(function: Callable[[], Tensor], inputs: list[Tensor]) -> Contender:
    """The output of `function` and the gradients of its inputs, given a fixed gradient of the output."""
    grad = torch.randn(function().shape, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, ...]:
        out = function()
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return run


@pytest.fixture(params=["forward", "forward + backward"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def timed(direction: str) -> Callable[[Callable[[], Tensor], list[Tensor]], Contender]:
    """Makes the function to time from one that computes the op."""
    return forward if direction == "forward" else forward_and_backward


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from report import tables

    rows = config.stash[ROWS]
    if rows:
        terminalreporter.write_sep("-", f"best of {ROUNDS} rounds in turns; {machine()}")
        for line in tables(rows):
            terminalreporter.write_line(line)
