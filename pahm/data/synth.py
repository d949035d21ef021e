"""Make a data set of rendered hands in FreiHAND's own layout."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pahm.data.backgrounds import list_images
from pahm.data.freihand import Split
from pahm.data.picture import draw
from pahm.data.sampling import sample_annotation

VERSION = 1
"""Raised whenever the same seed would give other annotations or pictures."""
MANIFEST = "synth.json"
_FIELDS: dict[Split, tuple[str, ...]] = {
    "training": ("K", "scale", "xyz", "verts", "mano"),
    "evaluation": ("K", "scale", "xyz", "verts"),
}
_CHUNK = 16  # samples a task
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know."""

    out: Path
    seed: int
    size: int
    backgrounds: list[Path] | None


@dataclass(frozen=True)
class _Chunk:
    """Finished samples: for each its annotation fields as JSON text, and how many pictures were drawn."""

    records: list[dict[str, str]]
    drawn: int


def image_paths(out: Path, split: Split, index: int) -> tuple[Path, Path]:
    """Where picture and mask of a sample lie."""
    name = f"{index:08d}.jpg"
    return out / split / "rgb" / name, out / split / "mask" / name


def _finished(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _save(image: Image.Image, path: Path, quality: int) -> None:
    """Write a JPEG under a temporary name and rename it, so that what has its name is whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        image.save(partial, format="JPEG", quality=quality)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


def _numbers(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def make_samples(job: _Job, split: Split, indices: range) -> _Chunk:
    """Draw those pictures that are not there yet, and return the annotations of all."""
    records, drawn = [], 0
    for index in indices:
        annotation = sample_annotation(job.seed, split, index, job.size)
        records.append(
            {
                "K": _numbers(annotation.K.tolist()),
                "scale": _numbers(annotation.scale),
                "xyz": _numbers(annotation.joints.tolist()),
                "verts": _numbers(annotation.vertices.tolist()),
                "mano": _numbers(annotation.mano),
            }
        )
        rgb, mask = image_paths(job.out, split, index)
        if _finished(rgb) and _finished(mask):
            continue
        picture = draw(job.seed, split, index, job.size, job.backgrounds, annotation)
        _save(picture.mask, mask, 95)
        _save(picture.image, rgb, picture.quality)
        drawn += 1
    return _Chunk(records, drawn)


def _start_worker() -> None:
    """One thread a worker; end at once when the parent does, however it ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def follow() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started inside inherit an environment that asks numpy's BLAS for one thread."""
    before = {name: os.environ.get(name) for name in _THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(_THREAD_SETTINGS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run(job: _Job, split: Split, count: int, workers: int) -> Iterator[_Chunk]:
    """Chunks of `count` samples in order, with a few in flight."""
    tasks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    if workers == 1:
        for task in tasks:
            yield make_samples(job, split, task)
        return
    with _single_threaded_children(), ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        flight: deque[Future[_Chunk]] = deque()
        for task in tasks:
            flight.append(pool.submit(make_samples, job, split, task))
            if len(flight) >= 4 * workers:
                yield flight.popleft().result()
        while flight:
            yield flight.popleft().result()


@contextmanager
def _annotation_files(out: Path, split: Split) -> Iterator[Callable[[dict[str, str]], None]]:
    """Give a function that appends one sample to the split's JSON files.

    They are written beside their names and take them when complete; what is incomplete is removed.
    """
    paths = {field: out / f"{split}_{field}.json" for field in _FIELDS[split]}
    partials = {field: path.with_name(f"{path.name}.partial") for field, path in paths.items()}
    try:
        with ExitStack() as stack:
            streams = {
                field: stack.enter_context(path.open("w", encoding="ascii"))
                for field, path in partials.items()
            }
            separator = "["

            def append(record: dict[str, str]) -> None:
                nonlocal separator
                for field, stream in streams.items():
                    stream.write(separator + record[field])
                separator = ","

            yield append
            for stream in streams.values():
                stream.write("[]" if separator == "[" else "]")
                stream.flush()
                os.fsync(stream.fileno())
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
    for field, path in paths.items():
        os.replace(partials[field], path)


def _manifest(out: Path, seed: int, size: int, folder: Path | None, images: list[Path] | None) -> None:
    """Record what the folder is made of, or refuse to go on with something else."""
    now: dict[str, Any] = {"generator": "pahm synth", "version": VERSION, "seed": seed, "image_size": size}
    now["backgrounds"] = None if folder is None or images is None else f"{folder} ({len(images)} images)"
    path = out / MANIFEST
    if path.exists():
        try:
            before = json.loads(path.read_text())
            differing = [name for name in now if before.get(name) != now[name]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"out: {path} is not a manifest of pahm synth ({error})") from error
        if differing:
            name = differing[0]
            raise ValueError(
                f"{name}: {out} was begun with {name} {before.get(name)}, got {now[name]}; "
                "go on with that or choose another folder"
            )
        return
    if any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty and was not made by pahm synth; choose a new folder")
    partial = path.with_name(f"{MANIFEST}.partial")
    partial.write_text(json.dumps(now, indent=1) + "\n")
    os.replace(partial, path)


def _check_counts(out: Path, counts: dict[Split, int]) -> None:
    for split, count in counts.items():
        folder = out / split / "rgb"
        names = [path.stem for path in folder.glob("*.jpg")] if folder.is_dir() else []
        beyond = [name for name in names if not name.isdigit() or int(name) >= count]
        if beyond:
            argument = "train" if split == "training" else "eval"
            raise ValueError(
                f"{argument}: {folder} already has image {max(beyond)}, so at least "
                f"{int(max(beyond)) + 1 if max(beyond).isdigit() else count} are needed, got {count}"
            )


def _progress(enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


def generate(
    out: str | os.PathLike[str],
    train: int = 20000,
    eval: int = 1000,
    seed: int = 0,
    *,
    image_size: int = 224,
    backgrounds: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Render `train` + `eval` hands into the folder `out`, laid out and annotated as FreiHAND is.

    The same `seed` gives the same annotations everywhere, whatever the number of `workers` (processes; all
    cores if None; 1 stays in this process). `backgrounds` is a folder of images, searched with its
    subfolders; without it backgrounds are procedural. A run that was stopped, even by a kill or a full disk,
    goes on when called again; a finished folder can be extended with larger counts. Annotation files are
    written when all images of their split are there. `training_mano.json` holds the parameters of the
    package's own hand in FreiHAND's arrangement, not MANO's.

    Worker processes are spawned, so a script must call this under `if __name__ == "__main__":`.

    Raises ValueError for negative counts, seed, size or workers, and for a folder that holds something else
    or was begun with another seed, size or backgrounds; NotADirectoryError where `out` is a file;
    FileNotFoundError where `backgrounds` is no folder; OSError with one sentence where the disk is full.
    A keyboard interrupt ends it with SystemExit(130) and a sentence that says how to go on.
    """
    for name, value, least in (
        ("train", train, 0), ("eval", eval, 0), ("seed", seed, 0), ("image_size", image_size, 32),
        ("workers", 1 if workers is None else workers, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"out: {target} is a file, expected a folder or a new name")
    folder = None if backgrounds is None else Path(backgrounds).resolve()
    images = None if folder is None else list_images(folder)
    counts: dict[Split, int] = {"training": train, "evaluation": eval}
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    job = _Job(target, seed, image_size, images)
    try:
        target.mkdir(parents=True, exist_ok=True)
        _manifest(target, seed, image_size, folder, images)
        _check_counts(target, counts)
        with _progress(progress) as bar:
            for split in get_args(Split):
                _make_split(job, split, counts[split], workers, bar)
    except KeyboardInterrupt:
        print(
            f"Stopped. What is finished stays in {target}; run the same command again to go on.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk that holds {target} is full; what is finished stays, make room and run the same "
            "command again to go on",
        ) from error


def _make_split(job: _Job, split: Split, count: int, workers: int, bar: Progress) -> None:
    for path in image_paths(job.out, split, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
    task = bar.add_task(split, total=count, rate="")
    with _annotation_files(job.out, split) as append:
        drawn, skipped = 0, 0
        for chunk in _run(job, split, count, workers):
            for record in chunk.records:
                append(record)
            drawn += chunk.drawn
            skipped += len(chunk.records) - chunk.drawn
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{drawn / elapsed:.0f} images/s" if elapsed > 0 else ""
            bar.update(task, advance=len(chunk.records), rate=f"{rate}, {skipped} kept" if skipped else rate)
