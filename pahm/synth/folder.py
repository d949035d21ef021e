"""The output folder of `pahm synth`: FreiHAND's layout. An interrupted run leaves no partial files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from pahm.data.freihand import Split
from pahm.text_files import read_json
from pahm.whole_file import partial_name, whole_file

MANIFEST = "synth.json"
FIELDS: dict[Split, tuple[str, ...]] = {
    "training": ("K", "scale", "xyz", "verts", "mano"),
    "evaluation": ("K", "scale", "xyz", "verts"),
}
"""The annotation files of each split, `<split>_<field>.json`."""


def image_paths(out: Path, split: Split, index: int) -> tuple[Path, Path]:
    """The paths of a sample's picture and mask."""
    name = f"{index:08d}.jpg"
    return out / split / "rgb" / name, out / split / "mask" / name


def is_finished(path: Path) -> bool:
    """Whether an image exists. Images get their final name only once they are complete."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def save_image(image: Image.Image, path: Path, quality: int) -> None:
    """Write a JPEG completely or not at all."""
    encoded = io.BytesIO()  # Pillow does not notice a short write on a full disk; Python does
    image.save(encoded, format="JPEG", quality=quality)
    with whole_file(path) as partial:
        partial.write_bytes(encoded.getbuffer())


@contextmanager
def annotation_files(out: Path, split: Split) -> Iterator[Callable[[dict[str, str]], None]]:
    """Yield a function that appends one sample, with fields as JSON text, to the split's annotation files.

    The files get their names when all are complete. Incomplete files are removed.
    """
    with ExitStack() as stack:
        paths = [stack.enter_context(whole_file(out / f"{split}_{field}.json")) for field in FIELDS[split]]
        streams = [stack.enter_context(path.open("w", encoding="ascii")) for path in paths]
        separator = "["

        def append(record: dict[str, str]) -> None:
            nonlocal separator
            for field, stream in zip(FIELDS[split], streams, strict=True):
                stream.write(separator + record[field])
            separator = ","

        yield append
        for stream in streams:
            stream.write("[]" if separator == "[" else "]")
            stream.flush()
            os.fsync(stream.fileno())


class Manifest:
    """`synth.json`: the options of a folder, and how many samples of each split are finished."""

    def __init__(self, out: Path, options: dict[str, Any]) -> None:
        """Start the folder `out`, or continue it. `options` determine what its samples look like.

        Raises ValueError if the folder was started with other options or holds something else.
        """
        self.path = out / MANIFEST
        self._options = options
        self._finished: dict[str, int] = {}
        if not self.path.exists():
            if any(path != partial_name(self.path) for path in out.iterdir()):
                raise ValueError(
                    f"out: {out} is not empty and was not made by pahm synth; choose a new folder"
                )
            self._write()
            return
        try:
            before = read_json(self.path)
            begun = {name: before[name] for name in options}
            self._finished = dict(before["finished"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"out: {self.path} is not a manifest of pahm synth ({error!r})") from error
        for name, value in options.items():
            if begun[name] != value:
                raise ValueError(
                    f"{name}: {out} was begun with {name} {begun[name]}, got {value}; "
                    "go on with that or choose another folder"
                )

    def finish(self, split: Split, count: int) -> None:
        """Record that the split is complete with `count` samples."""
        self._finished[split] = count
        self._write()

    def is_complete(self, split: Split, count: int) -> bool:
        """Whether the split was finished with `count` samples and no file has been removed since."""
        out = self.path.parent
        return self._finished.get(split) == count and all(
            [
                *(
                    len(list(image_paths(out, split, 0)[kind].parent.glob("*.jpg"))) == count
                    for kind in (0, 1)
                ),
                *((out / f"{split}_{field}.json").is_file() for field in FIELDS[split]),
            ]
        )

    def _write(self) -> None:
        text = json.dumps({**self._options, "finished": self._finished}, indent=1)
        with whole_file(self.path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def check_count(out: Path, split: Split, count: int) -> None:
    """Reject a count that would leave images of an earlier run without annotations.

    Raises ValueError.
    """
    folder = out / split / "rgb"
    indices = (
        [int(path.stem) for path in folder.glob("*.jpg") if path.stem.isdecimal()] if folder.is_dir() else []
    )
    least = max(indices, default=-1) + 1
    if count < least:
        argument = "train" if split == "training" else "eval"
        raise ValueError(
            f"{argument}: {folder} already has image {least - 1}, expected at least {least}, got {count}"
        )
