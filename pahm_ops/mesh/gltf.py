"""Reading meshes from glTF 2.0 files, .glb and .gltf."""

import base64
import binascii
import json
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from pahm_ops.mesh.polygons import Polygons, polygons

_KINDS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC3": 3}
_TRIANGLES, _STRIP, _FAN = 4, 5, 6
# A small file can place a mesh any number of times. Without repeats each vertex or corner takes a byte.
_REPEATED = 10**7
# Extensions that store shapes where this reader does not look.
_ELSEWHERE = {
    "KHR_draco_mesh_compression",
    "EXT_meshopt_compression",
    "KHR_meshopt_compression",
    "EXT_mesh_gpu_instancing",
}


def read_gltf(data: bytes, folder: Path) -> Polygons:
    """The triangles of a file's default scene, node after node, each placed by its node.

    Primitives of one mesh that have the same positions share their vertices, as in the file. Points and lines
    are ignored, and skins and morph targets are not applied. A .gltf's buffers are relative to `folder`.
    """
    try:
        tree, binary = _chunks(data)
        return _Reader(tree, binary, folder, len(data)).scene()
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"its JSON is not that of glTF 2.0 ({reason:.80})") from None


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The JSON, and the binary part of a .glb."""
    if data[:4] != b"glTF":
        return json.loads(data.decode("utf-8-sig")), None
    if len(data) < 20 or struct.unpack_from("<2I", data, 4) != (2, len(data)):
        raise ValueError("its header is not that of version 2, or has another length than the file")
    parts, at = [], 12
    while at + 8 <= len(data):
        length, kind = struct.unpack_from("<I4s", data, at)
        if at + 8 + length > len(data):
            raise ValueError("it ends within a chunk")
        parts.append((kind, data[at + 8 : at + 8 + length]))
        at += 8 + length
    if not parts or parts[0][0] != b"JSON":
        raise ValueError("it has no JSON")
    binary = parts[1][1] if len(parts) > 1 and parts[1][0] == b"BIN\0" else None
    return json.loads(parts[0][1]), binary


def _entry(items: Any, index: Any, what: str) -> Any:
    if type(index) is not int or not isinstance(items, list) or not 0 <= index < len(items):
        raise ValueError(f"it refers to {what} {index!r:.60}, which it does not have")
    return items[index]


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} must be a whole number, got {value!r:.60}")
    return value


class _Reader:
    def __init__(self, tree: dict[str, Any], binary: bytes | None, folder: Path, size: int) -> None:
        if not str(tree["asset"]["version"]).startswith("2."):
            raise ValueError(f"only version 2 of glTF is read, got {tree['asset']['version']!r:.60}")
        if hidden := sorted(_ELSEWHERE & set(tree.get("extensionsRequired", []))):
            raise ValueError(f"it needs {', '.join(hidden)}, which is not read: export it without")
        self.tree, self.binary, self.folder, self.size = tree, binary, folder, size
        self.buffers: dict[int, bytes] = {}
        self.points: list[NDArray[np.float64]] = []
        self.faces: list[NDArray[np.int64]] = []
        self.count = self.corners = 0

    def scene(self) -> Polygons:
        nodes = self.tree.get("nodes", [])
        if "scenes" in self.tree:
            roots = _entry(self.tree["scenes"], self.tree.get("scene", 0), "scene").get("nodes", [])
        else:
            children = {child for node in nodes for child in node.get("children", [])}
            roots = [k for k in range(len(nodes)) if k not in children]
        seen: set[int] = set()
        waiting = [(root, np.eye(4)) for root in reversed(roots)]
        while waiting:
            index, outer = waiting.pop()
            node = _entry(nodes, index, "node")
            if index in seen:
                raise ValueError(f"node {index} has more than one parent")
            seen.add(index)
            placed = outer @ _placement(node)
            if "mesh" in node:
                self.add(_entry(self.tree.get("meshes"), node["mesh"], "mesh"), placed)
            waiting += [(child, placed) for child in reversed(node.get("children", []))]
        faces = np.concatenate(self.faces) if self.faces else np.zeros((0, 3), np.int64)
        points = np.concatenate(self.points) if self.points else np.zeros((0, 3))
        return polygons(points, np.full(len(faces), 3), faces)

    def add(self, mesh: dict[str, Any], placed: NDArray[np.float64]) -> None:
        starts: dict[int, tuple[int, int]] = {}  # for each accessor of positions: where its vertices are
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", _TRIANGLES)
            if mode not in (_TRIANGLES, _STRIP, _FAN):
                continue
            accessor = primitive["attributes"]["POSITION"]
            if accessor not in starts:
                points = self.values(accessor, "VEC3").astype(np.float64)
                starts[accessor] = self.count, len(points)
                self.points.append(points @ placed[:3, :3].T + placed[:3, 3])
                self.count += len(points)
            start, length = starts[accessor]
            if "indices" in primitive:
                corners = self.values(primitive["indices"], "SCALAR").reshape(-1).astype(np.int64)
            else:
                corners = np.arange(length)
            if (corners >= length).any() or (corners < 0).any():
                raise ValueError(f"a face refers to vertex {corners.max()} of {length}")
            faces = _split(corners, mode)
            flipped = np.linalg.det(placed[:3, :3]) < 0
            self.faces.append(start + (faces[:, ::-1] if flipped else faces))
            self.corners += len(corners)
            if self.count + self.corners > self.size + _REPEATED:
                raise ValueError(
                    f"its nodes repeat meshes: over {_REPEATED} vertices and corners of {self.size} bytes"
                )

    def values(self, index: Any, kind: str) -> NDArray:
        """The numbers of an accessor, (count, width)."""
        accessor = _entry(self.tree.get("accessors"), index, "accessor")
        if "sparse" in accessor or "bufferView" not in accessor:
            raise ValueError(f"accessor {index} is sparse or has no data of its own, which is not read")
        if accessor["type"] != kind:
            raise ValueError(f"accessor {index} must be of type {kind}, got {accessor['type']!r:.60}")
        view = _entry(self.tree.get("bufferViews"), accessor["bufferView"], "bufferView")
        number = np.dtype(_KINDS[accessor["componentType"]])
        width, count = _WIDTHS[kind], _whole(accessor["count"], "count")
        row = width * number.itemsize
        stride = _whole(view.get("byteStride", row), "byteStride")
        length = _whole(view["byteLength"], "byteLength")
        inner = _whole(accessor.get("byteOffset", 0), "byteOffset")
        start = _whole(view.get("byteOffset", 0), "byteOffset") + inner
        data = self.buffer(view["buffer"])
        needed = (count - 1) * stride + row if count else 0
        if stride < row or inner + needed > length or start + needed > len(data):
            raise ValueError(f"accessor {index} reaches beyond its data: {count!r:.30} of {row} bytes")
        block = np.frombuffer(data, np.uint8, needed, start)
        rows = np.lib.stride_tricks.as_strided(block, (count, row), (stride, 1)) if count else block
        values = np.ascontiguousarray(rows).view(number).reshape(count, width)
        if accessor.get("normalized", False) and number.kind != "f":
            return np.maximum(values / np.iinfo(number).max, -1.0)
        return values

    def buffer(self, index: Any) -> bytes:
        buffer = _entry(self.tree.get("buffers"), index, "buffer")
        if index not in self.buffers:
            self.buffers[index] = self._read(buffer, index)
        return self.buffers[index]

    def _read(self, buffer: dict[str, Any], index: int) -> bytes:
        length = _whole(buffer["byteLength"], "byteLength")
        uri = buffer.get("uri")
        if uri is None:
            if index or self.binary is None:
                raise ValueError(f"buffer {index} has no data")
            data = self.binary
        elif uri.startswith("data:"):
            try:
                data = base64.b64decode(uri.partition(";base64,")[2])
            except binascii.Error as error:
                raise ValueError(f"buffer {index} is not base64: {error}") from None
        else:
            path = self.folder / unquote(uri)
            try:
                if not path.is_file():  # Reading a pipe or a device might never end.
                    raise FileNotFoundError("no such file")
                with path.open("rb") as file:
                    data = file.read(length)
            except OSError as error:
                raise ValueError(f"its buffer {uri!r:.60} was not read: {error.strerror or error}") from None
            self.size += len(data)
        if len(data) < length:
            raise ValueError(f"buffer {index} must have {length!r:.30} bytes, got {len(data)}")
        return data


def _placement(node: dict[str, Any]) -> NDArray[np.float64]:
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = (float(number) for number in node.get("rotation", (0, 0, 0, 1)))
    out = np.eye(4)
    out[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    out[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), dtype=np.float64).reshape(3)
    out[:3, 3] = np.array(node.get("translation", (0, 0, 0)), dtype=np.float64).reshape(3)
    return out


def _split(corners: NDArray[np.int64], mode: int) -> NDArray[np.int64]:
    """The triangles (F, 3) of a list, strip or fan of corners."""
    if mode == _TRIANGLES:
        if len(corners) % 3:
            raise ValueError(f"a list of triangles must have three corners each, got {len(corners)} corners")
        return corners.reshape(-1, 3)
    if len(corners) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == _FAN:
        return np.stack([corners[1:-1], corners[2:], np.full(len(corners) - 2, corners[0])], axis=1)
    odd = np.arange(len(corners) - 2) % 2
    at = np.arange(len(corners) - 2)
    faces = np.stack([corners[at], corners[at + 1 + odd], corners[at + 2 - odd]], axis=1)
    # Triangles without area, which repeat a corner, join strips.
    return faces[(faces != faces[:, [1, 2, 0]]).all(axis=1)]
