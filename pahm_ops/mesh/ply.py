"""Reading meshes from PLY files, text or binary."""

import struct
from array import array
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pahm_ops.mesh.polygons import Polygons, polygons, shown

# The codes of `struct`, which numpy uses too.
_TYPES = {
    **{"char": "b", "short": "h", "int": "i", "uchar": "B", "ushort": "H", "uint": "I"},
    **{"int8": "b", "int16": "h", "int32": "i", "int64": "q", "float": "f", "double": "d"},
    **{"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "float32": "f", "float64": "d"},
}
_AXES = ("x", "y", "z")
_CORNERS = ("vertex_indices", "vertex_index")


class _Property(NamedTuple):
    name: str
    kind: str
    length: str  # the type of a list's length; empty for a single value

    @property
    def is_axis(self) -> bool:
        return not self.length and self.name in _AXES

    @property
    def is_corners(self) -> bool:
        return bool(self.length) and self.name in _CORNERS


class _Element(NamedTuple):
    name: str
    rows: int
    properties: list[_Property]


class _Rows(NamedTuple):
    """The parts of an element's rows that a mesh needs."""

    axes: dict[str, NDArray[np.float64]]
    lengths: NDArray[np.int64]  # of each row's list of corners
    corners: NDArray[np.int64]


def read_ply(data: bytes) -> Polygons:
    """The elements `vertex` (x, y, z) and `face` (vertex_indices); all others are skipped."""
    encoding, elements, start = _header(data)
    body = (
        _Text(data[start:])
        if encoding == "ascii"
        else _Binary(data, start, ">" if "big" in encoding else "<")
    )
    rows = {}
    for element in elements:
        rows[element.name] = body.read(element) if element.properties else _rows({}, (), ())
    if rest := body.rest():
        raise ValueError(f"after what its header counts comes {shown(rest)}")
    if "vertex" not in rows or len(rows["vertex"].axes) < 3:
        raise ValueError("it has no element vertex with the properties x, y and z")
    if "face" not in rows and "tristrips" in rows:
        raise ValueError("its faces are triangle strips, and only lists of vertex_indices are read")
    coordinates = np.stack([rows["vertex"].axes[axis] for axis in _AXES], axis=1)
    faces = rows.get("face", _rows({}, (), ()))
    return polygons(coordinates, faces.lengths, faces.corners)


def _header(data: bytes) -> tuple[str, list[_Element], int]:
    """The encoding, the elements, and where their rows begin."""
    if data[:3] != b"ply" or data[3:4] not in (b"\r", b"\n"):
        raise ValueError(f"it must start with the line ply, got {shown(data[:60])}")
    newline = b"\r\n" if data[3:5] == b"\r\n" else data[3:4]
    last = newline + b"end_header" + newline
    end = data.find(last)
    if end < 0:
        raise ValueError("its header has no end_header")
    encoding = ""
    elements: list[_Element] = []
    for line in data[:end].split(newline)[1:]:
        try:
            match line.decode("latin-1").split():
                case [] | ["comment" | "obj_info", *_]:
                    pass
                case ["format", "ascii" | "binary_little_endian" | "binary_big_endian" as name, "1.0"]:
                    encoding = name
                case ["element", name, count] if name not in [element.name for element in elements]:
                    if not 0 <= int(count) <= len(data):
                        raise ValueError
                    elements.append(_Element(name, int(count), []))
                case ["property", "list", length, kind, name]:
                    _add(elements[-1], _Property(name, _TYPES[kind], _TYPES[length]))
                case ["property", kind, name]:
                    _add(elements[-1], _Property(name, _TYPES[kind], ""))
                case _:
                    raise ValueError
        except (ValueError, KeyError, IndexError):
            raise ValueError(f"its header cannot have the line {shown(line)} in {len(data)} bytes") from None
    if not encoding:
        raise ValueError("its header names no format")
    return encoding, elements, end + len(last)


def _add(element: _Element, new: _Property) -> None:
    twice = any(p.name == new.name or (p.is_corners and new.is_corners) for p in element.properties)
    if twice or new.length in ("f", "d") or (new.is_corners and new.kind in ("f", "d")):
        raise ValueError
    element.properties.append(new)


def _rows(axes: Mapping[str, ArrayLike], lengths: ArrayLike, corners: ArrayLike) -> _Rows:
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in axes.items()}
    return _Rows(columns, np.asarray(lengths, dtype=np.int64), np.asarray(corners, dtype=np.int64))


def _too_short(element: _Element) -> ValueError:
    return ValueError(f"it ends before its {element.rows} of {element.name}")


class _Text:
    """Numbers separated by white space; line breaks have no meaning."""

    def __init__(self, data: bytes) -> None:
        self.words = iter(data.split())

    def rest(self) -> bytes:
        return b" ".join(islice(self.words, 9))

    def read(self, element: _Element) -> _Rows:
        axes = {p.name: array("d") for p in element.properties if p.is_axis}
        lengths, corners, word = array("q"), array("q"), b""
        try:
            for _ in range(element.rows):
                for prop in element.properties:
                    word = next(self.words)
                    if not prop.length:
                        number = float(word)
                        if prop.is_axis:
                            axes[prop.name].append(number)
                        continue
                    length = int(word)
                    entries = [next(self.words) for _ in range(length)]
                    if prop.is_corners:
                        lengths.append(length)
                        for word in entries:
                            corners.append(int(word))
        except StopIteration:
            raise _too_short(element) from None
        except (ValueError, OverflowError):
            raise ValueError(
                f"it has {shown(word)} where {prop.name} of a {element.name} should be"
            ) from None
        return _rows(axes, lengths, corners)


class _Binary:
    """Consecutive numbers of the types that the header names."""

    def __init__(self, data: bytes, start: int, order: str) -> None:
        self.data, self.at, self.order = data, start, order

    def rest(self) -> bytes:
        return self.data[self.at :].strip()

    def read(self, element: _Element) -> _Rows:
        found = self._alike(element) if element.rows else None
        return self._one_by_one(element, element.rows)[0] if found is None else found

    def _alike(self, element: _Element) -> _Rows | None:
        """All rows at once if their lists are as long as those of the first row; None otherwise."""
        start = self.at
        _, lengths = self._one_by_one(element, 1)
        self.at = start
        fields = []
        for k, (prop, length) in enumerate(zip(element.properties, lengths, strict=True)):
            if prop.length:
                fields.append((f"length {k}", self.order + prop.length, (1,)))
            fields.append((f"values {k}", self.order + prop.kind, (length,)))
        row = np.dtype(fields)
        end = start + element.rows * row.itemsize
        if end > len(self.data):
            return None
        rows = np.frombuffer(self.data, row, element.rows, start)
        axes, sides, corners = {}, np.zeros(0), np.zeros(0)
        for k, (prop, length) in enumerate(zip(element.properties, lengths, strict=True)):
            if prop.length and not (rows[f"length {k}"] == length).all():
                return None
            if prop.is_axis:
                axes[prop.name] = rows[f"values {k}"].reshape(-1)
            elif prop.is_corners:
                sides, corners = np.full(element.rows, length), rows[f"values {k}"].reshape(-1)
        self.at = end
        return _rows(axes, sides, corners)

    def _one_by_one(self, element: _Element, count: int) -> tuple[_Rows, list[int]]:
        """The next rows, with lists of any length, and the value count of each property of the last row."""
        axes = {p.name: array("d") for p in element.properties if p.is_axis}
        sides, corners = array("q"), array("q")
        numbers: list[int] = []
        try:
            for _ in range(count):
                numbers = []
                for prop in element.properties:
                    number = self._take(1, prop.length)[0] if prop.length else 1
                    values = self._take(number, prop.kind)
                    numbers.append(number)
                    if prop.is_axis:
                        axes[prop.name].append(values[0])
                    elif prop.is_corners:
                        sides.append(number)
                        corners.extend(values)
        except (struct.error, OverflowError):
            raise _too_short(element) from None
        return _rows(axes, sides, corners), numbers

    def _take(self, number: int, kind: str) -> tuple:
        layout = f"{self.order}{number}{kind}"
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values
