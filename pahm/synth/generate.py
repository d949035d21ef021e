"""Make a data set of rendered hands in FreiHAND's own layout."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pahm.data.freihand import Split
from pahm.synth.backgrounds import list_images
from pahm.synth.folder import (
    Manifest,
    annotation_files,
    check_count,
    image_paths,
    is_finished,
    save_image,
)
from pahm.synth.picture import draw
from pahm.synth.sampling import sample_annotation
from pahm.synth.workers import start_worker

LOG = logging.getLogger("pahm")
VERSION = 1
"""Incremented whenever the same seed would give different annotations or pictures."""
_CHUNK = 16  # samples per task
_IN_FLIGHT = 64  # tasks
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class _Job:
    """The settings that every worker needs."""

    out: Path
    seed: int
    size: int
    backgrounds: list[Path] | None


@dataclass(frozen=True)
class _Chunk:
    """Finished samples: the annotation fields of each as JSON text, the number of pictures drawn, and a
    sentence for each unreadable background.
    """

    records: list[dict[str, str]]
    drawn: int
    unreadable: list[str]


def _numbers(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def make_samples(job: _Job, split: Split, indices: range) -> _Chunk:
    """Draw the missing pictures and return all annotations."""
    records, drawn, unreadable = [], 0, list[str]()
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
        if is_finished(rgb) and is_finished(mask):
            continue
        picture = draw(job.seed, split, index, job.size, job.backgrounds, annotation)
        save_image(picture.mask, mask, 95)
        save_image(picture.image, rgb, picture.quality)
        unreadable += picture.unreadable
        drawn += 1
    return _Chunk(records, drawn, unreadable)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Limit numpy's BLAS to one thread, through the environment, in processes started inside."""
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


@contextmanager
def _workers(count: int) -> Iterator[Executor | None]:
    """A pool of worker processes, or None for one worker, which is the calling process."""
    if count == 1:
        yield None
        return
    with _single_threaded_children(), ExitStack() as stack:
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=start_worker)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        yield pool


def _run(job: _Job, split: Split, count: int, pool: Executor | None) -> Iterator[_Chunk]:
    """The split's chunks in order, with several in flight."""
    tasks = (range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
    if pool is None:
        for task in tasks:
            yield make_samples(job, split, task)
        return
    flight: deque[Future[_Chunk]] = deque()
    for task in tasks:
        flight.append(pool.submit(make_samples, job, split, task))
        if len(flight) >= _IN_FLIGHT:
            yield flight.popleft().result()
    while flight:
        yield flight.popleft().result()


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
    """Render `train` + `eval` hands into the folder `out`, in FreiHAND's layout and annotation format.

    The same `seed` gives the same annotations on every machine and for any number of `workers` (processes;
    None uses all cores; 1 stays in this process). `backgrounds` is a folder of images, searched recursively;
    without it backgrounds are procedural. Call it again to resume an interrupted run, even after a kill or a
    full disk. Larger counts extend a finished folder. Annotation files are written once all images of their
    split exist. `training_mano.json` holds the parameters of the package's own hand in FreiHAND's
    arrangement, not MANO's.

    Worker processes are spawned, so a script must call this under `if __name__ == "__main__":`.

    Raises ValueError for negative counts, seed, size or workers, and for a folder that holds something else
    or was started with another seed, size or backgrounds; NotADirectoryError if `out` is a file;
    FileNotFoundError if `backgrounds` is not a folder; OSError with one sentence if the disk is full;
    ChildProcessError if a worker process was killed from outside.
    A keyboard interrupt raises SystemExit(130) with a sentence that says how to resume.
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
    options: dict[str, Any] = {
        "generator": "pahm synth",
        "version": VERSION,
        "seed": seed,
        "image_size": image_size,
        "backgrounds": None if images is None else f"{folder} ({len(images)} images)",
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(target, options)
        for split, count in counts.items():
            check_count(target, split, count)
        missing = [split for split, count in counts.items() if not manifest.is_complete(split, count)]
        if not missing:
            return
        with _workers(workers) as pool, _progress(progress) as bar:
            for split in missing:
                _make_split(job, split, counts[split], pool, bar)
                manifest.finish(split, counts[split])
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that renders ended by itself, as it does where memory runs out; what is finished "
            "stays, and the same command goes on, with fewer --workers in less memory"
        ) from error


def _make_split(job: _Job, split: Split, count: int, pool: Executor | None, bar: Progress) -> None:
    for path in image_paths(job.out, split, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
    task = bar.add_task(split, total=count, rate="", visible=count > 0)
    drawn, kept, start = 0, 0, perf_counter()
    named = set[str]()
    with annotation_files(job.out, split) as append:
        for chunk in _run(job, split, count, pool):
            for record in chunk.records:
                append(record)
            for sentence in chunk.unreadable:
                if sentence not in named:
                    named.add(sentence)
                    LOG.warning("%s; the next background takes its place", sentence)
            drawn += chunk.drawn
            kept += len(chunk.records) - chunk.drawn
            rate = f"{drawn / (perf_counter() - start):.0f} images/s" + (f", {kept} kept" if kept else "")
            bar.update(task, advance=len(chunk.records), rate=rate)
