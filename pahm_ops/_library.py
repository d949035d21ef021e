"""Finds and loads the compiled libraries."""

from __future__ import annotations

import importlib.machinery
import warnings
from pathlib import Path

import torch


def _find(name: str) -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    return None


#: A sentence for each part of this package that is unavailable, with the reason.
NOTES: list[str] = []


def _loads(path: Path, otherwise: str) -> bool:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        NOTES.append(f"{path} cannot be loaded ({error.__cause__ or error}): {otherwise}")
        warnings.warn(NOTES[-1], stacklevel=2)
        return False
    return True


def _load() -> bool:
    path = _find("_ops")
    if path is None:
        NOTES.append(f"no compiled kernels in {Path(__file__).parent}: the CPU runs plain PyTorch")
        warnings.warn(NOTES[-1], stacklevel=2)
        return False
    return _loads(path, "the CPU runs plain PyTorch; install pahm again on this machine")


def _load_cuda() -> bool:
    # The library's stream calls need a part of torch that builds for the CPU or for AMD lack.
    path = _find("_cuda")
    if not LOADED or path is None or torch.version.cuda is None:
        return False
    return _loads(path, "GPUs are served by Triton; the CPU's kernels are not affected")


#: True if the compiled op library was found and loaded.
LOADED = _load()
#: True if the compiled CUDA library was loaded too. It may still lack code for a given device.
CUDA_LOADED = _load_cuda()
