"""Pixel-aligned hand mesh reconstruction: the hand model, data, the network, training and prediction."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pahm.hand.model import HandModel
    from pahm.infer.hand import Hand
    from pahm.infer.predictor import Predictor
    from pahm.model.checkpoint import load_checkpoint
    from pahm.model.network import HandNet

try:
    __version__ = version("pahm")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["Hand", "HandModel", "HandNet", "Predictor", "__version__", "load_checkpoint"]

# Imported on first use, so that `pahm --help` does not wait for torch.
_HOMES = {
    "Hand": "pahm.infer.hand",
    "HandModel": "pahm.hand.model",
    "HandNet": "pahm.model.network",
    "Predictor": "pahm.infer.predictor",
    "load_checkpoint": "pahm.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
