"""Times two ways of computing the same thing, in turns; `pytest benchmarks --benchmark-only` runs everything.

A benchmark asks for `compare` and calls it with ours and theirs, two functions without arguments that return
a tensor or a tuple of tensors. Their results are compared first: no time is reported for a wrong one. Each
round then runs theirs, then ours, so that a drifting machine favours neither. The table of pytest-benchmark
shows our times; the other one shows the best round of both and their ratio. On a machine that others use too,
`OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only --benchmark-timer=time.process_time` counts CPU time.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.utils import load_timer
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]
ROUNDS = 9
ROWS = pytest.StashKey[list[tuple[str, float, float]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_report_header() -> str:
    from pahm_ops import backends

    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, backends: {backends()}"


def check_equal(ours: Result, theirs: Result, tolerance: float) -> None:
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs)), strict=True)
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape, f"result {i} has shape {tuple(a.shape)}, the reference {tuple(b.shape)}"
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error <= tolerance, f"result {i} is off by {error:.2e} of the reference's largest value"


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    def run(ours: Callable[[], Result], theirs: Callable[[], Result], tolerance: float = 1e-4) -> None:
        check_equal(ours(), theirs(), tolerance)
        seconds: list[float] = []
        timer = load_timer(request.config.getoption("benchmark_timer")).target

        def run_theirs() -> None:
            start = timer()
            theirs()
            seconds.append(timer() - start)

        benchmark.pedantic(ours, setup=run_theirs, rounds=ROUNDS, warmup_rounds=2)
        if benchmark.stats is not None:
            best, reference = benchmark.stats.stats.min, min(seconds)
            benchmark.extra_info["reference_seconds"] = reference
            benchmark.extra_info["ratio"] = reference / best
            request.config.stash[ROWS].append((request.node.name, best, reference))

    yield run


def forward_and_backward(function: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Result]:
    """The output of `function` and the gradients of its inputs, given a fixed gradient of the output."""
    grad = torch.randn(function().shape, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, ...]:
        out = function()
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return run


@pytest.fixture(params=["forward", "forward + backward"])
def direction(
    request: pytest.FixtureRequest,
) -> Callable[[Callable[[], Tensor], list[Tensor]], Callable[[], Result]]:
    """Makes the timed function out of one that computes the op."""
    if request.param == "forward":
        return lambda function, inputs: torch.no_grad()(function)
    return forward_and_backward


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    width = max(len(name) for name, *_ in rows)
    terminalreporter.write_sep("-", f"best of {ROUNDS} rounds in turns, {torch.get_num_threads()} threads")
    terminalreporter.write_line(f"{'':{width}}  {'ours ms':>9}  {'reference ms':>12}  {'ratio':>6}")
    for name, ours, theirs in rows:
        terminalreporter.write_line(
            f"{name:{width}}  {ours * 1e3:9.3f}  {theirs * 1e3:12.3f}  {theirs / ours:5.1f}x"
        )
