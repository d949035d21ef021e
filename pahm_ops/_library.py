"""Finds and loads what was compiled, and tells what serves each op."""

from __future__ import annotations

import importlib.machinery
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OPS = ("vertex_sample", "spiral_conv", "mesh_pool")
_ISAS = ("plain", "avx2", "avx512")


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
    return LOADED and device.type == "cpu"


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Calls an op's kernel from inside its autograd function."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def register(name: str, fake: Callable[..., Any], function: type[torch.autograd.Function]) -> None:
    """Gives a compiled op its fake kernel and its derivatives; does nothing where nothing was compiled.

    The function goes to the dispatcher's Autograd key itself: `torch.library.register_autograd` would have no
    forward mode (its tangents are silently zero).
    """
    if LOADED:
        torch.library.register_fake(f"pahm_ops::{name}", fake)
        _IMPLEMENTATIONS.impl(name, function.apply, "Autograd")


def backends() -> dict[str, dict[str, str]]:
    """What serves each op, by device: {"spiral_conv": {"cpu": "avx512", "cuda": "reference"}, ...}.

    For the CPU "avx512", "avx2" or "plain" is the instruction set of the compiled kernels, chosen at run time
    (the environment variable PAHM_CPU_ISA forces one); "reference" means plain PyTorch. "cuda" is listed
    where torch sees a CUDA device. Raises ValueError if PAHM_CPU_ISA names a set that this CPU lacks.
    """
    cpu = _ISAS[torch.ops.pahm_ops.cpu_isa()] if LOADED else "reference"
    devices = {"cpu": cpu}
    if torch.cuda.is_available():
        devices["cuda"] = "reference"
    return {op: dict(devices) for op in OPS}
