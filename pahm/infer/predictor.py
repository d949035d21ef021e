"""From pictures to hands in camera space."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from pahm.data.crop import ImageSource, Request, read_crop
from pahm.hand.left import checked_left
from pahm.infer.engines import make_engine
from pahm.infer.hand import Hand
from pahm.infer.reconstruct import HandNetwork, reconstruct, reconstruct_all

FARTHEST = 100  # metres


class Predictor:
    """Reconstructs hands in images with a trained network.

    network: for example from `pahm.load_checkpoint`. It is put in evaluation mode and moved to `device`. Its
    values are taken now: a change of its weights afterwards changes no prediction for sure. device: a torch
    device or its name; "auto" is the accelerator if there is one, else the CPU. engine: what runs the
    network, one of `pahm.infer.engines.ENGINES`; "auto" is as in `make_engine`.

    A predictor can be copied and pickled, which makes the engine anew, and used by several threads.

    Raises ValueError for a device that torch cannot use here, and as `pahm.infer.engines.make_engine`.
    """

    def __init__(self, network: nn.Module, device: str | torch.device = "auto", engine: str = "auto") -> None:
        self.device = pick_device(device)
        self.engine = make_engine(network, self.device, engine)
        self.network: HandNetwork = network  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Predictor, (self.network, self.device, self.engine.name)

    def predict(
        self,
        image: ImageSource,
        *,
        bbox: Sequence[float] | None = None,
        intrinsics: npt.ArrayLike | None = None,
        left: bool = False,
    ) -> Hand:
        """Reconstruct the hand in one image.

        image: a path, a PIL image, or a uint8 array (H, W, 3) or (H, W). bbox: the hand's box
        (x, y, width, height) in pixels from the image's top-left corner; the crop is the square about its
        centre that shows the hand as large as the training images do (see `HAND_SHARE`). Without a box the
        crop is the middle of the image, which suits images like FreiHAND's. intrinsics: (3, 3) in pixels;
        without them they are assumed (`assumed_intrinsics`). left: the image shows a left hand. The network
        sees its mirror image, and the mesh is mirrored back.

        See `pahm.infer.reconstruct.reconstruct` for how the hand is placed in camera space.

        Raises ValueError, TypeError or FileNotFoundError for an image that cannot be read and for a wrong
        box or wrong intrinsics; FloatingPointError if the network's output is not finite or does not fit in
        front of the camera. The message names the image's file.
        """
        request = Request(image, bbox, intrinsics, left)
        config = self.engine.config
        crop = read_crop(request, int(config.image_size), float(config.crop))
        if isinstance(crop, Exception):
            raise crop
        (hand,) = reconstruct(self.engine, [crop])
        return _result(_in_front(hand, request.name))

    def predict_many(
        self,
        images: Iterable[ImageSource],
        *,
        bboxes: Iterable[Sequence[float] | None] | None = None,
        intrinsics: npt.ArrayLike | Iterable[npt.ArrayLike | None] | None = None,
        left: bool | Iterable[bool] = False,
        batch_size: int = 8,
    ) -> Iterator[Hand]:
        """Reconstruct the hand in each of many images, in their order, `batch_size` at once.

        images: as for `predict`; they may come from a generator. bboxes: one an image, or None. intrinsics:
        one (3, 3) for all, or one (or None) an image. left: one for all, or one an image. While the network
        runs, threads read the next batch: about two batches of images are held.

        Raises what `predict` raises, when it gets to the image, whose path or `images[i]` it names;
        ValueError for a batch size below 1, and if the numbers of boxes, intrinsics or sides and of images
        differ; TypeError for a single image.
        """
        attempts = self.attempt_many(
            images, bboxes=bboxes, intrinsics=intrinsics, left=left, batch_size=batch_size
        )
        return map(_result, attempts)

    def attempt_many(
        self,
        images: Iterable[ImageSource],
        *,
        bboxes: Iterable[Sequence[float] | None] | None = None,
        intrinsics: npt.ArrayLike | Iterable[npt.ArrayLike | None] | None = None,
        left: bool | Iterable[bool] = False,
        batch_size: int = 8,
    ) -> Iterator[Hand | Exception]:
        """As `predict_many`, but gives an image's error in place of its hand, and goes on."""
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError(f"images: expected several images, got one {type(images).__name__}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        cameras = repeat(intrinsics) if intrinsics is None or _is_matrix(intrinsics) else intrinsics
        each = {
            "images": iter(images),
            "bboxes": repeat(None) if bboxes is None else iter(bboxes),
            "intrinsics": iter(cameras),  # type: ignore[arg-type]
            "left": repeat(checked_left(left)) if _is_single(left) else iter(left),  # type: ignore[arg-type]
        }
        requests = (
            Request(image, bbox, camera, side, f"images[{i}]")
            for i, (image, bbox, camera, side) in enumerate(_zip(each))
        )
        return self._attempt(requests, batch_size)

    def _attempt(self, requests: Iterator[Request], batch_size: int) -> Iterator[Hand | Exception]:
        for request, hand in reconstruct_all(self.engine, requests, batch_size):
            yield _in_front(hand, request.name)


def _in_front(hand: Hand | Exception, name: str) -> Hand | Exception:
    """The hand or error, or an error for a hand that is not where a camera can see it."""
    if isinstance(hand, Exception):
        return hand
    nearest, farthest = hand.vertices[:, 2].min(), hand.vertices[:, 2].max()
    if nearest <= 0:
        return FloatingPointError(f"{name}: the network found no hand that fits in front of the camera")
    if not farthest <= FARTHEST:
        return FloatingPointError(
            f"{name}: the hand would be {farthest:.3g} m away, expected at most {FARTHEST}: are box and "
            "intrinsics in this image's pixels?"
        )
    return hand


def _result(attempt: Hand | Exception) -> Hand:
    if isinstance(attempt, Exception):
        raise attempt
    return attempt


def _is_single(left: Any) -> bool:
    """Whether this is one value for all images, not an iterable of values. A string counts as one value."""
    return isinstance(left, str) or not hasattr(left, "__iter__") or getattr(left, "ndim", 1) == 0


def _is_matrix(values: Any) -> bool:
    """Whether this is one matrix, not several or an iterator of them."""
    try:
        return np.ndim(values) == 2
    except ValueError:  # rows of different lengths
        return False


def _zip(each: dict[str, Iterator[Any]]) -> Iterator[tuple[Any, ...]]:
    """`zip` of the values; ValueError names the key that has more or fewer of them than the first."""
    end = object()
    (first, images), *others = each.items()
    count = 0
    for image in images:
        row = [image]
        for name, values in others:
            value = next(values, end)
            if value is end:
                raise ValueError(f"{name}: expected one for each of {first}, got {count}")
            row.append(value)
        yield tuple(row)
        count += 1
    for name, values in others:
        if not isinstance(values, repeat) and next(values, end) is not end:
            raise ValueError(f"{name}: expected one for each of the {count} {first}, got more")


def pick_device(device: str | torch.device) -> torch.device:
    """A torch device by name; "auto" is the accelerator if there is one, else the CPU.

    Raises ValueError for a name that torch does not know and for a device that does not work here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        place = torch.device((accelerator or "cpu") if device == "auto" else device)
        torch.empty(1, device=place).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]  # torch's messages may be pages long
        raise ValueError(f"device: expected a device of torch, got {str(device)!r} ({reason})") from error
    return place
