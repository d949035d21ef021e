"""Builds the kernels of tests/simt and calls them on tensors."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from repository import ROOT
from torch import Tensor

SIMT = ROOT / "tests" / "simt"
FLAGS = (
    "-O1",
    "-std=c++20",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    f"-I{ROOT / 'csrc'}",
    f"-I{SIMT}",
)
SANITIZE = (
    "-O0",
    "-g1",  # lines for a report, and no variables
    "-DSIMT_FLOAT32_ONLY",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
#: as tests/simt/run.h numbers them
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
#: orders of threads
SEEDS = range(20)

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")

Value = (
    bool
    | int
    | float
    | Tensor
    | torch.dtype
    | None
    | Sequence[int]
    | Sequence[float]
    | Sequence[Tensor | None]
)


class Counts(ctypes.Structure):
    """simt::Counts of tests/simt/requests.h, which says what they are."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("loaded_bytes", "stored_bytes", "atomics", "requests", "sectors", "ideal_sectors"),
            *("dram_bytes", "l2_bytes"),
            *("shared_requests", "shared_atomics", "bank_conflicts"),
            *("launches", "blocks", "shared_bytes", "threads"),
        )
    ]


class Argument(ctypes.Structure):
    """simt::Argument of tests/simt/cases.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("item_bytes", ctypes.c_int32),
        ("integer", ctypes.c_int64),
        ("real", ctypes.c_double),
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_int64),
    ]


INTEGER, REAL, TENSOR, TENSORS, INTEGERS, REALS = range(6)


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="simt"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def build(name: str, *flags: str) -> Path:
    """Compiles sources of tests/simt; once a session."""
    sources = [str(SIMT / source) for source in name.split()]
    result = folder() / f"{len(list(folder().iterdir()))}"
    done = subprocess.run(
        ["g++", *FLAGS, *flags, *sources, "-o", str(result)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return result


@functools.cache
def library(source: str, *flags: str) -> ctypes.CDLL:
    # Else libraries would share one machine.
    apart = "-fno-gnu-unique"
    result = ctypes.CDLL(str(build(source, "-shared", "-fPIC", apart, *flags)))
    result.simt_call.restype = ctypes.c_char_p
    result.simt_call.argtypes = [
        *(ctypes.c_char_p, ctypes.POINTER(Argument), ctypes.c_int64),
        *(ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(Counts)),
    ]
    return result


def kind_of(value: Value) -> int:
    if value is None or isinstance(value, Tensor):
        return TENSOR
    if isinstance(value, bool | int | torch.dtype):
        return INTEGER
    if isinstance(value, float):
        return REAL
    if any(v is None or isinstance(v, Tensor) for v in value):
        return TENSORS
    return REALS if any(isinstance(v, float) for v in value) else INTEGERS


def tensors_of(values: Sequence[Value]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            assert value.is_contiguous() and value.device.type == "cpu"
            found.append(value)
        elif kind_of(value) == TENSORS:
            found += tensors_of(value)
    return found


def as_arguments(values: Sequence[Value], keep: list[object]) -> ctypes.Array[Argument]:
    """What simt_call takes; what it points at is kept in `keep`."""
    result = (Argument * len(values))()
    keep.append(result)
    for argument, value in zip(result, values, strict=True):
        argument.kind = kind_of(value)
        if isinstance(value, Tensor):
            argument.item_bytes, argument.data = value.element_size(), value.data_ptr()
            argument.length = value.nbytes
        elif argument.kind == INTEGER:
            argument.integer = DTYPES.get(value, value)
        elif argument.kind == REAL:
            argument.real = value
        elif value is not None:
            types = {INTEGERS: ctypes.c_int64, REALS: ctypes.c_double}
            element = types.get(argument.kind)
            items = (element * len(value))(*value) if element else as_arguments(value, keep)
            keep.append(items)
            argument.data, argument.length = ctypes.addressof(items), len(value)
    return result


def as_bytes(values: Sequence[Value]) -> bytes:
    """The same for tests/simt/main.cpp."""
    parts = [struct.pack("q", len(values))]
    for value in values:
        kind = kind_of(value)
        parts.append(struct.pack("q", kind))
        if isinstance(value, Tensor):
            # The address matters as far as vector loads go.
            parts.append(struct.pack("qqq", value.element_size(), value.data_ptr() % 64, value.nbytes))
            parts.append(bytes(value.view(-1).view(torch.uint8).numpy()))
        elif value is None:
            parts.append(struct.pack("qqq", 0, 0, 0))
        elif kind == INTEGER:
            parts.append(struct.pack("q", DTYPES.get(value, value)))
        elif kind == REAL:
            parts.append(struct.pack("d", value))
        elif kind == TENSORS:
            parts.append(as_bytes(value))
        else:
            parts.append(struct.pack(f"q{len(value)}{'q' if kind == INTEGERS else 'd'}", len(value), *value))
    return b"".join(parts)


class Kernels:
    """The cases of a file of tests/simt (PAHM_CASE); it is compiled when first needed."""

    def __init__(self, source: str, *flags: str) -> None:
        self.source, self.flags = source, flags

    def call(
        self, name: str, *values: Value, seed: int = 0, races: bool = True, sanitize: bool = False
    ) -> Counts:
        """Calls a case and gives what it counted.

        `values`: tensors (contiguous, on the CPU), which kernels may touch within their bounds; None for a
        null pointer; dtypes, which become their number; integers; floats; lists of tensors, integers, floats.
        `races`: whether races for global memory are errors. `sanitize`: in a process of its own, with the
        address and undefined-behaviour sanitizers. RuntimeError says what the machine, the launch or a
        sanitizer complains of.
        """
        run = self._run_apart if sanitize else self._run
        complaint, counts = run(name, values, seed, races)
        if complaint:
            raise RuntimeError(complaint)
        return counts

    def _run(self, name: str, values: Sequence[Value], seed: int, races: bool) -> tuple[str, Counts]:
        counts, keep = Counts(), []
        tensors_of(values)
        arguments = as_arguments(values, keep)
        found = library(self.source, *self.flags).simt_call(
            name.encode(), arguments, len(values), seed, races, ctypes.byref(counts)
        )
        return (found or b"").decode(), counts

    def _run_apart(self, name: str, values: Sequence[Value], seed: int, races: bool) -> tuple[str, Counts]:
        program = build(f"{self.source} main.cpp", *SANITIZE, *self.flags)
        case, result = program.with_suffix(".case"), program.with_suffix(".result")
        tensors, text = tensors_of(values), name.encode()
        head = struct.pack("q", len(text)) + text + struct.pack("Qq", seed, races)
        case.write_bytes(head + as_bytes(values))
        done = subprocess.run(
            [program, case, result],
            capture_output=True,
            text=True,
            env={
                "ASAN_OPTIONS": "detect_leaks=0",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
        )
        if done.returncode != 0:
            return done.stderr, Counts()
        data = result.read_bytes()
        (length,) = struct.unpack_from("q", data)
        complaint, at = data[8 : 8 + length].decode(), 8 + length
        counts = Counts.from_buffer_copy(data, at)
        at += ctypes.sizeof(Counts)
        for tensor in tensors:
            tensor.view(-1).view(torch.uint8).copy_(
                torch.frombuffer(bytearray(data[at : at + tensor.nbytes]), dtype=torch.uint8)
                if tensor.nbytes
                else torch.empty(0, dtype=torch.uint8)
            )
            at += tensor.nbytes
        assert at == len(data)
        return complaint, counts
