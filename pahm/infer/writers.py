"""From files to files: the images to reconstruct hands in, and what shows the hands."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import trimesh

from pahm.infer.predictor import HandPrediction, Predictor
from pahm.report.pictures import overlay
from pahm.synth.backgrounds import SUFFIXES
from pahm.text_files import read_json
from pahm.whole_file import whole_file

T = TypeVar("T")

KINDS = {"overlay": "_overlay.png", "glb": ".glb", "ply": ".ply", "json": ".json"}
"""What can be written of a prediction, and how the names of the files end."""
WRITERS = 2  # threads
_GLTF = np.diag([1.0, -1.0, -1.0, 1.0])  # camera space to glTF's: y up, the camera looks along -z


def predict_files(
    predictor: Predictor,
    images: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    kinds: Iterable[str] = tuple(KINDS),
    bbox: Sequence[float] | None = None,
    intrinsics: npt.ArrayLike | None = None,
    left: bool = False,
    batch_size: int = 8,
) -> Iterator[list[Path] | Exception]:
    """Reconstruct the hands in image files and write what shows them: the work of `pahm predict`.

    images: files, or folders, which stand for the images right in them (by suffix, in the order of their
    names). folder, kinds: as for `write`. bbox, intrinsics, left, batch_size: of all images, as for
    `Predictor.predict_many`. Gives the paths written for each image, or its error, in the order of the
    images; errors of folders without an image come first. Meanwhile torch has one thread less, so that a
    core is left to reading and writing.

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


def write(
    prediction: HandPrediction,
    folder: str | os.PathLike[str],
    stem: str,
    kinds: Iterable[str] = tuple(KINDS),
) -> list[Path]:
    """Write `<stem>_overlay.png`, `<stem>.glb`, `<stem>.ply`, `<stem>.json`, or some of them, to `folder`.

    kinds: of `KINDS`. The PLY is in camera space (OpenCV axes, metres); the GLB is turned to glTF's axes,
    so that viewers show the hand upright. The JSON holds everything in `HandPrediction` but the image and
    the coarser meshes. Files of the same image, crop and side are replaced; where a JSON says that the
    names belong to another prediction, such as of an image of the same name in another folder, `<stem>-2`,
    `<stem>-3`, ... are used. Without a JSON nobody can tell, and files of these names are replaced. Each
    file is whole or not there. Two processes must not write to the same folder at the same time: they could
    take the same names.

    Returns the paths in the order of `KINDS`. Raises ValueError for a stem that is not a plain file name
    and for kinds that there are not, OSError where a file cannot be written.
    """
    (result,) = write_many([(stem, prediction)], folder, kinds)
    if isinstance(result, Exception):
        raise result
    return result


def write_many(
    results: Iterable[tuple[str, HandPrediction | Exception]],
    folder: str | os.PathLike[str],
    kinds: Iterable[str] = tuple(KINDS),
) -> Iterator[list[Path] | Exception]:
    """Write many predictions as `write` does, in threads, while `results` makes the next ones.

    results: stems and predictions, such as of `Predictor.attempt_many`; different predictions of one call
    get different names. Gives the paths of each in the same order; an exception among `results` is passed
    on, and one that is met in writing takes the place of the paths.

    Raises ValueError for kinds that there are not, OSError where the folder cannot be made.
    """
    wanted = check_kinds(kinds)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _write_many(results, folder, wanted)


def check_kinds(kinds: Iterable[str]) -> list[str]:
    """The kinds in the order of `KINDS`; ValueError for none, and naming one that there is not."""
    wanted = list(kinds)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        raise ValueError(
            f"kinds: expected some of {', '.join(KINDS)}, got {unknown[0] if unknown else 'none'!r}"
        )
    return [kind for kind in KINDS if kind in wanted]


def _write_many(
    results: Iterable[tuple[str, HandPrediction | Exception]], folder: Path, kinds: Sequence[str]
) -> Iterator[list[Path] | Exception]:
    names = _Names(folder)
    latest: dict[str, Future[list[Path]]] = {}
    ahead: deque[Exception | Future[list[Path]]] = deque()
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="pahm-write") as pool:
        for stem, prediction in results:
            if isinstance(prediction, Exception):
                ahead.append(prediction)
            else:
                stem = names.claim(stem, prediction)
                if stem in latest:
                    wait([latest[stem]])  # the same image once more: two threads in one file would mix
                latest[stem] = pool.submit(_write, prediction, folder, stem, kinds)
                ahead.append(latest[stem])
            while ahead and (len(ahead) > 2 * WRITERS or _is_done(ahead[0])):
                yield _outcome(ahead.popleft())
        while ahead:
            yield _outcome(ahead.popleft())


def _is_done(result: Exception | Future[list[Path]]) -> bool:
    return isinstance(result, Exception) or result.done()


def _outcome(result: Exception | Future[list[Path]]) -> list[Path] | Exception:
    try:
        return result if isinstance(result, Exception) else result.result()
    except Exception as error:
        return error


def _write(prediction: HandPrediction, folder: Path, stem: str, kinds: Sequence[str]) -> list[Path]:
    paths = {kind: folder / f"{stem}{KINDS[kind]}" for kind in kinds}
    if "overlay" in paths:
        picture = overlay(prediction.image, prediction.vertices, prediction.faces, prediction.K)
        # zlib's fastest level takes a half of the default's time, and a fifth more space.
        with whole_file(paths["overlay"]) as partial:
            picture.save(partial, "PNG", compress_level=1)
    mesh = trimesh.Trimesh(prediction.vertices, prediction.faces, process=False)
    if "ply" in paths:
        with whole_file(paths["ply"]) as partial:
            mesh.export(partial, file_type="ply")
    if "glb" in paths:
        mesh.apply_transform(_GLTF)
        with whole_file(paths["glb"]) as partial:
            mesh.export(partial, file_type="glb")
    if "json" in paths:
        with whole_file(paths["json"]) as partial:
            partial.write_text(json.dumps(to_json(prediction)) + "\n", encoding="utf-8")
    return list(paths.values())


def to_json(prediction: HandPrediction) -> dict[str, Any]:
    """A prediction as JSON values: lengths in metres to 0.1 micrometre, pixels to 0.001."""
    return {
        **_owner(prediction),
        "vertices": prediction.vertices.round(7).tolist(),
        "joints": prediction.joints.round(7).tolist(),
        "vertices_2d": prediction.vertices_2d.round(3).tolist(),
        "joints_2d": prediction.joints_2d.round(3).tolist(),
        "faces": prediction.faces.tolist(),
        "K": prediction.K.tolist(),
        "intrinsics_assumed": prediction.intrinsics_assumed,
        "weak_perspective": prediction.weak_camera.tolist(),
    }


def _owner(prediction: HandPrediction) -> dict[str, Any]:
    """What tells one prediction from another, as JSON values: the image, the crop and the side."""
    return {
        "image": prediction.source,
        "image_size": list(prediction.image.size),
        "left": prediction.left,
        "crop_box": list(prediction.box),
    }


class _Names:
    """Stems of files in a folder, and whose they are: of predictions of this run or of earlier ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claimed: dict[str, dict[str, Any]] = {}

    def claim(self, stem: str, prediction: HandPrediction) -> str:
        """The first of stem, stem-2, ... that is free or this prediction's own."""
        if Path(stem).name != stem or stem in ("", ".", ".."):
            raise ValueError(f"stem: expected a plain file name, got {stem!r}")
        owner = _owner(prediction)
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
