"""Which implementation runs an op, by device, dtype and size, and how to force one."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pahm_ops import _library
from pahm_ops import _torch_internals as internals

#: The functions that make up each op.
FUNCTIONS = {
    "vertex_sample": ("vertex_sample", "_vertex_sample_backward"),
    "spiral_conv": ("spiral_conv", "_spiral_conv_input_grad", "_spiral_conv_weight_grad"),
    "mesh_pool": ("mesh_pool",),
}
_OP_OF = {name: op for op, names in FUNCTIONS.items() for name in names}
_ISAS = ("plain", "neon", "avx2", "avx512", "avx512_bf16", "amx")

#: The device types with GPU kernels. "cuda" includes AMD, which has only Triton's.
GPUS = ("cuda", "xpu")
#: spiral_conv with fewer output channels would leave most of a tensor core's tile empty.
TILE_CHANNELS = 16
#: A GPU takes the first of these paths that the machine has: "cuda" is csrc/cuda, "triton" is
#: pahm_ops/triton, "reference" is plain PyTorch. The environment variable PAHM_GPU_PATH forces one.
PATHS: dict[str, dict[str, tuple[str, ...]]] = {
    "vertex_sample": {"any": ("cuda", "triton", "reference")},
    "mesh_pool": {"any": ("cuda", "triton", "reference")},
    "spiral_conv": {
        "float64": ("cuda", "triton", "reference"),
        "float32": ("cuda", "triton", "reference"),
        "float32, TF32 allowed": ("triton", "cuda", "reference"),
        "float16": ("triton", "cuda", "reference"),
        "bfloat16": ("triton", "cuda", "reference"),
        f"fewer than {TILE_CHANNELS} output channels": ("cuda", "triton", "reference"),
    },
}

# ---- from a function of an op to its implementation ----

#: The compiled ops, by function: the CPU's kernels and, if built, CUDA's.
_COMPILED: dict[str, Any] = {
    name: getattr(torch.ops.pahm_ops, name).default for name in _OP_OF if _library.LOADED
}
_ADDED: dict[str, Callable[[str], None]] = {}
_TRITON = torch.library.Library("pahm_ops", "FRAGMENT")


def kernel(name: str, tensor: Tensor, columns: int = TILE_CHANNELS) -> Any:
    """The overload that computes the op function `name` (see `FUNCTIONS`) for a tensor on a `served` device.

    columns: the channels of the result; the path of spiral_conv depends on them. Raises as `choose` does.
    """
    if tensor.is_cpu or tensor.is_meta:
        return _COMPILED[name]
    return _gpu_kernel(name, tensor.dtype, tensor.device, columns)


@internals.constant_of_a_graph
def _gpu_kernel(name: str, dtype: torch.dtype, device: torch.device, columns: int) -> Any:
    op = _OP_OF[name]
    path = choose(op, dtype, device, columns)
    if path == "cuda":
        return _COMPILED[name]
    if path == "reference":
        raise NotImplementedError(f"no kernel of pahm_ops.{op} serves {device}")
    # Import Triton only if it is used.
    if op == "spiral_conv":
        from pahm_ops.triton.spiral_conv import OPS
    elif op == "mesh_pool":
        from pahm_ops.triton.mesh_pool import OPS
    else:
        from pahm_ops.triton.vertex_sample import OPS
    return OPS[name]


def add_to_op(name: str, add: Callable[[str], None]) -> None:
    """Registers Python code for a function's compiled and Triton ops: calls `add` with each op's name."""
    _ADDED[name] = add
    if _library.LOADED:
        add(name)


def define_triton(functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Makes an op of each function of pahm_ops/triton, so that graphs can hold it; returns the overloads."""
    made = {}
    for name, function in functions.items():
        own = f"_triton_{name.lstrip('_')}"
        _TRITON.define(own + torch.library.infer_schema(function, mutates_args=()))
        for kind in GPUS:
            _TRITON.impl(own, function, kind.upper())
        _ADDED[name](own)
        made[name] = getattr(torch.ops.pahm_ops, own).default
    return made


# ---- choosing ----


def tf32_allowed() -> bool:
    """Whether PyTorch's own float32 matrix products may use TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"


def _row(op: str, dtype: torch.dtype, columns: int) -> str:
    if op != "spiral_conv":
        return "any"
    if columns < TILE_CHANNELS:
        return f"fewer than {TILE_CHANNELS} output channels"
    name = str(dtype).removeprefix("torch.")
    return "float32, TF32 allowed" if dtype == torch.float32 and tf32_allowed() else name


_RUNS: dict[int, bool] = {}


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _cuda_runs(device: torch.device) -> bool:
    """Whether the compiled CUDA library runs on a device. Asks the driver once."""
    if not _library.CUDA_LOADED or device.type != "cuda" or not torch.cuda.is_available():
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _RUNS:
        runs = bool(torch.ops.pahm_ops._cuda_runs(index))
        if not runs and capturing(device):  # A capture may forbid this query.
            return False
        _RUNS[index] = runs
    return _RUNS[index]


@functools.cache
def _triton_compiles(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    # Triton does not support GPUs before Volta.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0)


def available(path: str, device: torch.device) -> bool:
    """Whether a device can be served by "cuda", "triton" or "reference"."""
    if path == "cuda":
        return _cuda_runs(device)
    return path == "reference" or _triton_compiles(device)


def forced() -> str | None:
    """The path that PAHM_GPU_PATH names. Raises ValueError if it names none."""
    path = os.environ.get("PAHM_GPU_PATH") or None
    if path not in (None, "cuda", "triton", "reference"):
        raise ValueError(f"PAHM_GPU_PATH must be cuda, triton or reference, got {path!r}")
    return path


#: What `choose` found, by everything that it depends on. Every call of an op asks.
_CHOSEN: dict[tuple[Any, ...], str] = {}


def choose(op: str, dtype: torch.dtype, device: torch.device, columns: int = TILE_CHANNELS) -> str:
    """The path that runs an op on a GPU; `columns` are the output channels of spiral_conv.

    Raises ValueError if PAHM_GPU_PATH names a path that this machine lacks.
    """
    tf32 = op == "spiral_conv" and dtype == torch.float32 and tf32_allowed()
    key = op, dtype, device, columns < TILE_CHANNELS, tf32, os.environ.get("PAHM_GPU_PATH")
    path = _CHOSEN.get(key)
    if path is None:
        path = _first_of(PATHS[op][_row(op, dtype, columns)], device)
        if device.index is not None and not capturing(device):
            _CHOSEN[key] = path
    return path


def _first_of(paths: tuple[str, ...], device: torch.device) -> str:
    path = forced()
    if path is None:
        return next(path for path in paths if available(path, device))
    if not available(path, device):
        raise ValueError(f"PAHM_GPU_PATH={path}, but {_why_not(path, device)}")
    return path


def _why_not(path: str, device: torch.device) -> str:
    if path == "triton":
        return f"Triton is not installed or does not support {device}"
    if not _library.CUDA_LOADED:
        return "; ".join(["no compiled CUDA library was loaded", *_library.NOTES])
    return f"the compiled CUDA library has no code that runs on {device}"


def exporting_to_onnx() -> bool:
    """Whether an ONNX file is being written. ONNX has none of our ops, so the reference is traced."""
    if "torch.onnx" not in sys.modules or torch.compiler.is_dynamo_compiling():
        return False
    return torch.onnx.is_in_onnx_export()


def served(device: torch.device) -> bool:
    """Whether kernels of this package, not the reference, handle tensors on `device`."""
    # Every call asks this, so it makes no call that it can avoid.
    if "torch.onnx" in sys.modules and exporting_to_onnx():
        return False
    if not internals.EVERY_LEVEL and internals.transforms_active():
        return False
    if device.type == "cpu":
        return _library.LOADED
    return device.type in GPUS and _gpu_is_served(device)


@internals.constant_of_a_graph
def _gpu_is_served(device: torch.device) -> bool:
    return choose("mesh_pool", torch.float32, device) != "reference"


# ---- what every op does around its kernel ----


def widened(*tensors: Any) -> list[Any]:
    """`tensors`, with float16 on the CPU converted to float32: the CPU's kernels have no float16."""
    return [t.float() if t is not None and t.dtype == torch.float16 and t.is_cpu else t for t in tensors]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses on `device`, or None if it is off."""
    if not internals.any_autocast():
        return None
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


# ---- reporting ----


class Backends(dict[str, dict[str, Any]]):
    """The implementation of each op; prints as a table."""

    notes: tuple[str, ...] = ()
    """A sentence for each part of this package that is unavailable, with the reason."""

    def __str__(self) -> str:
        lines = [f"{'op':14} {'device':6} {'':32} served by"]
        for op, devices in self.items():
            for device, by in devices.items():
                for row, path in by.items() if isinstance(by, dict) else [("", by)]:
                    lines.append(f"{op:14} {device:6} {row:32} {path}")
        return "\n".join([*lines, *self.notes])


def backends() -> Backends:
    """The implementation of each op, by device; prints as a table.

    ``backends()["spiral_conv"]["cpu"]`` is the instruction set of the compiled kernels, chosen at run time:
    "plain", "avx2", "avx512", "avx512_bf16" or "amx" on x86-64, "neon" on aarch64 (the environment variable
    PAHM_CPU_ISA forces one). "avx512_bf16" and "amx" add bfloat16 products for spiral_conv; everything else
    is as with "avx512". "reference" means plain PyTorch.

    ``backends()["spiral_conv"]["cuda"]`` exists if torch sees a GPU. It has an entry for each dtype or size
    that is handled separately, such as ``{"float16": "triton", "float32": "cuda", ...}``: "cuda" means the
    compiled kernels, "triton" means Triton's (the environment variable PAHM_GPU_PATH forces "cuda", "triton"
    or "reference"). Raises ValueError if a variable names something that this machine lacks.

    ``backends().notes``, printed below the table, says what is unavailable here and why: a compiled library
    that is missing or cannot be loaded, or a feature that needs internals which this torch lacks.
    """
    isa = torch.ops.pahm_ops._cpu_isa() if _library.LOADED else None
    table = Backends()
    table.notes = (*_library.NOTES, *internals.notes())
    for op in FUNCTIONS:
        widest = len(_ISAS) - 1 if op == "spiral_conv" else _ISAS.index("avx512")
        table[op] = {"cpu": "reference" if isa is None else _ISAS[min(isa, widest)]}
        for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
            if module.is_available():
                device = torch.device(kind, module.current_device())
                table[op][kind] = {row: _first_of(paths, device) for row, paths in PATHS[op].items()}
    return table
