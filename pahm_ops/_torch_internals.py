"""Every name of torch that its documentation does not promise, each with what happens where it is missing.

A name that this torch lacks costs the feature that it is for and nothing else; `LACKING` says so, and
`pahm_ops.backends()` prints that.
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

#: What this torch lacks, by name: what comes of it.
LACKING: dict[str, str] = {}


def _take(module: str, name: str, otherwise: str) -> Any:
    """`name` of a module of torch, None where it is missing; `otherwise` is what is done without it."""
    try:
        return attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        LACKING[f"{module}.{name}"] = otherwise
        return None


def notes() -> list[str]:
    """What this torch lacks, a sentence for each consequence."""
    found = []
    for consequence in dict.fromkeys(LACKING.values()):
        names = ", ".join(name for name, otherwise in LACKING.items() if otherwise == consequence)
        found.append(f"torch {torch.__version__} has no {names}: {consequence}")
    return found


# Autograd functions that are an op's Autograd kernel, as PyTorch's own ops have them.

_BY_REFERENCE = "forward-mode AD and torch.func are computed by the reference, in plain PyTorch"

#: The base of `torch.autograd.Function` that differentiates at one level of `torch.func` alone.
SingleLevelFunction = _take("torch.autograd.function", "_SingleLevelFunction", _BY_REFERENCE)
#: A context that permits `SingleLevelFunction.apply` inside `torch.func`.
single_level_allowed = _take("torch._functorch.utils", "enable_single_level_autograd_function", _BY_REFERENCE)
#: A context in which ops run the kernel below their Autograd one.
below_autograd = _take("torch._C", "_AutoDispatchBelowAutograd", _BY_REFERENCE)
#: A context with forward-mode AD on or off.
set_forward_mode = _take("torch.autograd.forward_ad", "_set_fwd_grad_enabled", _BY_REFERENCE)

#: Whether ops have derivatives at every level; otherwise `torch.library.register_autograd` gives them
#: gradients, and `transforms_active` says when the reference serves.
EVERY_LEVEL = not LACKING


# Each of these asks by documented means where it has to, which is slower.

_ASKED_SLOWLY = "what they tell is found out by slower means"

_functorch_active = _take("torch._C", "_are_functorch_transforms_active", _ASKED_SLOWLY)
_any_requires_grad = _take("torch._C", "_any_requires_grad", _ASKED_SLOWLY)
_any_autocast = _take("torch._C", "_is_any_autocast_enabled", _ASKED_SLOWLY)
_HAS_LEVEL = _take("torch.autograd.forward_ad", "_current_level", _ASKED_SLOWLY) is not None
_is_fake = _take("torch._subclasses.fake_tensor", "is_fake", _ASKED_SLOWLY)


class _Refused(torch.autograd.Function):
    """Has no `setup_context`, without which `torch.func` refuses it."""

    @staticmethod
    def forward(ctx: Any, value: None) -> None:
        return value


def _functorch_refuses() -> bool:
    try:
        _Refused.apply(None)
    except RuntimeError:
        return True
    return False


#: Whether a transform of `torch.func` is being computed.
functorch_active: Callable[[], bool] = _functorch_active or _functorch_refuses


#: Whether autocast may be on for some kind of device.
any_autocast: Callable[[], bool] = _any_autocast or (lambda: True)


def dual_level_open() -> bool:
    """Whether forward-mode AD is being computed."""
    if _HAS_LEVEL:
        return forward_ad._current_level >= 0
    try:
        with forward_ad.dual_level():
            return False
    except RuntimeError:  # Levels do not nest.
        return True


def any_requires_grad(arguments: Any) -> bool:
    """Whether a tensor among arguments, or in a list among them, requires a gradient."""
    if _any_requires_grad is not None:
        return _any_requires_grad(*arguments)
    tensors = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def transforms_active() -> bool:
    """Whether forward-mode AD or `torch.func` asks for what `torch.library.register_autograd` lacks."""
    return not torch.compiler.is_compiling() and (functorch_active() or dual_level_open())


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values: it is, or wraps, one of `torch.export`'s fake tensors."""
    if _is_fake is not None:
        return _is_fake(tensor)
    return any(kind.__name__ == "FakeTensor" for kind in type(tensor).__mro__)


# Memory of what was made from a tensor, as long as it lives and keeps its values.

_MADE_ANEW = "what is made from a tensor of indices or a sparse tensor is made anew at each call"

_take("torch", "Tensor._version", _MADE_ANEW)
_take("torch", "Tensor._indices", _MADE_ANEW)
_take("torch", "Tensor._values", _MADE_ANEW)
_REMEMBERS = _MADE_ANEW not in LACKING.values()


def version(tensor: Tensor) -> int | None:
    """A number that changes with the tensor's values. None if it cannot be told: do not remember then."""
    return tensor._version if _REMEMBERS and not tensor.is_inference() else None


def coo_entries(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (2, E) and values (E,) of a sparse COO tensor, where possible as they lie in it."""
    if _REMEMBERS:
        return matrix._indices(), matrix._values()
    matrix = matrix.coalesce()
    return matrix.indices(), matrix.values()


# Others.


def builtin(overload: Any) -> Any:
    """The function in C++ that an `OpOverload` calls, without its frame in Python."""
    return getattr(overload, "_op", overload)


def constant_of_a_graph(function: _F) -> _F:
    """`function`, whose result a traced graph takes as it is.

    As torch.compiler.assume_constant_result, which imports the compiler. A torch that gives the mark another
    name traces into the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
