"""Two devices: every launch goes to the device of its tensors, whichever is the current one."""

import threading

import pytest
import torch
from gpu_cases import DEVICE, all_close, compare, expected, map_sample, op_sample, with_gradients
from op_samples import OPS

from pahm_ops import _library

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

each_op = pytest.mark.parametrize("op", OPS)
SECOND = torch.device("cuda", 1)
#: of a sleeping stream: about half a second
CYCLES = 10**9


@pytest.fixture(autouse=True)
def two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    torch.cuda.set_device(0)
    yield
    current = torch.cuda.current_device()
    torch.cuda.set_device(0)
    assert current == 0


def check_on(op: str, device: torch.device) -> None:
    assert {t.device for t in compare(op_sample(op, device))} == {device}


@each_op
def test_the_second_device_while_the_first_is_current(path, op):
    check_on(op, SECOND)
    assert torch.cuda.current_device() == 0


@each_op
def test_the_devices_in_turns(path, op):
    for device in (DEVICE, SECOND, DEVICE, SECOND):
        check_on(op, device)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(SECOND):
        for device in (SECOND, DEVICE, SECOND):
            check_on(op, device)
            assert torch.cuda.current_device() == 1


@each_op
@pytest.mark.parametrize("current", [None, 0, 1])
def test_in_a_thread_that_has_not_used_a_device(path, op, current):
    """Each thread has a current device of its own, in torch and in the runtime of the library."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            if current is not None:
                torch.cuda.set_device(current)
            check_on(op, SECOND)
            check_on(op, DEVICE)
            assert torch.cuda.current_device() == (current or 0)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failed == []


@each_op
def test_the_default_stream_is_that_of_the_second_device(path, op):
    """Inputs are there only after that stream has slept."""
    sample = op_sample(op, SECOND)
    sources = [a.detach().clone() for a in sample.arguments]
    wanted = expected(sample)
    run = with_gradients(sample)
    run()
    for argument in sample.arguments:
        argument.detach().zero_()
    torch.cuda.synchronize(SECOND)
    with torch.cuda.device(SECOND):
        torch.cuda._sleep(CYCLES)
    for argument, source in zip(sample.arguments, sources, strict=True):
        argument.detach().copy_(source)
    all_close(run(), wanted)


def test_much_shared_memory_on_both_devices(path):
    """More than 48 KiB a block must be allowed on each device by itself."""
    for device in (DEVICE, SECOND):
        with device:
            maps, points = torch.randn(1, 8, 3, 2000), torch.rand(1, 50, 2) * 2 - 1
        compare(map_sample([maps], points))


def test_asking_whether_the_kernels_run_changes_no_device():
    if not _library.CUDA_LOADED:
        pytest.skip("no compiled CUDA library here")
    for device in (1, 0, 1):
        torch.ops.pahm_ops._cuda_runs(device)
        assert torch.cuda.current_device() == 0
    assert not torch.ops.pahm_ops._cuda_runs(-1)
    assert not torch.ops.pahm_ops._cuda_runs(torch.cuda.device_count())
