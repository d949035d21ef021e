"""From pictures to hands in camera space."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pahm.data.augment import normalise
from pahm.data.camera import Array, project_weakly, ray_rotation, solve_translation
from pahm.data.crop import Box, Crop, ImageSource, Request, read_crop
from pahm.data.open_image import MOST_PIXELS
from pahm.hand.left import checked_left, mirror, mirror_faces, mirror_pixels

FARTHEST = 100  # metres
READERS = 2  # threads that decode and crop


class HandNetwork(Protocol):
    """What `Predictor` asks of a network; `pahm.model.HandNet` is one."""

    config: Any
    topology: Any
    joint_regressor: Tensor

    def __call__(self, images: Tensor) -> Any: ...


@dataclass(frozen=True)
class HandPrediction:
    """A reconstructed hand. Arrays are float64 numpy; camera space is x right, y down, z forward, metres.

    Pixels are those of the image, from the centre of its top-left pixel.
    """

    vertices: Array
    """`(778, 3)`, camera space."""
    joints: Array
    """`(21, 3)`, camera space, FreiHAND's order."""
    meshes: list[Array]
    """M4, M3, M2, M1 in camera space, `(98 | 195 | 389 | 778, 3)`, or whatever meshes the network makes on
    the way; the last is `vertices`.
    """
    level_faces: list[npt.NDArray[np.int64]]
    """Triangles `(F, 3)` of each of `meshes`, counter-clockwise seen from outside (for left hands too)."""
    relative_meshes: list[Array]
    """`meshes` as the network gives them, relative to its root joint, axes of the crop's camera."""
    vertices_2d: Array
    """`(778, 2)`, pixels: where the network's weak-perspective camera puts the vertices."""
    joints_2d: Array
    """`(21, 2)`, pixels, likewise."""
    K: Array
    """`(3, 3)` intrinsics in pixels."""
    intrinsics_assumed: bool
    """Whether K was assumed (see `assumed_intrinsics`), which leaves the hand's distance uncertain."""
    weak_camera: Array
    """`(3,)` [s, tx, ty]: x_n = s (X + tx), y_n = s (Y + ty), -1 and 1 at the edges of the crop."""
    box: Box
    """The square crop (x, y, width, height) in pixels from the image's top-left corner."""
    left: bool
    image: Image.Image
    """The RGB image that was given."""
    source: str | None
    """Absolute path of the image, where it was a file."""

    @property
    def faces(self) -> npt.NDArray[np.int64]:
        """Triangles of `vertices`, `(1538, 3)`."""
        return self.level_faces[-1]


class Predictor:
    """Reconstructs hands in images with a trained network.

    network: such as `pahm.model.load_checkpoint` gives; it is moved to `device`, laid out in channels_last
    and put in evaluation mode. device: a torch device or its name; "auto" is the accelerator where there is
    one, else the CPU. Raises ValueError for a device that torch cannot use here.
    """

    def __init__(self, network: nn.Module, device: str | torch.device = "auto") -> None:
        self.device = pick_device(device)
        # On a CPU channels_last is faster than NCHW by an eighth at batch 8.
        module = network.to(self.device).eval().to(memory_format=torch.channels_last)
        self.network: HandNetwork = module  # type: ignore[assignment]
        self.dtype = next((p.dtype for p in module.parameters()), torch.float32)
        self.size = int(self.network.config.image_size)
        self.share = float(self.network.config.crop)
        self._regressor = self.network.joint_regressor.double().cpu().numpy()
        hierarchy = self.network.topology.hierarchy
        self._faces = {
            len(vertices): np.ascontiguousarray(faces, np.int64)
            for vertices, faces in zip(hierarchy.vertices, hierarchy.faces, strict=True)
        }

    def predict(
        self,
        image: ImageSource,
        *,
        bbox: Sequence[float] | None = None,
        intrinsics: npt.ArrayLike | None = None,
        left: bool = False,
    ) -> HandPrediction:
        """Reconstruct the hand in one image.

        image: a path, a PIL image, or a uint8 array (H, W, 3) or (H, W). bbox: the hand's box
        (x, y, width, height) in pixels from the image's top-left corner; the crop is the square about its
        centre that shows the hand as large as in the training images (see `HAND_SHARE`). Without it the
        image is taken for one of those, as FreiHAND's are. intrinsics: (3, 3) in pixels, else
        `assumed_intrinsics`. left: the image shows a left hand; it is mirrored for the network, and the mesh
        is mirrored back.

        The network's mesh is relative to its root joint and seen by a camera that looks at the crop's
        centre. It is turned to the ray of that centre, and its translation is the least-squares solution of
        the equations that put each vertex on the ray of its pixel.

        Raises ValueError, TypeError or FileNotFoundError for an image that cannot be read, a box that is
        not one or lies outside the image, intrinsics that are not; FloatingPointError where the network's
        output is not finite or cannot be in front of the camera. The message names the image's file.
        """
        return _result(next(self._attempts(iter([Request(image, bbox, intrinsics, left)]), 1)))

    def predict_many(
        self,
        images: Iterable[ImageSource],
        *,
        bboxes: Iterable[Sequence[float] | None] | None = None,
        intrinsics: npt.ArrayLike | Iterable[npt.ArrayLike | None] | None = None,
        left: bool | Iterable[bool] = False,
        batch_size: int = 8,
    ) -> Iterator[HandPrediction]:
        """Reconstruct the hand in each of many images, in their order, `batch_size` at once.

        images: as for `predict`; they may come from a generator. bboxes: one an image, or None. intrinsics:
        one (3, 3) for all, or one (or None) an image. left: one for all, or one an image. While the network
        runs, threads read the next batch: about two batches of images are held.

        Raises what `predict` raises when the turn of the image comes, naming its path or `images[i]`;
        ValueError for a batch size below 1, and where there are more or fewer boxes, intrinsics or sides
        than images; TypeError for a single image.
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
    ) -> Iterator[HandPrediction | Exception]:
        """As `predict_many`, but an image's error takes the place of its prediction; the rest follows."""
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
        return self._attempts(requests, batch_size)

    def _attempts(self, requests: Iterator[Request], batch_size: int) -> Iterator[HandPrediction | Exception]:
        pool = ThreadPoolExecutor(min(READERS, batch_size), thread_name_prefix="pahm-read")

        def read_ahead(count: int) -> list[Future[Crop | Exception]]:
            return [
                pool.submit(read_crop, request, self.size, self.share) for request in islice(requests, count)
            ]

        try:
            ahead = read_ahead(batch_size)
            while ahead:
                crops = [future.result() for future in ahead]
                # Of very large photographs fewer are held.
                pixels = [crop.image.width * crop.image.height for crop in crops if isinstance(crop, Crop)]
                ahead = read_ahead(max(1, min(batch_size, 2 * MOST_PIXELS // max(pixels, default=1))))
                outputs = iter(self._run([crop for crop in crops if isinstance(crop, Crop)]))
                for crop in crops:
                    yield crop if isinstance(crop, Exception) else self._place(crop, *next(outputs))
        finally:
            pool.shutdown(cancel_futures=True)

    def _run(self, crops: Sequence[Crop]) -> list[tuple[list[Array], Array]]:
        """The meshes and the camera that the network gives for each crop."""
        if not crops:
            return []
        images = torch.stack([normalise(crop.pixels) for crop in crops])
        with torch.inference_mode():
            images = images.to(self.device, self.dtype, memory_format=torch.channels_last)
            output = self.network(images)
        meshes = [level.double().cpu().numpy() for level in output.meshes]
        cameras = output.camera.double().cpu().numpy()
        return [([level[i] for level in meshes], cameras[i]) for i in range(len(crops))]

    def _place(self, crop: Crop, relative: list[Array], weak: Array) -> HandPrediction | Exception:
        """The prediction in camera space, and of the side that was asked for."""
        name, width, left = crop.request.name, crop.image.width, crop.request.left
        if not all(np.isfinite(values).all() for values in (*relative, weak)):
            return FloatingPointError(f"{name}: the network's output is not finite")
        joints = self._regressor @ relative[-1]
        to_image: Array = np.linalg.inv(crop.matrix).astype(np.float64)
        pixels = project_weakly(relative[-1], weak, self.size, to_image)
        joint_pixels = project_weakly(joints, weak, self.size, to_image)

        middle = np.array([(self.size - 1) / 2, (self.size - 1) / 2, 1])
        turn = ray_rotation(crop.seen_K, (to_image @ middle)[:2])
        translation = solve_translation(relative[-1] @ turn.T, pixels, crop.seen_K)
        meshes = [mesh @ turn.T + translation for mesh in relative]
        joints = joints @ turn.T + translation
        nearest, farthest = meshes[-1][:, 2].min(), meshes[-1][:, 2].max()
        if nearest <= 0:
            return FloatingPointError(f"{name}: the network found no hand that fits in front of the camera")
        if not farthest <= FARTHEST:
            return FloatingPointError(
                f"{name}: the hand would be {farthest:.3g} m away, expected at most {FARTHEST}: are box and "
                "intrinsics in this image's pixels?"
            )
        faces = [self._faces[len(mesh)] for mesh in meshes]
        if left:
            meshes, relative = [mirror(mesh) for mesh in meshes], [mirror(mesh) for mesh in relative]
            joints, weak = mirror(joints), weak * np.array([1.0, -1.0, 1.0])
            pixels, joint_pixels = mirror_pixels(pixels, width), mirror_pixels(joint_pixels, width)
            faces = [mirror_faces(level) for level in faces]
        return HandPrediction(
            vertices=meshes[-1],
            joints=joints,
            meshes=meshes,
            level_faces=faces,
            relative_meshes=relative,
            vertices_2d=pixels,
            joints_2d=joint_pixels,
            K=crop.K,
            intrinsics_assumed=crop.request.intrinsics is None,
            weak_camera=weak,
            box=crop.box,
            left=left,
            image=crop.image,
            source=crop.source,
        )


def _result(attempt: HandPrediction | Exception) -> HandPrediction:
    if isinstance(attempt, Exception):
        raise attempt
    return attempt


def _is_single(left: Any) -> bool:
    """Whether this is the side of all images, not an iterable of sides; a text is neither."""
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
    """A torch device by name; "auto" is the accelerator where there is one, else the CPU.

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
