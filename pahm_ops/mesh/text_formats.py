"""Reading meshes from OBJ, OFF and STL files.

Files are read as bytes: keywords and numbers are ASCII; names and comments, in any encoding, are skipped.
"""

import codecs
from array import array
from collections.abc import Iterator

import numpy as np

from pahm_ops.mesh.polygons import Polygons, polygons, shown

# OBJ statements whose shapes are not polygons, and `call`, which includes another file.
_NOT_POLYGONS = {b"curv", b"curv2", b"surf", b"bzp", b"bsp", b"cdc", b"cdp", b"res", b"call"}
_STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


def read_obj(data: bytes) -> Polygons:
    """The `v` and `f` statements of a Wavefront OBJ file.

    Vertices are shared over the whole file, as the format defines: objects, groups, materials, texture
    coordinates and normals do not split them. Lines, points, weights and colours are ignored.
    """
    coordinates, sides, corners = array("d"), array("q"), array("q")
    vertices = 0
    for number, line in _statements(data.removeprefix(codecs.BOM_UTF8)):
        words = line.split()
        if not words:
            continue
        keyword = words[0]
        try:
            if keyword == b"v":
                x, y, z = words[1:4]
                coordinates.extend((float(x), float(y), float(z)))
                vertices += 1
            elif keyword in (b"f", b"fo"):
                for word in words[1:]:
                    index = int(word.partition(b"/")[0])
                    corners.append(index - 1 if index > 0 else vertices + index)
                    if index == 0 or corners[-1] < 0:
                        raise ValueError
                sides.append(len(words) - 1)
        except (ValueError, OverflowError):
            expected = "three numbers after v" if keyword == b"v" else "vertices that exist, counted from 1"
            raise ValueError(f"line {number} must name {expected}, got {shown(line)}") from None
        if keyword in _NOT_POLYGONS:
            raise ValueError(f"line {number} is {shown(line)}, and only polygons are read")
    return polygons(coordinates, sides, corners)


def _statements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines without comments, numbered from 1; a line that ends in a backslash continues on the next."""
    lines = enumerate(data.splitlines(), 1)
    for number, line in lines:
        parts = [line]
        while parts[-1].endswith(b"\\") and b"#" not in parts[-1]:
            parts[-1] = parts[-1][:-1]
            parts.append(next(lines, (0, b""))[1])
        yield number, b" ".join(parts).partition(b"#")[0]


def read_off(data: bytes) -> Polygons:
    """The mesh in an OFF file; normals, colours and texture coordinates are ignored."""
    rows = (row for line in data.splitlines() if (row := line.partition(b"#")[0].split()))
    header = next(rows, [b""])
    prefix = header[0].removesuffix(b"OFF")
    if prefix == header[0] or not set(prefix) <= set(b"STCN4n"):
        raise ValueError(f"it must start with OFF, got {shown(header[0])}")
    if set(prefix) & set(b"4n") or header[1:2] == [b"BINARY"]:
        raise ValueError(f"only text of three coordinates a vertex is read, got {shown(b' '.join(header))}")
    counts = header[1:] or next(rows, [])
    coordinates, sides, corners = array("d"), array("q"), array("q")
    row = counts
    try:
        vertices, faces = (int(count) for count in counts[:2])
        if not (0 <= vertices <= len(data) and 0 <= faces <= len(data)):
            raise ValueError
        for _ in range(vertices):
            row = next(rows)
            x, y, z = row[:3]
            coordinates.extend((float(x), float(y), float(z)))
        for _ in range(faces):
            row = next(rows)
            side = int(row[0])
            indices = [int(word) for word in row[1 : side + 1]]
            if side < 0 or len(indices) != side:
                raise ValueError
            sides.append(side)
            corners.extend(indices)
    except StopIteration:
        raise ValueError(
            f"it ends before its {vertices} vertices and {faces} faces, after {len(coordinates) // 3} and "
            f"{len(sides)}"
        ) from None
    except (ValueError, OverflowError):
        raise ValueError(
            f"an OFF file of {len(data)} bytes cannot have the line {shown(b' '.join(row))}"
        ) from None
    if row := next(rows, []):
        raise ValueError(f"after its {vertices} vertices and {faces} faces comes {shown(b' '.join(row))}")
    return polygons(coordinates, sides, corners)


def read_stl(data: bytes) -> Polygons:
    """The mesh in an STL file, binary or text; no two triangles share a vertex."""
    count = int.from_bytes(data[80:84], "little")
    size = 84 + count * _STL_TRIANGLE.itemsize
    if len(data) >= 84 and len(data) == size:
        coordinates = np.frombuffer(data, _STL_TRIANGLE, offset=84)["corners"].reshape(-1, 3)
        return _separate(coordinates)
    if data[:512].lstrip()[:5].lower() == b"solid" and b"\0" not in data[:512]:
        return _separate(np.asarray(_stl_text(data)).reshape(-1, 3))
    if len(data) < 84:
        raise ValueError(f"its {len(data)} bytes are no STL file")
    raise ValueError(f"it is no text, and has {len(data)} bytes where its {count} triangles need {size}")


def _separate(coordinates: np.ndarray) -> Polygons:
    count = len(coordinates) // 3
    return polygons(coordinates, np.full(count, 3), np.arange(3 * count))


def _stl_text(data: bytes) -> "array[float]":
    coordinates, complete, ended = array("d"), 0, False
    for number, line in enumerate(data.splitlines(), 1):
        words = line.split()
        keyword = words[0].lower() if words else b""
        if keyword == b"vertex":
            try:
                x, y, z = (float(word) for word in words[1:])
            except ValueError:
                raise ValueError(
                    f"line {number} must have three numbers after vertex, got {shown(line)}"
                ) from None
            coordinates.extend((x, y, z))
        elif keyword == b"endfacet":
            complete += 9
            if len(coordinates) != complete:
                raise ValueError(f"the facet that ends in line {number} must have three vertices")
        elif keyword in (b"solid", b"endsolid"):
            ended = keyword == b"endsolid"
    if not ended or len(coordinates) != complete:
        raise ValueError(f"its text breaks off after {complete // 9} triangles")
    return coordinates
