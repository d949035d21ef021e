"""FreiHAND's annotation files: long JSON arrays, parsed once and cached as memory-mapped tables."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pahm.whole_file import whole_file

_CHUNK = 1 << 22  # characters; the longest record, 778 vertices, takes about 60,000
_SPACE = " \t\r\n"
_AFTER = (*_SPACE, ",", "]")
_DECODER = json.JSONDecoder()


def iterate_array(path: Path) -> Iterator[object]:
    """Yield the elements of the JSON array in `path`, with a few megabytes in memory at a time.

    FreiHAND's `training_verts.json` has 76 million numbers; `json.load` would take several gigabytes.
    Raises ValueError, naming the file and the element, if the text is not one complete JSON array.
    """
    count = 0
    with path.open(encoding="utf-8") as stream:
        text, at, ended = "", 0, False

        def refill() -> None:
            nonlocal text, at, ended
            try:
                more = stream.read(_CHUNK)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not a text file, near element {count} ({error})") from error
            text, at, ended = text[at:] + more, 0, not more

        def next_mark() -> str:
            nonlocal at
            while True:
                while at < len(text) and text[at] in _SPACE:
                    at += 1
                if at < len(text) or ended:
                    return text[at : at + 1]
                refill()

        if (mark := next_mark()) != "[":
            found = f"it starts with {text[at : at + 20]!r}" if mark else "it is empty"
            raise ValueError(f"{path} is not a JSON array: {found}")
        at += 1
        mark = next_mark()
        if mark == "]":
            at += 1
        while mark != "]":
            next_mark()
            try:
                value, end = _DECODER.raw_decode(text, at)
            except RecursionError as error:
                raise ValueError(f"{path}: element {count} is nested too deeply") from error
            except json.JSONDecodeError as error:
                if not ended and len(text) - at < _CHUNK:
                    refill()
                    continue
                state = "ends inside" if ended else "is not JSON at"
                raise ValueError(f"{path} {state} element {count} ({error.msg})") from error
            # "1." at the end of a chunk would parse as 1, so the next character must be in the buffer.
            if text[end : end + 1] not in _AFTER and not ended and len(text) - at < _CHUNK:
                refill()
                continue
            at = end
            yield value
            count += 1
            mark = next_mark()
            at += 1
            if mark not in ("]", ","):
                found = repr(mark) if mark else "the end of the file"
                raise ValueError(f"{path}: expected ',' or ']' after element {count - 1}, found {found}")
        if mark := next_mark():
            raise ValueError(f"{path}: expected nothing after the array's end, found {mark!r}")


def parse_table(
    path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32
) -> npt.NDArray[np.floating]:
    """Parse a JSON array of records of the given shape into an array `(count, *shape)` of `dtype`.

    Raises ValueError, naming the file and the record, for a wrong shape or a number that is not finite.
    """
    rows: list[npt.NDArray[np.floating]] = []
    for index, value in enumerate(iterate_array(path)):
        try:
            with np.errstate(over="ignore"):  # too large a number becomes infinite and is rejected below
                row = np.asarray(value, dtype=dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: record {index} is not an array of numbers ({error})") from error
        if row.shape != shape:
            raise ValueError(f"{path}: record {index} has shape {row.shape}, expected {shape}")
        if not np.isfinite(row).all():
            raise ValueError(f"{path}: record {index} has a value that is not finite")
        rows.append(row)
    return np.stack(rows) if rows else np.zeros((0, *shape), dtype)


class _Digested:
    """Writes to a stream and keeps a digest of the data."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.total = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.total.update(data)
        return self.stream.write(data)


class Table:
    """The records of one annotation file as a float32 array, memory-mapped from a cache next to the file.

    The first read writes the cache `<stem>.<size>-<ctime>.npy`, completely or not at all, if the folder is
    writable. The cache ends with its own digest. It is rebuilt if the digest does not match or the JSON file
    has changed. The name has the ctime because every change updates it, while copies keep the mtime. Pickling
    a table that has a cache sends its path, so data loader workers share the memory pages.

    Parameters: `path`, the JSON file; `shape`, the shape of one record.
    Raises FileNotFoundError for a missing file and ValueError for a malformed one.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        status = path.stat()
        self.path = path
        self.shape = shape
        self._cache: Path | None = path.with_name(f"{path.stem}.{status.st_size}-{status.st_ctime_ns}.npy")
        self._rows: npt.NDArray[np.floating] | None = None
        if self._cache.is_file() and self._is_cache(self._cache):
            return
        rows = parse_table(path, shape)
        if not self._write(self._cache, rows):
            self._cache, self._rows = None, rows

    @property
    def rows(self) -> npt.NDArray[np.floating]:
        """All records, `(count, *shape)` float32."""
        if self._rows is None:
            assert self._cache is not None
            self._rows = np.load(self._cache, mmap_mode="r")
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> npt.NDArray[np.floating]:
        return np.array(self.rows[index])

    def __getstate__(self) -> dict[str, object]:
        state = dict(self.__dict__)
        if self._cache is not None:
            state["_rows"] = None
        return state

    def _is_cache(self, cache: Path) -> bool:
        try:
            with cache.open("rb") as stream:
                total = hashlib.sha256()
                left = os.fstat(stream.fileno()).st_size - total.digest_size
                while left > 0 and (block := stream.read(min(left, 1 << 20))):
                    total.update(block)
                    left -= len(block)
                if stream.read() != total.digest():
                    return False
            rows = np.load(cache, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            return False
        return rows.dtype == np.float32 and rows.shape[1:] == self.shape

    def _write(self, cache: Path, rows: npt.NDArray[np.floating]) -> bool:
        """Write the cache and delete those of earlier versions of the file; False if writing fails."""
        try:
            with whole_file(cache, shared=True) as partial, partial.open("wb") as stream:
                digested = _Digested(stream)
                np.save(digested, rows)
                stream.write(digested.total.digest())  # np.load ignores bytes after the array
        except OSError:
            return False
        for old in self.path.parent.glob(f"{self.path.stem}.*-*.npy"):
            if old != cache:
                old.unlink(missing_ok=True)
        return True
