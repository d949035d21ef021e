"""Every undocumented name of torch that this package uses, and what happens if it is missing.

A missing name disables only the feature that needs it. `LACKING` records that, and `pahm_ops.backends()`
prints it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])

#: The names that this torch lacks, each with the consequence.
LACKING: dict[str, str] = {}


def _take(module: str, name: str, otherwise: str) -> Any:
    """`name` from a module of torch, or None if it is missing; `otherwise` says what happens without it."""
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        LACKING[f"{module}.{name}"] = otherwise
        return None


def notes() -> list[str]:
    """One sentence for each consequence of what this torch lacks."""
    found = []
    for consequence in dict.fromkeys(LACKING.values()):
        names = ", ".join(name for name, otherwise in LACKING.items() if otherwise == consequence)
        found.append(f"torch {torch.__version__} has no {names}: {consequence}")
    return found


# Autograd functions that serve as an op's Autograd kernel, as in PyTorch's own ops.

_BY_REFERENCE = "forward-mode AD and torch.func are computed by the reference, in plain PyTorch"

#: The base of `torch.autograd.Function` that differentiates at only one level of `torch.func`.
SingleLevelFunction = _take("torch.autograd.function", "_SingleLevelFunction", _BY_REFERENCE)
#: A context that allows `SingleLevelFunction.apply` inside `torch.func`.
single_level_allowed = _take("torch._functorch.utils", "enable_single_level_autograd_function", _BY_REFERENCE)
#: A context in which ops skip their Autograd kernel and run the one below it.
below_autograd = _take("torch._C", "_AutoDispatchBelowAutograd", _BY_REFERENCE)
#: A context that turns forward-mode AD on or off.
set_forward_mode = _take("torch.autograd.forward_ad", "_set_fwd_grad_enabled", _BY_REFERENCE)

#: Whether ops have derivatives at every level. Otherwise `torch.library.register_autograd` gives them
#: gradients, and `transforms_active` says when to use the reference.
EVERY_LEVEL = not LACKING


#: The base of modes that see each op that is called, or None.
DispatchMode = _take("torch.utils._python_dispatch", "TorchDispatchMode", "freeze refuses every module")

# If one of these names is missing, its function below uses documented means, which are slower.

_ASKED_SLOWLY = "what they tell is found out by slower means"

_functorch_active = _take("torch._C", "_are_functorch_transforms_active", _ASKED_SLOWLY)
_any_requires_grad = _take("torch._C", "_any_requires_grad", _ASKED_SLOWLY)
_any_autocast = _take("torch._C", "_is_any_autocast_enabled", _ASKED_SLOWLY)
_HAS_LEVEL = _take("torch.autograd.forward_ad", "_current_level", _ASKED_SLOWLY) is not None
_is_fake = _take("torch._subclasses.fake_tensor", "is_fake", _ASKED_SLOWLY)


class _Refused(torch.autograd.Function):
    """`torch.func` refuses this function because it has no `setup_context`."""

    @staticmethod
    def forward(ctx: Any, value: None) -> None:
        return value


def _functorch_refuses() -> bool:
    try:
        _Refused.apply(None)
    except RuntimeError:
        return True
    return False


#: Whether a transform of `torch.func` is active.
functorch_active: Callable[[], bool] = _functorch_active or _functorch_refuses


#: Whether autocast may be on for any device type.
any_autocast: Callable[[], bool] = _any_autocast or (lambda: True)


def dual_level_open() -> bool:
    """Whether forward-mode AD is active."""
    if _HAS_LEVEL:
        return forward_ad._current_level >= 0
    try:
        with forward_ad.dual_level():
            return False
    except RuntimeError:  # Levels do not nest.
        return True


def any_requires_grad(arguments: Any) -> bool:
    """Whether any tensor in `arguments`, or in a list among them, requires a gradient."""
    if _any_requires_grad is not None:
        return _any_requires_grad(*arguments)
    tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def transforms_active() -> bool:
    """Whether forward-mode AD or `torch.func` needs what `torch.library.register_autograd` lacks."""
    return not torch.compiler.is_compiling() and (functorch_active() or dual_level_open())


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values because it is, or wraps, one of `torch.export`'s fake tensors."""
    if _is_fake is not None:
        return _is_fake(tensor)
    return any(kind.__name__ == "FakeTensor" for kind in type(tensor).__mro__)


# Results cached for a tensor while it lives and keeps its values.

_MADE_ANEW = "what is made from a tensor of indices or a sparse tensor is made anew at each call"

_take("torch", "Tensor._version", _MADE_ANEW)
_take("torch", "Tensor._indices", _MADE_ANEW)
_take("torch", "Tensor._values", _MADE_ANEW)
_REMEMBERS = _MADE_ANEW not in LACKING.values()


def version(tensor: Tensor) -> int | None:
    """A number that changes with the tensor's values, or None if it is unknown: then do not cache."""
    return tensor._version if _REMEMBERS and not tensor.is_inference() else None


def coo_entries(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (2, E) and values (E,) of a sparse COO tensor, without coalescing it if possible."""
    if _REMEMBERS:
        return matrix._indices(), matrix._values()
    matrix = matrix.coalesce()
    return matrix.indices(), matrix.values()


# Others.


def builtin(overload: Any) -> Any:
    """The C++ function that an `OpOverload` calls; calling it directly saves a Python frame."""
    return getattr(overload, "_op", overload)


def constant_of_a_graph(function: _F) -> _F:
    """Mark `function` so that a traced graph takes its result as a constant.

    This does what torch.compiler.assume_constant_result does, without importing the compiler. A torch with
    another name for the mark traces into the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
