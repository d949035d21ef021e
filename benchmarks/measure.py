"""What a benchmark records besides time: the machine's ceilings and the memory of a call."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peak import multiply

FLOAT = 4


@dataclass(frozen=True)
class Work:
    """The least work of an op: floating-point operations, and bytes read and written once each."""

    operations: int
    bytes: int
    bfloat16: bool = False
    """Whether the operations may be the CPU's bfloat16 operations."""


class Ceilings:
    """The current rates of this machine: of fused multiply-adds on torch's threads, and of a copy.

    The copy is a `clone()` that moves as many bytes as the op must, to equally fresh memory, and as many
    times in a row.
    """

    def __init__(self, work: Work, timer: Callable[[], float], calls: int) -> None:
        self.timer = timer
        self.calls = calls
        self.source = torch.ones(max(1, work.bytes // 2 // FLOAT))
        self.moved = 2 * self.source.numel() * FLOAT
        self.rounds = 1 << 19
        self.bfloat16 = work.bfloat16
        self.operations_per_second: list[float] = []
        self.bytes_per_second: list[float] = []

    def sample_arithmetic(self) -> None:
        multiply(1, self.bfloat16)  # the first call compiles it
        start = self.timer()
        if operations := multiply(self.rounds, self.bfloat16):
            self.operations_per_second.append(operations / (self.timer() - start))

    def sample_copy(self) -> None:
        start = self.timer()
        for _ in range(self.calls):
            self.source.clone()
        self.bytes_per_second.append(self.calls * self.moved / (self.timer() - start))

    def record(self, work: Work) -> dict[str, float | bool]:
        """The best rates so far, and the least time for `work` that the slower of the two allows."""
        operations = max(self.operations_per_second, default=0.0)
        copied = max(self.bytes_per_second)
        arithmetic = work.operations / operations if operations else 0.0
        return {
            "bfloat16": work.bfloat16,
            "operations": work.operations,
            "bytes": work.bytes,
            "operations_per_second": operations,
            "bytes_per_second": copied,
            "least_seconds": max(arithmetic, work.bytes / copied),
        }


def peak_bytes(function: Callable[[], object]) -> int | None:
    """How much more memory the process holds at the peak of a call than before it; None except on Linux.

    Uses Linux's high-water mark, so it counts our kernels' scratch memory as well as tensors.
    """
    if sys.platform != "linux":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")
