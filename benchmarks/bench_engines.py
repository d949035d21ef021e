"""The whole network in every engine, each in a process of its own: their threads wait for work in a loop.

The engines take turns: in a round each runs for `BURST_SECONDS` while the others sleep. "Ours" is the engine
"torch" of `Predictor`, "plain" the network without any preparation. Each takes images in the layout that it
likes best. A time is the median of the calls in a burst, and then of the rounds; in brackets are the outer
quartiles of the rounds. "One core busy" is a loop of Python in yet another process.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROWS
from torch import Tensor

from pahm.config import preset
from pahm.infer.engines import make_engine
from pahm.model import HandNet, load_checkpoint

ROUNDS = 9
BURST_SECONDS = 0.25
TOLERANCE = 1e-4  # metres
ENGINES = {"ours": "torch", "plain": "", "torch.compile": "compile", "OpenVINO": "openvino"}
ENGINES |= {"ONNX Runtime": "onnxruntime"}
IN_NCHW = ("plain", "OpenVINO", "ONNX Runtime")


def make_network(name: str) -> HandNet:
    """The shipped network for "tiny", else the preset's with random weights."""
    if name == "tiny":
        return load_checkpoint()
    torch.manual_seed(0)
    return HandNet(preset(name).override({"model.pretrained": False}).model).eval()


def serve(engine: str, preset_name: str, batch: int, pipe: Connection) -> None:
    """A process's work: send the vertices of fixed images; for each number received, the times of a burst."""
    network = make_network(preset_name)
    run: Callable[[Tensor], Any] = network
    if engine != "plain":
        run = make_engine(network, torch.device("cpu"), ENGINES[engine])
    side = network.config.image_size
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    if engine not in IN_NCHW:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        pipe.send(run(images).meshes[-1].numpy())
        while (seconds := pipe.recv()) is not None:
            run(images)
            times: list[float] = []
            start = before = time.perf_counter()
            while before - start < seconds or len(times) < 3:
                run(images)
                after = time.perf_counter()
                times.append(after - before)
                before = after
            pipe.send(times)


@contextmanager
def contenders(preset_name: str, batch: int, names: list[str]) -> Iterator[dict[str, Connection]]:
    """A pipe to a process for each engine. All have given the vertices that the plain network gives."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    with ExitStack() as stack:
        for name in names:
            pipes[name], other = context.Pipe()
            process = context.Process(target=serve, args=(name, preset_name, batch, other), daemon=True)
            process.start()
            other.close()
            stack.callback(process.join)
            stack.enter_context(closing(pipes[name]))
            stack.callback(pipes[name].send, None)
        vertices = {name: pipe.recv() for name, pipe in pipes.items()}
        for name, found in vertices.items():
            error = np.abs(found - vertices["plain"]).max()
            assert error <= TOLERANCE, f"{name} puts a vertex {error:.1e} m from where the network has it"
        yield pipes


@pytest.fixture(
    scope="module",
    params=[("tiny", 1), ("tiny", 8), ("resnet18", 1), ("resnet18", 8)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def engines(request: pytest.FixtureRequest) -> Iterator[dict[str, Connection]]:
    without = "compile" if request.config.getoption("--no-compile") else None
    installed = [
        name
        for name, engine in ENGINES.items()
        if engine != without
        and (engine in ("", "torch", "compile") or importlib.util.find_spec(engine) is not None)
    ]
    with contenders(*request.param, installed) as pipes:
        yield pipes


@pytest.fixture(params=["quiet", "one core busy"])
def load(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "quiet":
        yield request.param
        return
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield request.param
    finally:
        spinner.kill()
        spinner.wait()


def bench_engines(benchmark, request, engines, load):
    if benchmark.disabled:
        return
    times: dict[str, list[float]] = {name: [] for name in engines}

    def burst(name: str) -> None:
        engines[name].send(BURST_SECONDS)
        times[name].append(float(np.median(engines[name].recv())))

    turns = deque(name for name in engines if name != "ours")

    def others() -> None:
        for name in turns:
            burst(name)
        turns.rotate()

    benchmark.pedantic(burst, ("ours",), setup=others, rounds=ROUNDS)
    low, middle, high = (
        {name: float(np.quantile(taken, part)) for name, taken in times.items()} for part in (0.25, 0.5, 0.75)
    )
    row = {
        "group": f"engines, {load}",
        "case": request.node.name.removeprefix("bench_"),
        "seconds": middle,
        "spread": {name: (low[name], high[name]) for name in times},
    }
    benchmark.extra_info.update(row)
    request.config.stash[ROWS].append(row)
