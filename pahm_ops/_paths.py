"""Which implementation serves an op, by device, dtype and size."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch

from pahm_ops import _library
from pahm_ops import _torch_internals as internals

OPS = ("vertex_sample", "spiral_conv", "mesh_pool")
_ISAS = ("plain", "neon", "avx2", "avx512", "avx512_bf16", "amx")

#: The kinds of device that GPU kernels serve. "cuda" is also AMD's, with Triton alone.
GPUS = ("cuda", "xpu")
#: Results of spiral_conv with fewer channels would leave most of a tensor core's tile empty.
THIN = 16
#: On a GPU the first of these that the machine has: "cuda", csrc/cuda; "triton", pahm_ops/triton;
#: "reference", plain PyTorch. The environment variable PAHM_GPU_PATH forces one.
PATHS: dict[str, dict[str, tuple[str, ...]]] = {
    "vertex_sample": {"any": ("cuda", "triton", "reference")},
    "mesh_pool": {"any": ("cuda", "triton", "reference")},
    "spiral_conv": {
        "float64": ("cuda", "triton", "reference"),
        "float32": ("cuda", "triton", "reference"),
        "float32, TF32 allowed": ("triton", "cuda", "reference"),
        "float16": ("triton", "cuda", "reference"),
        "bfloat16": ("triton", "cuda", "reference"),
        f"fewer than {THIN} output channels": ("cuda", "triton", "reference"),
    },
}


def tf32_allowed() -> bool:
    """Whether PyTorch's own float32 products may use TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


def _row(op: str, dtype: torch.dtype, columns: int) -> str:
    if op != "spiral_conv":
        return "any"
    if columns < THIN:
        return f"fewer than {THIN} output channels"
    name = str(dtype).removeprefix("torch.")
    return "float32, TF32 allowed" if dtype == torch.float32 and tf32_allowed() else name


_RUNS: dict[int, bool] = {}


def _cuda_runs(device: torch.device) -> bool:
    """Whether the compiled CUDA library runs on a device. The driver is asked once."""
    if not _library.CUDA_LOADED or device.type != "cuda" or not torch.cuda.is_available():
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _RUNS:
        runs = bool(torch.ops.pahm_ops.cuda_runs(index))
        if not runs and _library.capturing(device):  # A capture may forbid what the driver is asked for.
            return False
        _RUNS[index] = runs
    return _RUNS[index]


@functools.cache
def _triton_compiles(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    # Those before Volta are unknown to Triton.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0)


def _has(path: str, device: torch.device) -> bool:
    if path == "cuda":
        return _cuda_runs(device)
    return path == "reference" or _triton_compiles(device)


def forced() -> str | None:
    """The path that PAHM_GPU_PATH names. Raises ValueError where it names none."""
    path = os.environ.get("PAHM_GPU_PATH") or None
    if path not in (None, "cuda", "triton", "reference"):
        raise ValueError(f"PAHM_GPU_PATH must be cuda, triton or reference, got {path!r}")
    return path


def choose(op: str, dtype: torch.dtype, device: torch.device, columns: int = THIN) -> str:
    """The path that serves an op on a GPU; `columns` are the output channels of spiral_conv.

    Raises ValueError if PAHM_GPU_PATH names a path that this machine lacks.
    """
    return _first_of(PATHS[op][_row(op, dtype, columns)], device)


def _first_of(paths: tuple[str, ...], device: torch.device) -> str:
    path = forced()
    if path is None:
        return next(path for path in paths if _has(path, device))
    if not _has(path, device):
        raise ValueError(f"PAHM_GPU_PATH={path}, but {_why_not(path, device)}")
    return path


def _why_not(path: str, device: torch.device) -> str:
    if path == "triton":
        return f"Triton is not installed or does not support {device}"
    if not _library.CUDA_LOADED:
        return "; ".join(["no compiled CUDA library was loaded", *_library.NOTES])
    return f"the compiled CUDA library has no code that runs on {device}"


def served(device: torch.device) -> bool:
    """Whether tensors on `device` are served by kernels of this package, not by the reference."""
    if _library.exporting_to_onnx() or (not internals.EVERY_LEVEL and internals.transforms_active()):
        return False
    if device.type == "cpu":
        return _library.LOADED
    return device.type in GPUS and _gpu_is_served(device)


@internals.constant_of_a_graph
def _gpu_is_served(device: torch.device) -> bool:
    return choose("mesh_pool", torch.float32, device) != "reference"


class Backends(dict[str, dict[str, Any]]):
    """What serves each op; prints as a table."""

    notes: tuple[str, ...] = ()
    """Why something that this package could have does not serve, a sentence each."""

    def __str__(self) -> str:
        lines = [f"{'op':14} {'device':6} {'':32} served by"]
        for op, devices in self.items():
            for device, by in devices.items():
                for row, path in by.items() if isinstance(by, dict) else [("", by)]:
                    lines.append(f"{op:14} {device:6} {row:32} {path}")
        return "\n".join([*lines, *self.notes])


def backends() -> Backends:
    """What serves each op, by device; prints as a table.

    ``backends()["spiral_conv"]["cpu"]`` is the instruction set of the compiled kernels, chosen at run time:
    "plain", "avx2", "avx512", "avx512_bf16" or "amx" on x86-64, "neon" on aarch64 (the environment variable
    PAHM_CPU_ISA forces one). The last two of x86-64 have products of bfloat16, for spiral_conv; everything
    else is as with "avx512". "reference" means plain PyTorch.

    ``backends()["spiral_conv"]["cuda"]`` is there where torch sees a GPU, and has an entry for each dtype or
    size that is served apart, such as ``{"float16": "triton", "float32": "cuda", ...}``: "cuda" are the
    compiled kernels, "triton" Triton's (the environment variable PAHM_GPU_PATH forces "cuda", "triton" or
    "reference"). Raises ValueError if a variable names what this machine lacks.

    ``backends().notes``, printed below the table, says what does not serve here and why: a compiled library
    that is missing or cannot be loaded, or a feature whose internals this torch lacks.
    """
    isa = torch.ops.pahm_ops.cpu_isa() if _library.LOADED else None
    table = Backends()
    table.notes = (*_library.NOTES, *internals.notes())
    for op in OPS:
        widest = len(_ISAS) - 1 if op == "spiral_conv" else _ISAS.index("avx512")
        table[op] = {"cpu": "reference" if isa is None else _ISAS[min(isa, widest)]}
        for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            if module.is_available():
                device = torch.device(kind, module.current_device())
                table[op][kind] = {row: _first_of(paths, device) for row, paths in PATHS[op].items()}
    return table
