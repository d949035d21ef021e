"""Frozen modules on any number of threads, from several callers and in forked processes."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from frozen_modules import Through
from torch import nn
from torch.nn import functional as F

from pahm_ops.frozen import freeze


@pytest.fixture(autouse=True)
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def module(seed=0):
    """Large enough that each step is cut into chunks."""
    torch.manual_seed(seed)

    def forward(first, middle, narrow, norm, down, x):
        y = F.relu(first(x))
        y = F.relu(middle(y) + y)
        y = F.max_pool2d(narrow(y), 2)
        y = F.interpolate(y, (24, 24), mode="bilinear")
        return y, down(norm(y.flatten(2).transpose(1, 2))).sigmoid()

    layers = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=32)
    return Through(forward, *layers, nn.LayerNorm(32), nn.Linear(32, 20))


def images(seed=0):
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_same_bits_for_any_number_of_threads(isa):
    frozen, x = freeze(module()), images()
    torch.set_num_threads(1)
    expected = frozen(x)
    for count in (2, 3, 5, 1, 4, 2):
        torch.set_num_threads(count)
        for _ in range(3):
            assert same(frozen(x), expected)


def test_fewer_threads_after_many():
    """A thread of an earlier call never runs work of a call that it was not asked for."""
    frozen, x = freeze(module()), images()
    torch.set_num_threads(1)
    expected = frozen(x)
    for turn in range(40):
        torch.set_num_threads((8, 2)[turn % 2])
        assert same(frozen(x), expected)


def together(calls):
    start = threading.Barrier(len(calls))

    def run(call):
        torch.set_num_threads(2)
        start.wait()
        return [call() for _ in range(6)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def test_several_callers_of_one_module():
    frozen = freeze(module())
    inputs = [images(i) for i in range(4)]
    expected = [frozen(x) for x in inputs]
    for results, theirs in zip(together([lambda x=x: frozen(x) for x in inputs]), expected, strict=True):
        assert all(same(ours, theirs) for ours in results)


def test_several_callers_of_two_modules():
    modules = [freeze(module(0)), freeze(module(1))]
    calls = [(modules[i % 2], images(i)) for i in range(4)]
    expected = [frozen(x) for frozen, x in calls]
    for results, theirs in zip(together([lambda c=c: c[0](c[1]) for c in calls]), expected, strict=True):
        assert all(same(ours, theirs) for ours in results)


def test_several_callers_with_new_shapes_at_once():
    layer = Through(lambda a, b, x: b(F.relu(a(x))), nn.Linear(9, 16), nn.Linear(16, 5))
    for _ in range(5):
        frozen = freeze(layer)
        inputs = [torch.randn(3 + i, 9) for i in range(6)]
        calls = [lambda x=x, frozen=frozen: frozen(x) for x in inputs]
        for results, x in zip(together(calls), inputs, strict=True):
            for ours in results:
                torch.testing.assert_close(ours, layer(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_calls():
    # PyTorch's own threads do not survive a fork, so its copies of inputs and results are small here.
    def forward(a, b, c, x):
        return F.max_pool2d(c(F.relu(b(F.relu(a(x))))), 8)

    layers = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
    frozen, x = freeze(Through(forward, *layers)), images()[:1]
    torch.set_num_threads(3)
    expected = frozen(x)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            # pytest must not go on in the child.
            equal = False
            try:
                equal = all(torch.equal(frozen(x), expected) for _ in range(3))
            finally:
                os._exit(0 if equal else 1)
        assert torch.equal(frozen(x), expected)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
