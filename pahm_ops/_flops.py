"""Formulas that torch.utils.flop_counter uses for the ops: a multiply-add counts as two operations."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from pahm_ops import _library

_COUNTER = "torch.utils.flop_counter"
_CORNERS = 4  # pixels that each sample reads
Shape = Sequence[int]


def _spiral_conv(
    x: Shape, table: Shape, t_pointers: Shape, t_rows: Shape, weight: Shape, *rest: Any, **named: Any
) -> int:
    return 2 * x[0] * table[1] * weight[0] * weight[1]


def _spiral_conv_weight_grad(grad: Shape, x: Shape, table: Shape, *rest: Any, **named: Any) -> int:
    return 2 * grad[0] * table[1] * grad[2] * table[0] * x[2]


def _mesh_pool(x: Shape, row_pointers: Shape, columns: Shape, *rest: Any, **named: Any) -> int:
    return 2 * x[0] * columns[0] * x[2]


def _vertex_sample(features: Sequence[Shape], vertices: Shape, *rest: Any, **named: Any) -> int:
    return 2 * _CORNERS * vertices[0] * vertices[1] * sum(shape[1] for shape in features)


def _vertex_sample_backward(
    grad: Shape, features: Sequence[Shape], vertices: Shape, *rest: Any, **named: Any
) -> int:
    *to_maps, to_vertices, to_camera = rest[5]
    channels = [shape[1] for shape in features]
    counted = sum(count for count, wanted in zip(channels, to_maps, strict=True) if wanted)
    if to_vertices or to_camera:
        counted += sum(channels)
    return 2 * _CORNERS * vertices[0] * vertices[1] * counted


_FORMULAS = {
    "spiral_conv": _spiral_conv,
    "_spiral_conv_input_grad": _spiral_conv,  # the same product, with the gradient in place of x
    "_spiral_conv_weight_grad": _spiral_conv_weight_grad,
    "mesh_pool": _mesh_pool,
    "vertex_sample": _vertex_sample,
    "_vertex_sample_backward": _vertex_sample_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        if _library.LOADED:
            counter.register_flop_formula(getattr(torch.ops.pahm_ops, name))(formula)


class _Finder:
    """Registers the formulas when the counter is imported. Importing it here would import Triton."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Finder())
