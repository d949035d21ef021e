"""Launches kernels in a configuration that is tuned at first use, or in their default one."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pahm_ops.triton._common import interpreted

_LOCK = threading.Lock()


class Kernel:
    """A Triton kernel (`function`, as `triton.jit` made it) and the configurations found for it.

    On a GPU the candidates are timed at the first use of a class of shapes; Triton keeps the results in its
    cache on disk. The first candidate is the default. It is used if nothing may be timed: in the interpreter,
    while a CUDA graph is captured, with the environment variable PAHM_TRITON_TUNE=0, and under
    `torch.use_deterministic_algorithms`, because another configuration may sum in another order.
    """

    def __init__(self, function: Any, key: Sequence[str]) -> None:
        """`key` names the arguments that, with the tensors' dtypes, define a class of shapes."""
        self.function = function
        self._key = list(key)
        self._best: dict[tuple[Any, ...], triton.Config] = {}

    def launch(
        self,
        grid: Sequence[tuple[int, str | None]],
        candidates: Sequence[triton.Config],
        **arguments: Any,
    ) -> None:
        """Run on the device of the first tensor, one program for each tile of `grid`.

        `grid` has sizes, each with the name of the block that divides it, or None if each index is a tile.
        """

        def programs(chosen: Mapping[str, Any]) -> tuple[int]:
            count = math.prod(
                size if name is None else triton.cdiv(size, chosen[name]) for size, name in grid
            )
            if count >= 2**31:
                raise ValueError(f"a grid of {count} programs: at most {2**31 - 1} are possible")
            return (count,)

        tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
        key = (tensors[0].device, *(t.dtype for t in tensors), *(arguments[name] for name in self._key))
        wanted = _tuning_wanted()
        if torch.version.cuda is None:
            candidates = [triton.Config(c.kwargs, c.num_warps, c.num_stages) for c in candidates]
        with _on_device_of(tensors[0]):
            if wanted and key not in self._best and not _capturing(tensors[0]):
                with _LOCK:  # One at a time: concurrent timings disturb each other.
                    if key not in self._best:
                        tuned = triton.autotune(list(candidates), self._key, cache_results=True)(
                            self.function
                        )
                        tuned[programs](**arguments)
                        self._best[key] = tuned.best_config
                        return
            chosen = self._best.get(key, candidates[0]) if wanted else candidates[0]
            self.function[programs](**arguments, **chosen.all_kwargs())


def config(warps: int, stages: int, **blocks: int) -> triton.Config:
    """A configuration. Without the limit of 255 registers NVIDIA's assembler picks a lower one and spills."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages, maxnreg=255)


def deduplicated(candidates: Sequence[triton.Config]) -> tuple[triton.Config, ...]:
    """The candidates without duplicates, which occur for small tensors."""
    return tuple({str(candidate): candidate for candidate in candidates}.values())


def _tuning_wanted() -> bool:
    if interpreted() or os.environ.get("PAHM_TRITON_TUNE") == "0":
        return False
    return not torch.are_deterministic_algorithms_enabled()


def _capturing(tensor: Tensor) -> bool:
    """Whether a graph is being captured; nothing can be timed then."""
    asked = getattr(torch.get_device_module(tensor.device), "is_current_stream_capturing", None)
    return asked is not None and asked()


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.accelerator.device_index(tensor.device.index)
