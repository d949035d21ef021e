"""Training images in tar shards, in webdataset's layout: a few large files instead of many small ones.

Each image is a run of files with the same key: `.jpg`, `.mask.jpg` if there are masks, `.json` (index, name,
K, scale, and a checksum of everything), `.joints.npy` and `.vertices.npy`. The images of the shards are in a
fixed random order. Each image takes one read at its place in the shard, in the order of seed and epoch. A
resumed run does not reread images that it has seen, and processes and workers share an epoch as they share a
folder's. The webdataset package can do neither: it reads a shard from front to back and gives each worker its
own shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pahm.data.freihand import FreiHand, Sample
from pahm.data.open_image import decode_image
from pahm.text_files import parse_json, read_json
from pahm.whole_file import whole_file

LOG = logging.getLogger("pahm")
MANIFEST = "shards.json"
_NAME = "train-{:06d}.tar"
_PARTS = ("jpg", "mask.jpg", "json", "joints.npy", "vertices.npy")
_NEEDED = frozenset(_PARTS) - {"mask.jpg"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512  # bytes in a tar block
# A tar file ends with two blocks of zeros, padded with more up to a whole record of 20 blocks.
_END = range(2 * _BLOCK, 21 * _BLOCK + 1)
_MOST = 10**6  # shards; their names have six digits
_OPEN = 32  # shards kept open per process


def write_shards(data: str | os.PathLike[str], out: str | os.PathLike[str], size: int = 1000) -> int:
    """Pack the training images of a FreiHAND-layout folder into `train-000000.tar`, ..., `size` per shard.

    Files are copied unchanged. A shard gets its name once it is complete. Existing shards are not rewritten,
    so an interrupted call can be repeated. Returns the number of shards.

    Raises FileNotFoundError or ValueError as `FreiHand`, and ValueError for a size below 1 or a folder `out`
    that was started with another number of images, other annotations or another size.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1 image a shard, got {size}")
    dataset, out = FreiHand(data, "training"), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for table in dataset.tables.values():
        digest.update(table.rows.data)
    counts = {"images": len(dataset), "annotations": dataset.annotations, "size": size}
    made_of = {**counts, "sha256": digest.hexdigest()}
    begun = _manifest(out)
    if begun is None:
        _write(out / MANIFEST, json.dumps(made_of).encode())
    elif "sha256" not in begun:
        raise ValueError(f"out: {out / MANIFEST} lacks the annotations' sha256; choose another folder")
    elif begun != made_of:
        raise ValueError(f"out: {out} was begun with {begun}, got {made_of}; choose another folder")
    # Neighbours in FreiHAND look alike, and the shuffle buffer is too small to separate them.
    order = np.random.default_rng(0).permutation(len(dataset))
    shards = [order[at : at + size] for at in range(0, len(order), size)]
    for number, indices in enumerate(shards):
        path = out / _NAME.format(number)
        if path.exists():
            continue
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in indices:
                for part, data_of_part in _files(dataset, int(index)).items():
                    entry = tarfile.TarInfo(f"{index:08d}.{part}")
                    entry.size = len(data_of_part)
                    tar.addfile(entry, io.BytesIO(data_of_part))
        _write(path, content.getbuffer())
    return len(shards)


def _files(dataset: FreiHand, index: int) -> dict[str, bytes]:
    record = dataset.record(index)
    image = dataset.root / record["name"]
    values = {
        "index": index,
        "name": record["name"],
        "K": record["K"].tolist(),
        "scale": float(record["scale"]),
    }
    files = {"jpg": image.read_bytes()}
    if dataset.has_masks:
        mask = dataset.root / "training" / "mask" / f"{index % dataset.annotations:08d}.jpg"
        files["mask.jpg"] = mask.read_bytes()
    files["json"] = b""
    for key in ("joints", "vertices"):
        stream = io.BytesIO()
        np.save(stream, record[key])
        files[f"{key}.npy"] = stream.getvalue()
    values["crc32"] = _checksum(files, values)
    files["json"] = json.dumps(values).encode()
    return files


def _checksum(files: dict[str, bytes], values: dict[str, Any]) -> int:
    """The checksum of an image's other files and of the other values in its JSON file."""
    total = zlib.crc32(
        json.dumps({name: value for name, value in values.items() if name != "crc32"}).encode()
    )
    for part in _PARTS:
        if part != "json" and part in files:
            total = zlib.crc32(files[part], total)
    return total


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder's shards; None if there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    with suppress(ValueError, TypeError, KeyError):
        made_of: dict[str, Any] = read_json(path)
        if (
            range(made_of["images"])
            and range(made_of["size"])
            and made_of["images"] <= _MOST * made_of["size"]
        ):
            return made_of
    raise ValueError(f"{path} is not a manifest of `pahm shards`, which has positive images and size")


def _write(path: Path, content: bytes | memoryview) -> None:
    with whole_file(path) as partial, partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def find_shards(data: str | os.PathLike[str]) -> list[Path]:
    """Find the shards that `data` names: a tar file, several as `train-{000000..000009}.tar`, or a folder of
    them. The list is empty if `data` names something else.

    Raises FileNotFoundError for a missing shard (in a folder: one that its manifest counts), and ValueError
    for a manifest that cannot be read.
    """
    text = os.fspath(data)
    if text.endswith(".tar"):
        paths = [Path(name) for name in _expand(text)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"data: {path} does not exist")
        return paths
    folder = Path(text)
    if (folder / "training").exists():
        return []
    paths = sorted(folder.glob("*.tar"))
    if made_of := _manifest(folder):
        names = [_NAME.format(number) for number in range(-(-made_of["images"] // made_of["size"]))]
        if missing := [name for name in names if not (folder / name).is_file()]:
            state = f"{len(names) - len(missing)} of {len(names)} shards, {missing[0]} is missing"
            raise FileNotFoundError(f"data: {folder} has {state}; run `pahm shards` again")
    return paths


def _expected(path: Path, default: int) -> int:
    """The number of images that a shard was written with, or `default` without a manifest next to it."""
    number, made_of = re.fullmatch(r"train-(\d+)\.tar", path.name), _manifest(path.parent)
    if number is None or made_of is None:
        return default
    before = int(number[1]) * int(made_of["size"])
    return max(1, min(int(made_of["size"]), int(made_of["images"]) - before))


def _expand(text: str) -> list[str]:
    match = _RANGE.search(text)
    if match is None:
        return [text]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    if not 0 < len(numbers) <= _MOST:
        raise ValueError(f"data: expected a range of 1 to {_MOST} shards, got {match[0]} in {text}")
    return [
        name
        for number in numbers
        for name in _expand(f"{text[: match.start()]}{number:0{len(first)}d}{text[match.end() :]}")
    ]


class ShardImages:
    """The training images of tar shards, in the form of `FolderImages`. A sample's `name` starts with its
    shard's name.

    Parameters: `paths` of the shards; `buffer`, the number of images from which an epoch's order draws the
    next one, over shards in a random order; `strict`, reject an incomplete shard.
    The complete images before a shard's end or its first damaged header are used, and one sentence names the
    shard. Raises ValueError for such a shard with `strict`, and if no complete image is left; an item that
    cannot be read raises ValueError naming shard and image.
    """

    def __init__(self, paths: list[Path], buffer: int, strict: bool = False) -> None:
        self.paths, self.buffer = paths, buffer
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._keys: list[str] = []
        self.has_masks = False
        places = []
        for number, path in enumerate(paths):
            found, whole, masks = _index(path)
            self.has_masks = self.has_masks or masks
            if not whole or len(found) != _expected(path, len(found)):
                sentence = f"data: {path} ends early or is damaged: {len(found)} whole images"
                if strict:
                    raise ValueError(sentence)
                LOG.warning("%s are used", sentence)
            self._keys += [key for key, _, _ in found]
            places += [(number, start, end) for _, start, end in found]
        if not places:
            raise ValueError(f"data: no whole image in {len(paths)} shards, the first is {paths[0]}")
        self._places = np.array(places, np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[self._places[index, 0]]
        try:
            files = self._read(index)
            values = _values(files)
            masks = {"mask": decode_image(files["mask.jpg"], "mask.jpg", "L")} if self.has_masks else {}
            return (
                values
                | masks
                | {
                    "name": f"{path.name}/{values['name']}",
                    "image": decode_image(files["jpg"], "jpg"),
                    "joints": _array(files, "joints.npy", (21, 3)),
                    "vertices": _array(files, "vertices.npy", (778, 3)),
                }
            )
        except ValueError as error:
            raise ValueError(f"image: {self._keys[index]} of {path} cannot be read: {error}") from error

    def order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng((seed, epoch))
        shards = generator.permutation(len(self.paths))
        stream = np.concatenate([np.flatnonzero(self._places[:, 0] == shard) for shard in shards])
        waiting, rest = stream[: self.buffer], stream[self.buffer :]
        draws = generator.integers(max(1, len(waiting)), size=len(rest))
        order = np.empty_like(rest)
        for i, draw in enumerate(draws):
            order[i], waiting[draw] = waiting[draw], rest[i]
        return np.concatenate([order, generator.permutation(waiting)])

    def vertices(self, count: int) -> npt.NDArray[np.floating]:
        """`(N, 778, 3)` metres: the vertices of up to the first `count` hands, without damaged ones."""
        hands = []
        for index in range(min(count, len(self))):
            with suppress(ValueError):  # training names an unreadable image when it reaches it
                files = self._read(index)
                _values(files)
                hands.append(_array(files, "vertices.npy", (778, 3)))
        if not hands:
            raise ValueError(f"data: the first {count} images cannot be read, from {self.paths[0]} on")
        return np.stack(hands)

    def _read(self, index: int) -> dict[str, bytes]:
        number, start, end = (int(value) for value in self._places[index])
        try:
            content = os.pread(self._descriptor(number), end - start, start)
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                members = [(member.name.split(".", 1)[1], tar.extractfile(member)) for member in tar]
                files = {part: stream.read() for part, stream in members if stream is not None}
        except OSError as error:
            raise ValueError(f"the shard cannot be read ({error.strerror})") from error
        except (tarfile.TarError, IndexError, KeyError) as error:
            raise ValueError(f"the shard has changed since training began ({error})") from error
        needed = _PARTS if self.has_masks else _NEEDED
        if missing := [part for part in _PARTS if part in needed and part not in files]:
            raise ValueError(f"the shard has changed since training began ({missing[0]} is missing)")
        return files

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            if len(self._descriptors) >= _OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[number] = os.open(self.paths[number], os.O_RDONLY)
        return self._descriptors[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": OrderedDict()}


def _values(files: dict[str, bytes]) -> Sample:
    values = parse_json(files["json"], "json")
    recorded = values.get("crc32") if isinstance(values, dict) else None
    if recorded is not None and recorded != _checksum(files, values):
        raise ValueError("its content is not what was written")
    try:
        name, index, scale = values["name"], int(values["index"]), np.float32(float(values["scale"]))
        camera = np.array(values["K"], np.float32)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"json does not give index, name, K and scale ({reason})") from error
    right = index in range(1 << 63) and camera.shape == (3, 3)
    if not right or not np.isfinite([*camera.flat, scale]).all():
        raise ValueError("json: expected an index of at least 0 and finite K (3, 3) and scale")
    return {"index": index, "name": name, "K": camera, "scale": scale}


def _array(files: dict[str, bytes], part: str, shape: tuple[int, ...]) -> npt.NDArray[np.floating]:
    try:
        array = np.lib.format.read_array(io.BytesIO(files[part]), allow_pickle=False)
    except Exception as error:  # on a damaged header numpy passes on errors of its tokenizer
        raise ValueError(f"{part} is not an array ({error})") from error
    if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{part}: expected finite floats {shape}, got {array.dtype} {array.shape}")
    return array.astype(np.float32, copy=False)


def _index(path: Path) -> tuple[list[tuple[str, int, int]], bool, bool]:
    """Key, first byte and end of every complete image; whether the shard is complete and has masks."""
    length = path.stat().st_size
    found: list[tuple[str, int, int]] = []
    masks = False
    key, start, parts = "", 0, set[str]()
    with path.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if end > length:
                        return found, False, masks
                    name, _, part = member.name.partition(".")
                    if name != key:
                        key, start, parts = name, member.offset, set()
                    parts.add(part)
                    if parts >= _NEEDED:
                        if found and found[-1][1] == start:
                            found.pop()
                        found.append((key, start, end))
                        masks = masks or "mask.jpg" in parts
                # tarfile stops at a damaged header as it stops at the end.
                stream.seek(tar.offset)
        except tarfile.TarError:
            return found, False, masks
        rest = stream.read(_END.stop)
        return found, len(rest) in _END and not any(rest), masks
