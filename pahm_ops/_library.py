"""Finds and loads what was compiled, and tells what serves each op."""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

OPS = ("vertex_sample", "spiral_conv", "mesh_pool")
_ISAS = ("plain", "neon", "avx2", "avx512", "avx512_bf16", "amx")


_IMPLEMENTATIONS = torch.library.Library("pahm_ops", "IMPL")


def _find() -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_ops{suffix}"
        if path.exists():
            return path
    return None


def _load() -> bool:
    path = _find()
    if path is None:
        folder = Path(__file__).parent
        warnings.warn(f"no compiled kernels in {folder}: the ops run as plain PyTorch", stacklevel=2)
        return False
    torch.ops.load_library(path)
    return True


#: True where the compiled op library was found and loaded.
LOADED = _load()


def compiled(device: torch.device) -> bool:
    """Whether tensors on `device` are served by compiled kernels."""
    return LOADED and device.type == "cpu" and not exporting_to_onnx()


def widened(*tensors: Any) -> list[Any]:
    """`tensors`, those of float16 as float32: the CPU kernels have no float16 of their own."""
    return [t.float() if t is not None and t.dtype == torch.float16 else t for t in tensors]


def exporting_to_onnx() -> bool:
    """Whether an ONNX file is being written, which has no op of ours: there the reference is traced."""
    if torch.compiler.is_dynamo_compiling():
        return False
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on `device`, None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Calls an op from inside its autograd function: its kernel, or the next level of `torch.func`.

    Autograd functions run their forward with both modes off, but a level below may record a graph of its own.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def derivative_is_wanted(arguments: Any) -> bool:
    """Whether what an op gives for `arguments` must be differentiable, or lift to a level of `torch.func`."""
    return (
        (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class OpFunction(_SingleLevelFunction):
    """An autograd function that is an op's Autograd kernel: `forward`, `setup_context`, `backward`, `jvp`.

    The dispatcher calls it once for each level of `torch.func.grad` and `torch.func.jvp`, as it calls
    PyTorch's own kernels, so it differentiates at that level alone and calls its op below autograd.
    `torch.autograd.Function` would walk the levels a second time, and `torch.library.register_autograd` has
    no forward mode (its tangents are silently zero).
    """

    @classmethod
    def autograd_kernel(cls, *arguments: Any) -> Any:
        if not derivative_is_wanted(arguments):
            return cls.forward(*arguments)
        with enable_single_level_autograd_function():
            return cls.apply(*arguments)  # type: ignore[attr-defined]


def register(
    name: str, fake: Callable[..., Any], autograd: Callable[..., Any], vmap: Callable[..., Any]
) -> None:
    """Gives a compiled op its fake kernel, its derivatives and its batching rule.

    `vmap` is a rule as `torch.library.register_vmap` takes it. Does nothing where nothing was compiled.
    """
    if LOADED:
        torch.library.register_fake(f"pahm_ops::{name}", fake)
        torch.library.register_vmap(f"pahm_ops::{name}", vmap)
        _IMPLEMENTATIONS.impl(name, autograd, "Autograd")


def one_by_one(op: Callable[..., Any], count: int, dims: Any, arguments: Any) -> tuple[Any, Any]:
    """The batching rule that always holds: the op for each of `count` entries, results stacked.

    `dims` has the structure of `arguments` and names each tensor's batched dimension, None where it has none.
    """
    if count == 0:
        raise ValueError("vmap over a dimension of size 0 is supported for the first argument alone")

    def entry(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)):
            return [entry(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    out = torch.stack([op(*entry(arguments, dims, i)) for i in range(count)])
    return out, 0


def merged(tensor: Tensor, dim: int, into: int = 0) -> Tensor:
    """`tensor` with its batched dimension `dim` merged into the entries' dimension `into`, outermost."""
    return tensor.movedim(dim, into).flatten(into, into + 1)


def backends() -> dict[str, dict[str, str]]:
    """What serves each op, by device: {"spiral_conv": {"cpu": "avx512", "cuda": "reference"}, ...}.

    For the CPU it is the instruction set of the compiled kernels, chosen at run time: "plain", "avx2",
    "avx512", "avx512_bf16" or "amx" on x86-64, "neon" on aarch64 (the environment variable PAHM_CPU_ISA
    forces one). The last two of x86-64 have products of bfloat16, for spiral_conv; everything else is as with
    "avx512". "reference" means plain PyTorch. "cuda" is listed where torch sees a CUDA device. Raises
    ValueError if PAHM_CPU_ISA names a set that this CPU lacks.
    """
    isa = torch.ops.pahm_ops.cpu_isa() if LOADED else None
    served = {}
    for op in OPS:
        widest = len(_ISAS) - 1 if op == "spiral_conv" else _ISAS.index("avx512")
        served[op] = {"cpu": "reference" if isa is None else _ISAS[min(isa, widest)]}
        if torch.cuda.is_available():
            served[op]["cuda"] = "reference"
    return served
