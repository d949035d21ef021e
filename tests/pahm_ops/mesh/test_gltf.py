"""glTF and GLB files: order, sharing and placement as in the file, and what is refused."""

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from pahm_ops.mesh import load_mesh

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float32)
CODES = {"<i1": 5120, "<u1": 5121, "<i2": 5122, "<u2": 5123, "<u4": 5125, "<f4": 5126}


class File:
    """Builds a file: arrays become accessors of one buffer, in a scene of given nodes."""

    def __init__(self) -> None:
        self.data = b""
        self.tree: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "Khronos glTF Blender I/O v4.2"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [],
            "accessors": [],
            "bufferViews": [],
        }

    def array(self, values: Any, kind: str, stride: int = 0, **more: Any) -> int:
        rows = np.asarray(values).astype(kind)
        flat = [row.tobytes().ljust(stride, b"\xaa") for row in (rows if stride else rows[None])]
        self.tree["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(b"".join(flat))}
        )
        if stride:
            self.tree["bufferViews"][-1]["byteStride"] = stride
        self.data += b"".join(flat) + b"\0" * (-sum(map(len, flat)) % 4)
        self.tree["accessors"].append(
            {
                "bufferView": len(self.tree["bufferViews"]) - 1,
                "componentType": CODES[kind],
                "count": len(rows),
                "type": "VEC3" if rows.ndim == 2 else "SCALAR",
                **more,
            }
        )
        return len(self.tree["accessors"]) - 1

    def mesh(self, *primitives: "tuple[int, int | None, int | None]") -> int:
        self.tree["meshes"].append({"primitives": []})
        for positions, indices, mode in primitives:
            made: dict[str, Any] = {"attributes": {"POSITION": positions}}
            made |= {} if indices is None else {"indices": indices}
            made |= {} if mode is None else {"mode": mode}
            self.tree["meshes"][-1]["primitives"].append(made)
        return len(self.tree["meshes"]) - 1

    def square(self) -> "File":
        self.mesh((self.array(SQUARE, "<f4"), self.array([0, 1, 2, 0, 2, 3], "<u2"), None))
        return self

    def glb(self) -> bytes:
        self.tree["buffers"] = [{"byteLength": len(self.data)}]
        text = json.dumps(self.tree).encode()
        text += b" " * (-len(text) % 4)
        size = 12 + 8 + len(text) + 8 + len(self.data)
        head = struct.pack("<4sII", b"glTF", 2, size) + struct.pack("<I4s", len(text), b"JSON")
        return head + text + struct.pack("<I4s", len(self.data), b"BIN\0") + self.data

    def gltf(self, uri: str) -> bytes:
        self.tree["buffers"] = [{"byteLength": len(self.data), "uri": uri}]
        return b"\xef\xbb\xbf" + json.dumps(self.tree).encode()


def load(tmp_path, data: bytes, name: str = "mesh.glb") -> tuple[NDArray[np.float64], list[list[int]]]:
    (tmp_path / name).write_bytes(data)
    vertices, faces = load_mesh(tmp_path / name)
    return vertices, faces.tolist()


def test_nodes_come_in_the_order_of_the_file(tmp_path):
    file = File().square()
    file.mesh((file.array(SQUARE[:3] * 10, "<f4"), None, None))
    file.tree["scenes"] = [{"nodes": []}, {"nodes": [2, 0]}]
    file.tree["scene"] = 1
    file.tree["nodes"] = [
        {"mesh": 0, "translation": [0, 0, 5], "children": [1, 3]},
        {"mesh": 1, "scale": [2, 2, 2]},
        {"mesh": 1, "name": "first"},
        {"mesh": 0, "rotation": [0, 0, 2**-0.5, 2**-0.5]},
    ]
    vertices, faces = load(tmp_path, file.glb())
    turned = SQUARE[:, [1, 0, 2]] * [-1, 1, 1] + [0, 0, 5]
    up = np.array([0, 0, 5])
    blocks = [SQUARE[:3] * 10, SQUARE + up, SQUARE[:3] * 20 + up, turned]
    assert np.abs(vertices - np.concatenate(blocks)).max() < 1e-12
    assert faces == [[0, 1, 2], [3, 4, 5], [3, 5, 6], [7, 8, 9], [10, 11, 12], [10, 12, 13]]


def test_trimesh_exports_keep_their_order(tmp_path):
    scene = trimesh.Scene()
    for k in range(3):
        move = trimesh.transformations.translation_matrix([k, 0, 0])
        scene.add_geometry(trimesh.creation.icosphere(k), transform=move, geom_name=f"ball{2 - k}")
    scene.export(tmp_path / "scene.glb")
    vertices, faces = load_mesh(tmp_path / "scene.glb")
    expected = [trimesh.creation.icosphere(k) for k in range(3)]
    placed = [m.vertices + np.array([k, 0, 0]) for k, m in enumerate(expected)]
    assert np.abs(vertices - np.concatenate(placed)).max() < 1e-6
    starts = np.cumsum([0, *(len(m.vertices) for m in expected)])
    assert np.array_equal(
        faces, np.concatenate([m.faces + s for m, s in zip(expected, starts, strict=False)])
    )


def test_primitives_of_one_list_of_vertices_share_it(tmp_path):
    file = File()
    points = file.array(SQUARE, "<f4")
    file.mesh((points, file.array([0, 1, 2], "<u1"), 4), (points, file.array([0, 2, 3], "<u4"), 4))
    vertices, faces = load(tmp_path, file.glb())
    assert np.array_equal(vertices, SQUARE)
    assert faces == [[0, 1, 2], [0, 2, 3]]


def test_strips_fans_and_what_is_no_surface(tmp_path):
    file = File()
    points = file.array(SQUARE, "<f4")
    strip, fan = file.array([0, 1, 3, 2, 2, 1, 1, 3], "<u2"), file.array([0, 1, 2, 3], "<u2")
    file.mesh((points, strip, 5), (points, fan, 6), (points, fan, 1), (points, None, 0))
    vertices, faces = load(tmp_path, file.glb())
    assert np.array_equal(vertices, SQUARE)
    assert faces == [[0, 1, 3], [1, 2, 3], [1, 2, 0], [2, 3, 0]]


def test_a_mirroring_node_keeps_the_outside_out(tmp_path):
    file = File().square()
    file.tree["nodes"] = [{"mesh": 0, "matrix": [-1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 7, 0, 0, 1]}]
    vertices, faces = load(tmp_path, file.glb())
    assert np.array_equal(vertices, SQUARE * [-1, 1, 1] + [7, 0, 0])
    assert faces == [[2, 1, 0], [3, 2, 0]]


def test_interleaved_and_quantised_positions(tmp_path):
    file = File()
    quantised = file.array(SQUARE * 127, "<i1", stride=4, normalized=True)
    file.mesh((file.array(SQUARE, "<f4", stride=32), None, 6), (quantised, None, 6))
    vertices, _ = load(tmp_path, file.glb())
    assert np.array_equal(vertices, np.concatenate([SQUARE, SQUARE]))


def test_buffers_beside_and_within_a_gltf(tmp_path):
    file = File().square()
    (tmp_path / "my häand.bin").write_bytes(file.data + b"more")
    beside = load(tmp_path, file.gltf("my%20h%C3%A4and.bin"), "mesh.gltf")
    within = "data:application/octet-stream;base64," + base64.b64encode(file.data).decode()
    for vertices, faces in (beside, load(tmp_path, file.gltf(within), "mesh.gltf")):
        assert np.array_equal(vertices, SQUARE)
        assert faces == [[0, 1, 2], [0, 2, 3]]


def changed(**changes: Any) -> bytes:
    file = File().square()
    for path, value in changes.items():
        *outer, last = path.split("__")
        at: Any = file.tree
        for key in outer:
            at = at[int(key) if key.isdigit() else key]
        at[int(last) if last.isdigit() else last] = value
    return file.glb()


GOOD = changed()
BAD = {
    "version 1": (changed(asset__version="1.0"), "only version 2 of glTF is read, got '1.0'"),
    "no asset": (changed(asset=[]), "its JSON is not that of glTF 2.0"),
    "compressed": (
        changed(extensionsRequired=["KHR_draco_mesh_compression"]),
        "it needs KHR_draco_mesh_compression",
    ),
    "no data": (
        changed(accessors__0={"count": 4, "type": "VEC3", "componentType": 5126}),
        "has no data of its own",
    ),
    "sparse": (changed(accessors__0__sparse={}), "accessor 0 is sparse"),
    "claims": (
        changed(accessors__0__count=10**12),
        "accessor 0 reaches beyond its data: 1000000000000 of 12 bytes",
    ),
    "negative count": (changed(accessors__0__count=-4), "count must be a whole number, got -4"),
    "negative offset": (changed(bufferViews__0__byteOffset=-4), "byteOffset must be a whole number, got -4"),
    "overlap": (changed(bufferViews__0__byteStride=1), "accessor 0 reaches beyond its data"),
    "negative reference": (changed(nodes__0__mesh=-1), "it refers to mesh -1, which it does not have"),
    "a name as reference": (
        changed(nodes__0__mesh="Cube"),
        "it refers to mesh 'Cube', which it does not have",
    ),
    "kind": (changed(accessors__1__type="VEC3"), "accessor 1 must be of type SCALAR, got 'VEC3'"),
    "component": (changed(accessors__1__componentType=5130), "its JSON is not that of glTF 2.0 .KeyError"),
    "corner": (changed(accessors__0__count=3), "a face refers to vertex 3 of 3"),
    "corners": (changed(accessors__1__count=5), "three corners each, got 5 corners"),
    "cycle": (changed(nodes__0__children=[0]), "node 0 has more than one parent"),
    "elsewhere": (changed(bufferViews__0__buffer=1), "it refers to buffer 1, which it does not have"),
    "not finite": (
        changed(nodes__0__translation=[0, 0, float("nan")]),
        "vertices must be finite, got .* at vertex 0",
    ),
    "no meshes": (changed(scenes__0__nodes=[]), "must hold triangles, got none"),
    "cut": (GOOD[:-4], "has another length than the file"),
    "chunk": (GOOD[:8] + struct.pack("<I", len(GOOD) - 4) + GOOD[12:-4], "it ends within a chunk"),
    "head": (GOOD[:12], "its header is not that of version 2"),
    "junk": (b"\xff\xfe\x00junk", "can't decode byte|Expecting value"),
    "nested": (b"[" * 100_000, "its JSON is not that of glTF 2.0 .RecursionError|Expecting value|too deep"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_one_reason(tmp_path, name):
    data, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, data)
    assert "mesh.glb" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mesh_placed_without_end_is_refused(tmp_path, monkeypatch):
    many = changed(nodes=[{"mesh": 0}] * 900, scenes__0__nodes=[*range(900)])
    assert len(load(tmp_path, many)[0]) == 3600
    monkeypatch.setattr("pahm_ops.mesh.gltf._REPEATED", 5000 - len(many))
    with pytest.raises(ValueError, match="its nodes repeat meshes: over"):
        load(tmp_path, many)


@pytest.mark.parametrize(
    "uri", ["missing.bin", "x" * 400, "a\0b", "/dev/zero", "data:;base64,AAA", "data:,abc", "."]
)
def test_a_buffer_that_is_not_there_is_named(tmp_path, uri):
    with pytest.raises(ValueError, match=r"mesh.gltf: (its )?buffer|null byte") as caught:
        load(tmp_path, File().square().gltf(uri), "mesh.gltf")
    assert len(str(caught.value)) < 200 + len(str(tmp_path))
