"""What a benchmark records beside time: the machine's ceilings and the memory that a call takes."""

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
    """What an op cannot do without: floating-point operations, and bytes read and written once each."""

    operations: int
    bytes: int
    bfloat16: bool = False
    """Whether the operations may be those that the CPU has for bfloat16."""


class Ceilings:
    """The rates of this machine at this moment: of fused multiply-adds on torch's threads, and of a copy.

    The copy is a `clone()` that moves as many bytes as the op must, to memory as fresh as the op's own, and
    as many times in a row.
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
        multiply(1, self.bfloat16)  # compiles it at the first call
        start = self.timer()
        if operations := multiply(self.rounds, self.bfloat16):
            self.operations_per_second.append(operations / (self.timer() - start))

    def sample_copy(self) -> None:
        start = self.timer()
        for _ in range(self.calls):
            self.source.clone()
        self.bytes_per_second.append(self.calls * self.moved / (self.timer() - start))

    def record(self, work: Work) -> dict[str, float | bool]:
        """The best rates seen, and the time that the slower of the two allows for `work`."""
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
    """How much more memory the process holds at the worst moment of a call than before it; None off Linux.

    Read off the kernel's high-water mark, so that it counts kernels' scratch memory as well as tensors.
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
