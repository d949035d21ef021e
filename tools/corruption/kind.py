"""The definition of a kind of input, and code that the kinds share."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

SHARED: dict[str, Any] = {}
"""What `prepare` makes once, before the cases' processes are forked."""


class Nonsense(Exception):
    """A result that is silently wrong."""


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    make: writes a valid input into a folder. read: reads it as a user would, and returns values for `digest`;
    raises `Nonsense` if they cannot be right. pattern: the files to damage. text: whether they are text.
    exact: whether the format has a digest that must show every change. damage: replaces `damage.damage` as
    the way to damage a file.
    """

    name: str
    weight: int
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    pattern: str = "*"
    text: bool = False
    exact: bool = False
    damage: Callable[[Path, Random], tuple[str, bytes]] | None = None

    def files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob(self.pattern) if path.is_file())

    def judge(self, found: Any, expected: Any) -> str:
        if digest(found) == digest(expected):
            return "same"
        if self.exact:
            raise Nonsense("another result than the undamaged input's")
        return "plausible"


def digest(value: Any) -> str:
    """A digest of nested dicts, sequences, arrays and plain values."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            total.update(f"{len(value)}(".encode())
            for entry in value:
                add(entry)
        elif isinstance(value, (np.ndarray, torch.Tensor)):
            array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            total.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        else:
            total.update(repr(value).encode())

    add(value)
    return total.hexdigest()


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise Nonsense(sentence)


def finite(*arrays: Any, below: float = 1e30) -> None:
    for array in arrays:
        values = np.asarray(array, np.float64)
        require(bool(np.isfinite(values).all()), "numbers that are not finite")
        require(
            values.size == 0 or float(np.abs(values).max()) < below, f"numbers of {np.abs(values).max():g}"
        )


def prepare() -> None:
    """Make what the kinds share; on one thread, because processes are forked later."""
    from pahm.config import preset
    from pahm.infer.predictor import Predictor
    from pahm.model import load_checkpoint
    from pahm.model.checkpoint import save_checkpoint
    from pahm.synth.generate import generate

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = Path(tempfile.mkdtemp())
    generate(place / "data", 6, 2, 0, workers=1)
    network = load_checkpoint()
    SHARED.update(place=place, data=place / "data", predictor=Predictor(network, "cpu"))
    SHARED["picture"] = Image.open(place / "data/evaluation/rgb/00000000.jpg").convert("RGB")
    SHARED["hand"] = SHARED["predictor"].predict(SHARED["picture"]).vertices
    config = preset("tiny").override({"model.pretrained": False})
    save_checkpoint(place / "model.safetensors", network, config)
