"""Where csrc/cuda launches kernels: on the device and the stream of the tensors, and nowhere else."""

import re

import pytest
import torch
from repository import ROOT

from pahm_ops import _library

CSRC = ROOT / "csrc"
SOURCES = {path.name: path.read_text() for kind in ("cuda", "kernels") for path in (CSRC / kind).iterdir()}
#: csrc/kernels/device.cuh's launch needs a Device, and csrc/cuda/launch.h makes one: in OnDeviceOf
SCOPE = re.search(r"class OnDeviceOf \{.*?^\};", SOURCES["launch.h"], re.DOTALL | re.MULTILINE)


def using(pattern: str) -> list[str]:
    return [name for name, text in sorted(SOURCES.items()) for _ in re.findall(pattern, text)]


def functions() -> dict[str, str]:
    """The functions of csrc/cuda that are registered as ops of tensors, and their bodies."""
    found = {}
    for name, text in SOURCES.items():
        for op, function in re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&pahm::(\w+)\)', text):
            if op == "_cuda_runs":
                continue
            body = re.search(rf"^\S[^\n]* {function}\(.*?^\}}", text, re.DOTALL | re.MULTILINE)
            assert body is not None, (name, function)
            found[op] = body[0]
    return found


def test_one_function_launches_and_one_class_makes_a_device():
    assert using("<<<") == ["device.cuh"]
    assert using(r"\bDevice device_\b|\bDevice\{") == ["launch.h"]
    assert using("aoti_torch_get_current_cuda_stream") == ["launch.h"]
    assert using("cudaLaunch|cudaMalloc|cudaMemcpy|cudaStream(?!_t)") == []


def test_the_scope_sets_the_device_of_torch_and_of_the_librarys_own_runtime():
    assert SCOPE is not None
    constructor = re.search(r"explicit OnDeviceOf\(.*?^  \}", SCOPE[0], re.DOTALL | re.MULTILINE)
    assert constructor is not None
    steps = ("guard_(x.get_device_index())", "cudaSetDevice(index)", "current_cuda_stream(index")
    places = [constructor[0].find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    # What is asked of a device names it, or comes after its scope has begun.
    assert using("cudaSetDevice") == ["cuda_runs.cu", "launch.h"]


def test_every_op_launches_within_the_scope_of_its_device():
    assert len(functions()) == 6
    for name, body in functions().items():
        begin = body.find("const OnDeviceOf on(")
        assert begin > 0, name
        launches = [m.start() for m in re.finditer(r"\brun<|_launch\b", body)]
        assert launches and min(launches) > begin, name
        assert body.count("OnDeviceOf") == 1, name


needs_library = pytest.mark.skipif(not _library.CUDA_LOADED, reason="no compiled CUDA library here")


@needs_library
def test_what_a_kernel_of_the_library_throws_is_a_value_error():
    """Called below the dispatcher, which would not hand it tensors of the CPU."""
    x, table, pointers = torch.zeros(1, 2, 3), torch.zeros(2, 2).int(), torch.zeros(3).int()
    maps, needs = [torch.zeros(1, 2, 4, 4)], [True, True, True]
    arguments = {
        "mesh_pool": (x, *(pointers, pointers, torch.zeros(3)) * 2),
        "spiral_conv": (x, table, pointers, pointers, torch.zeros(4, 6), None, 0),
        "_spiral_conv_input_grad": (x, table, pointers, pointers, torch.zeros(3, 3), 2),
        "_spiral_conv_weight_grad": (x, x, table, pointers, pointers),
        "vertex_sample": (maps, x[..., :2], None, 0, 0, False, True),
        "_vertex_sample_backward": (x, maps, x[..., :2], None, 0, 0, False, True, needs),
    }
    assert set(arguments) == set(functions())
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, given in arguments.items():
        op = getattr(torch.ops.pahm_ops, name).default
        with pytest.raises(ValueError, match="must be on a CUDA device, got cpu"):
            op.redispatch(below, *given)


@needs_library
@pytest.mark.parametrize("device", [-1, -(2**62), 2**31, 2**62])
def test_the_library_runs_on_no_device_that_is_not_there(device):
    assert not torch.ops.pahm_ops._cuda_runs(device)
