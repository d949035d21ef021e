"""From a picture to a hand in camera space, and the files that show it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import trimesh
from PIL import Image, ImageOps
from torch import Tensor, nn

from pahm.data.augment import crop_matrix, normalise, warp
from pahm.data.freihand import read_image
from pahm.report import overlay

Array = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]

HAND_SHARE = 0.6  # of the crop's side that the hand's box takes, about as in the training images
_GLTF = np.diag([1.0, -1.0, -1.0, 1.0])  # camera space to glTF's: y up, the camera looks along -z


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
    """M4, M3, M2, M1 in camera space, `(98 | 195 | 389 | 778, 3)`; the last is `vertices`."""
    level_faces: list[npt.NDArray[np.int64]]
    """Triangles `(F, 3)` of M4, M3, M2, M1, counter-clockwise seen from outside (for left hands too)."""
    relative_meshes: list[Array]
    """M4, M3, M2, M1 as the network gives them, relative to its root joint, axes of the crop's camera."""
    vertices_2d: Array
    """`(778, 2)`, pixels: where the network's weak-perspective camera puts the vertices."""
    joints_2d: Array
    """`(21, 2)`, pixels, likewise."""
    K: Array
    """`(3, 3)` intrinsics in pixels."""
    intrinsics_assumed: bool
    """Whether K was assumed (see `assumed_intrinsics`), which leaves the distance to the camera uncertain."""
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

    network: such as `pahm.model.load_checkpoint` gives; it is moved to `device` and put in evaluation mode.
    device: a torch device or its name; "auto" is the accelerator where there is one, else the CPU.
    Raises ValueError for a device that torch does not know.
    """

    def __init__(self, network: nn.Module, device: str | torch.device = "auto") -> None:
        self.device = pick_device(device)
        self._module = network.to(self.device).eval()
        self.network: HandNetwork = self._module  # type: ignore[assignment]
        self.size = int(self.network.config.image_size)

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
        centre of which the hand takes `HAND_SHARE`. Without it the image is taken for such a crop itself, as
        FreiHAND's are. intrinsics: (3, 3) in pixels, else `assumed_intrinsics`. left: the image shows a left
        hand; it is mirrored for the network, and the mesh is mirrored back.

        The network's mesh is relative to its root joint and seen by a camera that looks at the crop's centre.
        It is turned to the ray of that centre, and its translation is the least-squares solution of the
        equations that put each vertex on the ray of its pixel.

        Raises ValueError, TypeError or FileNotFoundError for an image that cannot be read, a box that is not
        one or lies outside the image, intrinsics that are not; FloatingPointError where the network's output
        is not finite or cannot be in front of the camera.
        """
        picture, source = load_image(image)
        width, height = picture.size
        box = hand_box(picture.size, bbox)
        assumed = intrinsics is None
        K = assumed_intrinsics(width, height) if intrinsics is None else check_intrinsics(intrinsics)
        # A left hand is reconstructed in the mirrored image, through the mirrored camera.
        seen, seen_box, seen_K = picture, box, K
        if left:
            seen = ImageOps.mirror(picture)
            seen_box = (width - box[0] - box[2], *box[1:])
            flip = np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
            seen_K = flip @ K @ np.diag([-1.0, 1.0, 1.0])
        matrix = crop_matrix(seen_box, self.size)
        relative, weak = self._run(normalise(warp(seen, matrix, self.size)), source)
        regressor = self.network.joint_regressor.double().cpu().numpy()
        joints = regressor @ relative[-1]
        to_image: Array = np.linalg.inv(matrix).astype(np.float64)
        pixels = _project_weakly(relative[-1], weak, self.size, to_image)
        joint_pixels = _project_weakly(joints, weak, self.size, to_image)

        centre = np.array([seen_box[0] + seen_box[2] / 2 - 0.5, seen_box[1] + seen_box[3] / 2 - 0.5])
        turn = ray_rotation(seen_K, centre)
        translation = solve_translation(relative[-1] @ turn.T, pixels, seen_K)
        meshes = [mesh @ turn.T + translation for mesh in relative]
        joints = joints @ turn.T + translation
        if meshes[-1][:, 2].min() <= 0:
            raise FloatingPointError(
                f"{source or 'image'}: the network found no hand that fits in front of the camera"
            )
        if left:
            mirror = np.array([-1.0, 1.0, 1.0])
            meshes, relative = [m * mirror for m in meshes], [m * mirror for m in relative]
            joints, weak = joints * mirror, weak * np.array([1.0, -1.0, 1.0])
            for points in (pixels, joint_pixels):
                points[:, 0] = width - 1 - points[:, 0]
        step = -1 if left else 1
        faces = [
            np.ascontiguousarray(np.asarray(level)[:, ::step], np.int64)
            for level in reversed(self.network.topology.hierarchy.faces)
        ]
        return HandPrediction(
            vertices=meshes[-1],
            joints=joints,
            meshes=meshes,
            level_faces=faces,
            relative_meshes=relative,
            vertices_2d=pixels,
            joints_2d=joint_pixels,
            K=K,
            intrinsics_assumed=assumed,
            weak_camera=weak,
            box=box,
            left=left,
            image=picture,
            source=source,
        )

    def _run(self, tensor: Tensor, source: str | None) -> tuple[list[Array], Array]:
        with torch.inference_mode():
            output = self.network(tensor[None].to(self.device))
        meshes = [mesh[0].double().cpu().numpy() for mesh in output.meshes]
        camera = output.camera[0].double().cpu().numpy()
        if not all(np.isfinite(values).all() for values in (*meshes, camera)):
            raise FloatingPointError(f"{source or 'image'}: the network's output is not finite")
        return meshes, camera


def pick_device(device: str | torch.device) -> torch.device:
    """A torch device by name; "auto" is the accelerator where there is one, else the CPU.

    Raises ValueError for a name that torch does not know.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        return torch.device((accelerator or "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a device of torch, got {device!r} ({error})") from error


def load_image(image: ImageSource) -> tuple[Image.Image, str | None]:
    """An RGB image, upright by its EXIF tag, and the absolute path it came from, if any.

    Raises FileNotFoundError or ValueError naming a file that is not an image, TypeError or ValueError for an
    array of another dtype or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        return ImageOps.exif_transpose(read_image(image)), str(Path(image).resolve())
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image.convert("RGB")), None
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a path, a PIL image or a numpy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected an array of uint8, got {image.dtype}")
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.size == 0:
        raise ValueError(f"image: expected an array (H, W, 3) or (H, W), got shape {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB"), None


def hand_box(size: tuple[int, int], bbox: Sequence[float] | None) -> Box:
    """The square crop (x, y, side, side) for a hand's box in an image of `size` (width, height).

    Raises ValueError for a box that is not four finite numbers with a positive size, or that lies outside.
    """
    width, height = size
    if bbox is None:
        side = float(max(width, height))
        return ((width - side) / 2, (height - side) / 2, side, side)
    values = [float(value) for value in bbox]
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"bbox: expected four finite numbers X Y W H, got {list(bbox)}")
    x, y, w, h = values
    if w <= 0 or h <= 0:
        raise ValueError(f"bbox: expected a positive width and height, got {w:g} x {h:g}")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ValueError(f"bbox: {x:g} {y:g} {w:g} {h:g} lies outside the image of {width} x {height} pixels")
    side = max(w, h) / HAND_SHARE
    return (x + (w - side) / 2, y + (h - side) / 2, side, side)


def assumed_intrinsics(width: int, height: int) -> Array:
    """Intrinsics (3, 3) of an unknown camera: focal length = the image's diagonal, centre = the image's.

    That is a field of view of 53 degrees over the diagonal, between a phone's and a portrait lens.
    """
    focal = math.hypot(width, height)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float64)


def check_intrinsics(values: npt.ArrayLike) -> Array:
    """Intrinsics as a float64 array (3, 3); ValueError where they are not a camera matrix."""
    try:
        K = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"intrinsics: expected 3 x 3 numbers, got {values!r}") from error
    if K.shape == (1, 3, 3):
        K = K[0]
    if K.shape != (3, 3):
        raise ValueError(f"intrinsics: expected shape (3, 3), got {K.shape}")
    if (
        not np.isfinite(K).all()
        or not np.array_equal(K[2], [0, 0, 1])
        or min(K[0, 0], K[1, 1]) <= 0
        or K[1, 0]
    ):
        raise ValueError(
            f"intrinsics: expected finite [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with positive fx and fy, "
            f"got {K.tolist()}"
        )
    return K


def read_intrinsics(path: str | os.PathLike[str]) -> Array:
    """Intrinsics (3, 3) from a JSON file: `{"K": [[...], [...], [...]]}`, the bare matrix, or a list of one.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"intrinsics: {os.fspath(path)} does not exist")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            if "K" not in content:
                raise ValueError('intrinsics: expected a key "K" in the JSON object')
            content = content["K"]
        return check_intrinsics(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def ray_rotation(K: Array, pixel: Array) -> Array:
    """The smallest rotation (3, 3) that takes the optical axis to the ray of `pixel` (2,)."""
    ray = np.linalg.solve(K, np.array([*pixel, 1.0]))
    x, y, z = ray / np.linalg.norm(ray)
    # Rodrigues' formula for the axis (-y, x, 0), whose length is the sine and z the cosine of the angle.
    cross = np.array([[0, 0, x], [0, 0, y], [-x, -y, 0]])
    return np.asarray(np.eye(3) + cross + cross @ cross / (1 + z))


def solve_translation(points: Array, pixels: Array, K: Array) -> Array:
    """The translation t (3,) that best puts `points` (N, 3) on the rays of `pixels` (N, 2) of camera K.

    With the ray (x, y, 1) of a pixel: X + t_x = x (Z + t_z) and Y + t_y = y (Z + t_z), 2 N linear equations
    in t, solved in the least-squares sense.
    """
    rays = np.linalg.solve(K, np.concatenate([pixels, np.ones_like(pixels[:, :1])], axis=1).T).T
    x, y = rays[:, 0], rays[:, 1]
    one, zero = np.ones_like(x), np.zeros_like(x)
    left = np.concatenate([np.stack([one, zero, -x], 1), np.stack([zero, one, -y], 1)])
    right = np.concatenate([x * points[:, 2] - points[:, 0], y * points[:, 2] - points[:, 1]])
    return np.asarray(np.linalg.lstsq(left, right, rcond=None)[0])


def _project_weakly(points: Array, camera: Array, size: int, to_image: Array) -> Array:
    """Pixels (N, 2) of the image where the weak-perspective camera of the crop sees `points` (N, 3)."""
    normalised = camera[0] * (points[:, :2] + camera[1:])
    crop = ((normalised + 1) * size - 1) / 2
    return np.asarray(crop @ to_image[:2, :2].T + to_image[:2, 2])


def write(prediction: HandPrediction, folder: str | os.PathLike[str], stem: str) -> list[Path]:
    """Write `<stem>_overlay.png`, `<stem>.glb`, `<stem>.ply` and `<stem>.json` into `folder`.

    The PLY is in camera space (OpenCV axes, metres); the GLB is turned to glTF's axes, so that viewers show
    the hand upright. The JSON holds everything in `HandPrediction` but the image and the coarser meshes.
    Files of the same image, crop and side are replaced; where the names belong to another prediction, such as
    of an image of the same name in another folder, `<stem>-2`, `<stem>-3`, ... are used.

    Returns the four paths. Raises ValueError for a stem that is not a plain file name.
    """
    if Path(stem).name != stem or stem in ("", ".", ".."):
        raise ValueError(f"stem: expected a plain file name, got {stem!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = to_json(prediction)
    stem = _free_stem(folder, stem, record)
    paths = [folder / f"{stem}{suffix}" for suffix in ("_overlay.png", ".glb", ".ply", ".json")]
    picture = overlay(prediction.image, prediction.vertices, prediction.faces, prediction.K)
    picture.save(paths[0])
    mesh = trimesh.Trimesh(prediction.vertices, prediction.faces, process=False)
    mesh.export(paths[2])
    mesh.apply_transform(_GLTF)
    mesh.export(paths[1])
    paths[3].write_text(json.dumps(record) + "\n", encoding="utf-8")
    return paths


def to_json(prediction: HandPrediction) -> dict[str, Any]:
    """A prediction as JSON values: lengths in metres to 0.1 micrometre, pixels to 0.001."""
    width, height = prediction.image.size
    return {
        "image": prediction.source,
        "image_size": [width, height],
        "left": prediction.left,
        "vertices": prediction.vertices.round(7).tolist(),
        "joints": prediction.joints.round(7).tolist(),
        "vertices_2d": prediction.vertices_2d.round(3).tolist(),
        "joints_2d": prediction.joints_2d.round(3).tolist(),
        "faces": prediction.faces.tolist(),
        "K": prediction.K.tolist(),
        "intrinsics_assumed": prediction.intrinsics_assumed,
        "weak_perspective": prediction.weak_camera.tolist(),
        "crop_box": list(prediction.box),
    }


def _free_stem(folder: Path, stem: str, record: dict[str, Any]) -> str:
    """The first of stem, stem-2, ... that is free or holds a prediction of the same image, crop and side."""
    keys = ("image", "image_size", "left", "crop_box")
    number, name = 1, stem
    while (path := folder / f"{name}.json").exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if isinstance(found, dict) and all(found.get(key) == record[key] for key in keys):
            break
        number += 1
        name = f"{stem}-{number}"
    return name
