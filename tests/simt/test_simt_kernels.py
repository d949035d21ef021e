"""How kernels are called on the CPU (tests/helpers/simt_kernels.py): arguments, sanitizers, fibers."""

import pytest
import torch
from simt_kernels import Kernels, needs_gxx

pytestmark = needs_gxx
KERNELS = Kernels("calls.cpp")
THREADS = 128
IN = torch.arange(THREADS, dtype=torch.float32)

ECHO = (True, -3, 2**40, 0.5, [IN[7:9], None], [3, 4], [0.25, 1.5], None)


@pytest.mark.parametrize("sanitize", [False, True])
def test_arguments_of_every_kind_arrive(sanitize):
    out = torch.zeros(10, dtype=torch.float64)
    KERNELS.call("echo", *ECHO, out, seed=12, sanitize=sanitize)
    assert out.tolist() == [1, -3, 2**40, 0.5, 7, 0, 4, 1.5, 0, 12]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 2, "an integer as argument 0"),
        (1, 2**31, "an integer as argument 1"),
        (2, 0.5, "an integer as argument 2"),
        (3, 1, "a float as argument 3"),
        (4, IN, "a list of tensors as argument 4"),
        (5, [0.5], "a tensor as argument 5"),
        (7, IN.double(), "elements of 4 bytes as argument 7"),
        (8, 5, "a tensor as argument 8"),
    ],
)
def test_wrong_arguments_are_named(place, value, message):
    values = [*ECHO, torch.zeros(10, dtype=torch.float64)]
    values[place] = value
    with pytest.raises(RuntimeError, match=f"echo expects {message}"):
        KERNELS.call("echo", *values)
    with pytest.raises(RuntimeError, match="echo takes 9 arguments, got 8"):
        KERNELS.call("echo", *values[1:])
    with pytest.raises(RuntimeError, match="no case is called nothing"):
        KERNELS.call("nothing")


@pytest.mark.parametrize(
    ("kernel", "right", "wrong", "message"),
    [
        ("own_array", 399, 400, "stack-buffer-overflow"),
        ("arithmetic", 2**31 - 2, 2**31 - 1, "signed integer overflow"),
    ],
)
def test_sanitizers_see_what_the_machine_does_not(kernel, right, wrong, message):
    """Without them, both pass."""
    out = torch.zeros(THREADS, dtype=torch.int32)
    KERNELS.call(kernel, 1, 0, 1, out, right, sanitize=True)
    KERNELS.call(kernel, 1, 0, 1, out, wrong)
    with pytest.raises(RuntimeError, match=message):
        KERNELS.call(kernel, 1, 0, 1, out, wrong, sanitize=True)


def test_sanitizers_see_the_end_of_each_tensor():
    total = torch.zeros(1, dtype=torch.int32)
    data = torch.arange(5, dtype=torch.int32)[1:]
    KERNELS.call("host_sum", data, 4, total, sanitize=True)
    assert total.item() == 10
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        KERNELS.call("host_sum", data, 5, total, sanitize=True)


@pytest.mark.parametrize("sanitize", [False, True])
def test_a_failure_leaves_nothing_behind(sanitize):
    out = torch.zeros(THREADS)
    KERNELS.call("after_failures", IN, out, sanitize=sanitize)
    assert torch.equal(out, IN.flip(0))


def test_machines_without_a_switch_of_their_own_use_ucontext():
    kernels = Kernels("calls.cpp", "-DSIMT_UCONTEXT")
    out = torch.zeros(THREADS)
    kernels.call("reverse", 1, 0, 1, IN, out, True)
    assert torch.equal(out, IN.flip(0))
    with pytest.raises(RuntimeError, match="shared memory"):
        kernels.call("reverse", 1, 0, 1, IN, out, False)
