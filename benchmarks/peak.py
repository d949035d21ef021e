"""The rate of this CPU's fused multiply-adds, from peak.cpp, which is compiled at first use."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from pahm_ops import backends

ISAS = ("plain", "neon", "avx2", "avx512", "avx512_bf16", "amx")  # in the numbering of csrc/cpu/isa.h
HERE = Path(__file__).resolve().parent


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        warnings.warn(f"no ceilings of arithmetic: no C++ compiler ({compiler})", stacklevel=2)
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        torch_include = Path(torch.__file__).parent / "include"
        command = [compiler, "-O3", "-std=c++20", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast"]
        include = [f"-I{HERE.parent / 'csrc'}", f"-I{HERE}", f"-isystem{torch_include}", "-Wno-psabi"]
        subprocess.run([*command, *include, HERE / "peak.cpp", "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.peak.restype = ctypes.c_int64
    loaded.peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    return loaded


def multiply(rounds: int, bfloat16: bool) -> int:
    """Multiplies and adds on as many threads as torch has; returns the number of operations.

    Computes in float32, or in bfloat16 if asked for and if the kernels' instruction set multiplies that.
    Returns 0 without compiled kernels or without a compiler.
    """
    isa = backends()["spiral_conv"]["cpu"]
    library = _library() if isa in ISAS else None
    if library is None:
        return 0
    return int(library.peak(ISAS.index(isa), torch.get_num_threads(), rounds, bfloat16))
