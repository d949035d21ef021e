"""Hands as files: the formats, their names in a folder, and whole folders of images at once."""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import trimesh

from pahm.hand.left import mirror_faces
from pahm.synth.backgrounds import SUFFIXES
from pahm.text_files import read_json
from pahm.whole_file import whole_file

if TYPE_CHECKING:
    from pahm.infer.hand import Hand
    from pahm.infer.predictor import Predictor

T = TypeVar("T")

FORMATS = {"png": "_overlay.png", "glb": ".glb", "ply": ".ply", "obj": ".obj", "json": ".json"}
"""The formats of a hand, and how the names of their files end."""
FACES = "faces.json"
"""The triangles that belong to the vertices in all JSON files of a folder, for right and for left hands."""
WRITERS = 2  # threads
_GLTF = np.array([1.0, -1.0, -1.0])  # camera space to glTF's: y up, the camera looks along -z


def predict_files(
    predictor: Predictor,
    images: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    kinds: Iterable[str] = tuple(FORMATS),
    bbox: Sequence[float] | None = None,
    intrinsics: npt.ArrayLike | None = None,
    left: bool = False,
    batch_size: int = 8,
) -> Iterator[list[Path] | Exception]:
    """Reconstruct the hands in image files and write them to a folder: the work of `pahm predict`.

    images: files, and folders, of which the images directly inside are taken (by suffix, in the order of
    their names). folder, kinds: the folder and the formats of `write_many`. bbox, intrinsics, left,
    batch_size: of all images, as for `Predictor.predict_many`. Gives the paths written for each image, or its
    error, in the order of the images; errors of folders without an image come first. Until it is done torch
    has one thread less, so that a core is free to read and write.

    Raises as `write_many` and `Predictor.predict_many`, but for errors of a single image.
    """
    paths, errors = _files(images)
    attempts = predictor.attempt_many(
        paths,
        bboxes=None if bbox is None else [bbox] * len(paths),
        intrinsics=intrinsics,
        left=left,
        batch_size=batch_size,
    )
    written = write_many(zip((path.stem for path in paths), attempts, strict=True), folder, kinds)
    return _with_a_core_to_spare(chain(errors, written))


def _files(images: Iterable[str | os.PathLike[str]]) -> tuple[list[Path], list[Exception]]:
    """The files named and those in the folders named; an error for each folder without an image."""
    files: list[Path] = []
    errors: list[Exception] = []
    for path in map(Path, images):
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        files += found
        if not found:
            errors.append(ValueError(f"{path}: no image in this folder, expected {', '.join(SUFFIXES)}"))
    return files, errors


def _with_a_core_to_spare(results: Iterable[T]) -> Iterator[T]:
    # Threads that wait for one another spin: two on a core take many times as long as one alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield from results
    finally:
        torch.set_num_threads(threads)


def write_many(
    hands: Iterable[tuple[str, Hand | Exception]],
    folder: str | os.PathLike[str],
    formats: Iterable[str] = tuple(FORMATS),
) -> Iterator[list[Path] | Exception]:
    """Write many hands in threads, while `hands` makes the next ones: the work of `Hand.save`.

    hands: names and hands, such as of `Predictor.attempt_many`. formats: of `FORMATS`, whose files are called
    `<name>_overlay.png`, `<name>.glb` and so on. PLY and OBJ are in camera space (OpenCV axes, metres). GLB
    is turned to glTF's axes, so that viewers show the hand upright. JSON holds everything in `Hand` but the
    image, the silhouette and the coarser meshes; the triangles are in `faces.json`, once a folder.

    A file appears when it is complete. Files of the same image, crop and side are replaced. If a JSON says
    that a name belongs to another hand, for example from an image of the same name in another folder, the
    files are called `<name>-2`, `<name>-3`, ... Without a JSON, files of the same name are replaced.
    Different hands of one call get different names. Two processes must not write to the same folder at the
    same time: they could choose the same names.

    Gives the paths of each hand in the order of `FORMATS`. An exception among `hands` is passed on; an
    exception from writing takes the place of the paths. Raises ValueError for unknown formats, OSError if
    the folder cannot be made or `faces.json` cannot be written.
    """
    wanted = _check_formats(formats)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _write_many(hands, folder, wanted)


def _check_formats(formats: Iterable[str]) -> list[str]:
    """The formats in the order of `FORMATS`; ValueError for none, and naming an unknown one."""
    wanted = list(formats)
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise ValueError(
            f"formats: expected some of {', '.join(FORMATS)}, got {unknown[0] if unknown else 'none'!r}"
        )
    return [name for name in FORMATS if name in wanted]


def _write_many(
    hands: Iterable[tuple[str, Hand | Exception]], folder: Path, formats: Sequence[str]
) -> Iterator[list[Path] | Exception]:
    names = _Names(folder)
    faces: npt.NDArray[np.int64] | None = None
    latest: dict[str, Future[list[Path]]] = {}
    ahead: deque[Exception | Future[list[Path]]] = deque()
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="pahm-write") as pool:
        for name, hand in hands:
            if isinstance(hand, Exception):
                ahead.append(hand)
            else:
                if faces is None and "json" in formats:
                    faces = hand.faces
                    _write_faces(folder / FACES, mirror_faces(faces) if hand.left else faces)
                name = names.claim(name, hand)
                if name in latest:
                    wait([latest[name]])  # the same image once more: two threads in one file would mix
                latest[name] = pool.submit(_write, hand, folder, name, formats)
                ahead.append(latest[name])
            while ahead and (len(ahead) > 2 * WRITERS or _is_done(ahead[0])):
                yield _outcome(ahead.popleft())
        while ahead:
            yield _outcome(ahead.popleft())


def _write_faces(path: Path, right: npt.NDArray[np.int64]) -> None:
    text = json.dumps({"right": right.tolist(), "left": mirror_faces(right).tolist()}) + "\n"
    if not (path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text):
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")


def _is_done(result: Exception | Future[list[Path]]) -> bool:
    return isinstance(result, Exception) or result.done()


def _outcome(result: Exception | Future[list[Path]]) -> list[Path] | Exception:
    try:
        return result if isinstance(result, Exception) else result.result()
    except Exception as error:
        return error


def _write(hand: Hand, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    paths = {form: folder / f"{name}{FORMATS[form]}" for form in formats}
    if "png" in paths:
        picture = hand.overlay()
        # zlib's fastest level with runs alone is faster than that level itself, and the files are smaller.
        with whole_file(paths["png"]) as partial:
            picture.save(partial, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    for form in ("ply", "obj", "glb"):
        if form in paths:
            vertices = hand.vertices * _GLTF if form == "glb" else hand.vertices
            mesh = trimesh.Trimesh(vertices, hand.faces, process=False)
            with whole_file(paths[form]) as partial:
                mesh.export(partial, file_type=form)
    if "json" in paths:
        with whole_file(paths["json"]) as partial:
            partial.write_text(json.dumps(_to_json(hand)) + "\n", encoding="utf-8")
    return list(paths.values())


def _to_json(hand: Hand) -> dict[str, Any]:
    """A hand as JSON values: lengths in metres to 0.1 micrometre, pixels to 0.001."""
    return {
        **_owner(hand),
        "vertices": hand.vertices.round(7).tolist(),
        "joints": hand.joints.round(7).tolist(),
        "vertices_2d": hand.vertices_2d.round(3).tolist(),
        "joints_2d": hand.joints_2d.round(3).tolist(),
        "K": hand.K.tolist(),
        "intrinsics_assumed": hand.intrinsics_assumed,
        "weak_perspective": hand.weak_camera.tolist(),
        "confidence": None if hand.confidence is None else round(hand.confidence, 4),
    }


def _owner(hand: Hand) -> dict[str, Any]:
    """What tells one hand from another, as JSON values: the image, the crop and the side."""
    return {
        "image": hand.source,
        "image_size": list(hand.image.size),
        "left": hand.left,
        "crop_box": list(hand.box),
    }


class _Names:
    """Names of files in a folder, and whose they are: hands of this run or of earlier ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claimed: dict[str, dict[str, Any]] = {}

    def claim(self, stem: str, hand: Hand) -> str:
        """The first of stem, stem-2, ... that is free or this hand's own."""
        if Path(stem).name != stem or stem in ("", ".", ".."):
            raise ValueError(f"name: expected a plain file name, got {stem!r}")
        owner = _owner(hand)
        number, name = 1, stem
        while not self._serves(name, owner):
            number += 1
            name = f"{stem}-{number}"
        self.claimed[name] = owner
        return name

    def _serves(self, name: str, owner: dict[str, Any]) -> bool:
        if name in self.claimed:
            return self.claimed[name] == owner
        path = self.folder / f"{name}.json"
        if not os.path.exists(path):  # a name too long, where Path.exists raises, fails in writing
            return True
        try:
            found = read_json(path)
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and all(found.get(key) == value for key, value in owner.items())
