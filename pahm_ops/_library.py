"""Finds and loads what was compiled, and registers what Python adds to an op."""

from __future__ import annotations

import importlib.machinery
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pahm_ops import _torch_internals as internals

_DEFINITIONS = torch.library.Library("pahm_ops", "FRAGMENT")
_IMPLEMENTATIONS = torch.library.Library("pahm_ops", "IMPL")


# csrc/ops.cpp has the same; these are for a machine where it was not compiled, but Triton serves a GPU.
SCHEMAS = (
    "vertex_sample(Tensor[] features, Tensor vertices, Tensor? camera, int height, int width, "
    "bool align_corners, bool border) -> Tensor",
    "vertex_sample_backward(Tensor grad, Tensor[] features, Tensor vertices, Tensor? camera, int height, "
    "int width, bool align_corners, bool border, bool[] needs) -> (Tensor[], Tensor, Tensor)",
    "spiral_conv(Tensor x, Tensor indices, Tensor weight, Tensor? bias, int activation=0) -> Tensor",
    "spiral_conv_input_grad(Tensor grad, Tensor indices, Tensor weight, SymInt vertices) -> Tensor",
    "spiral_conv_weight_grad(Tensor grad, Tensor x, Tensor indices) -> Tensor",
    "mesh_pool(Tensor x, Tensor row_pointers, Tensor columns, Tensor values, Tensor t_row_pointers, "
    "Tensor t_columns, Tensor t_values) -> Tensor",
)


def _find(name: str) -> Path | None:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists():
            return path
    return None


#: Why something that this package could have does not serve, a sentence each.
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
    if path is not None and _loads(path, "the CPU runs plain PyTorch; install pahm again on this machine"):
        return True
    if path is None:
        NOTES.append(f"no compiled kernels in {Path(__file__).parent}: the CPU runs plain PyTorch")
        warnings.warn(NOTES[-1], stacklevel=2)
    for schema in SCHEMAS:
        _DEFINITIONS.define(schema)
    return False


def _load_cuda() -> bool:
    # Its stream calls need the part of torch that a build for the CPU or for AMD lacks.
    path = _find("_cuda")
    if not LOADED or path is None or torch.version.cuda is None:
        return False
    return _loads(path, "GPUs are served by Triton; the CPU's kernels are not affected")


#: True where the compiled op library was found and loaded.
LOADED = _load()
#: True where the compiled CUDA library was as well. Whether it has code for a device is another question.
CUDA_LOADED = _load_cuda()


def widened(*tensors: Any) -> list[Any]:
    """`tensors`, those of float16 on the CPU as float32: its kernels have no float16 of their own."""
    return [t.float() if t is not None and t.dtype == torch.float16 and t.is_cpu else t for t in tensors]


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


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Calls an op from inside its autograd function: its kernel, or the next level of `torch.func`.

    Autograd functions run their forward with both modes off, but a level below may record a graph of its own.
    """
    if not internals.functorch_active():
        with internals.below_autograd():
            return op(*arguments)
    with torch.enable_grad(), internals.set_forward_mode(True), internals.below_autograd():
        return op(*arguments)


def derivative_is_wanted(arguments: Any) -> bool:
    """Whether what an op gives for `arguments` must be differentiable, or lift to a level of `torch.func`."""
    return (
        (torch.is_grad_enabled() and internals.any_requires_grad(arguments))
        or internals.dual_level_open()
        or internals.functorch_active()
    )


class OpFunction(internals.SingleLevelFunction or torch.autograd.Function):  # type: ignore[misc]
    """An autograd function that is an op's Autograd kernel: `forward`, `setup_context`, `backward`, `jvp`.

    The dispatcher calls it once for each level of `torch.func.grad` and `torch.func.jvp`, as it calls
    PyTorch's own kernels, so it differentiates at that level alone and calls its op below autograd.
    `torch.autograd.Function` would walk the levels a second time, and `torch.library.register_autograd` has
    no forward mode (its tangents are silently zero): it takes `setup_context` and `backward` only where torch
    lacks what the former needs (`_torch_internals.EVERY_LEVEL`).
    """

    @staticmethod
    def flat(*arguments: Any) -> tuple[Any, ...]:
        """An op's arguments as the function takes them: no tensor within a list."""
        return arguments

    @staticmethod
    def nested(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `backward` gives, an entry an argument of the op: `flat` undone."""
        return gradients

    @staticmethod
    def results(outputs: Any) -> Any:
        """What `forward` gives, as the op's schema has it."""
        return outputs

    @classmethod
    def autograd_kernel(cls, *arguments: Any) -> Any:
        given = cls.flat(*arguments)
        if not derivative_is_wanted(given):
            return cls.results(cls.forward(*given))
        with internals.single_level_allowed():
            return cls.results(cls.apply(*given))

    @classmethod
    def register_gradient(cls, name: str) -> None:
        """The documented way, for gradients alone."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            cls.setup_context(ctx, cls.flat(*inputs), output)

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            ctx.needs_input_grad = cls.flat(*ctx.needs_input_grad)
            each = [g for grad in grads for g in (grad if isinstance(grad, (list, tuple)) else [grad])]
            return cls.nested(cls.backward(ctx, *each))

        torch.library.register_autograd(f"pahm_ops::{name}", backward, setup_context=setup_context)


def register(
    name: str, fake: Callable[..., Any], function: type[OpFunction], vmap: Callable[..., Any]
) -> None:
    """Gives a compiled op its fake kernel, its derivatives and its batching rule.

    `vmap` is a rule as `torch.library.register_vmap` takes it.
    """
    torch.library.register_fake(f"pahm_ops::{name}", fake)
    torch.library.register_vmap(f"pahm_ops::{name}", vmap)
    if internals.EVERY_LEVEL:
        _IMPLEMENTATIONS.impl(name, function.autograd_kernel, "Autograd")
    else:
        function.register_gradient(name)


def register_gpu(name: str, function: Callable[..., Any], keys: list[str]) -> None:
    """Gives an op its kernel for the dispatch keys of GPUs."""
    for key in keys:
        _IMPLEMENTATIONS.impl(name, function, key)


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
