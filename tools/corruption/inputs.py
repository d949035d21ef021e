"""Small valid inputs of every kind that the packages read, and how to read each.

runs.py has data sets and runs.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from kind import SHARED, Kind, finite, require
from PIL import Image
from runs import (
    make_cached,
    make_folder,
    make_run,
    make_shards,
    make_submission,
    make_table,
    make_weights,
    read_cached,
    read_last,
    read_report,
    read_shards,
    read_submission,
    read_table,
    read_weights,
    samples,
)

# Images: one is damaged, another in the same call is not.


def image(
    suffix: str, mode: str = "RGB", **options: Any
) -> tuple[Callable[[Path], None], Callable[[Path], Any]]:
    def make(folder: Path) -> None:
        picture = SHARED["picture"]
        if mode == "I;16":
            grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
            Image.fromarray(grey).save(folder / f"a.{suffix}", **options)
            return
        exif = Image.Exif()
        exif[0x112] = 3
        extra = {"exif": exif.tobytes()} if suffix in ("jpg", "png", "webp", "avif") else {}
        picture.convert(mode).save(folder / f"a.{suffix}", **extra, **options)

    def read(folder: Path) -> Any:
        path = folder / f"a.{suffix}"
        damaged, whole = SHARED["predictor"].attempt_many([path, SHARED["picture"]], batch_size=1)
        require(not isinstance(whole, Exception), f"the other image was lost: {whole!r}")
        require(
            bool(np.allclose(whole.vertices, SHARED["hand"], atol=1e-4)), "the other image has another hand"
        )
        if isinstance(damaged, Exception):
            raise damaged
        finite(damaged.vertices, below=1e3)
        return damaged.vertices.round(5)

    return make, read


def make_backgrounds(folder: Path) -> None:
    for i, suffix in enumerate(("jpg", "png", "webp")):
        SHARED["picture"].save(folder / f"{i}.{suffix}")


def read_backgrounds(folder: Path) -> Any:
    from pahm.synth.backgrounds import crop_background, list_images

    crops = [crop_background(np.random.default_rng(0), path, 64) for path in list_images(folder)]
    finite(*crops, below=10)
    return crops


# Pickles.


def mano(folder: Path) -> dict[str, Any]:
    from scipy.sparse import csc_matrix

    from pahm.hand import HandModel

    own = HandModel.load()
    return {
        "v_template": own.template.double().numpy(),
        "f": own.faces.numpy().astype(np.uint32),
        "weights": own.skinning_weights.double().numpy(),
        "shapedirs": own.shape_basis.double().numpy(),
        "posedirs": np.zeros((778, 3, 135), np.float32),
        "J_regressor": csc_matrix(own.bone_regressor.double().numpy()),
        "kintree_table": np.array([own.parents, range(16)]),
    }


def make_mano(folder: Path) -> None:
    (folder / "MANO_RIGHT.pkl").write_bytes(pickle.dumps(mano(folder), protocol=2))


def read_mano(folder: Path) -> Any:
    from pahm.hand import HandModel

    hand = HandModel.from_mano(folder / "MANO_RIGHT.pkl")
    return check_hand(hand)


def check_hand(hand: Any) -> Any:
    vertices, joints = hand(torch.zeros(1, 16, 3), torch.zeros(1, 10))
    finite(vertices, joints, below=10)
    require(hand.faces.min() >= 0 and hand.faces.max() < 778, "faces out of range")
    return [vertices, joints, hand.faces]


def make_transforms(folder: Path) -> None:
    import trimesh

    from pahm_ops.mesh import MeshHierarchy

    sphere = trimesh.creation.icosphere(2)
    levels = MeshHierarchy.build(sphere.vertices, sphere.faces, sizes=(162, 80, 40))
    content = {
        "vertices": list(levels.vertices),
        "face": list(levels.faces),
        "adj": [None, None],
        "down_transform": [m.tocoo() for m in levels.down],
        "up_transform": [m.tocsc() for m in levels.up],
    }
    (folder / "transform.pkl").write_bytes(pickle.dumps(content, protocol=4))


def read_transforms(folder: Path) -> Any:
    from pahm_ops import MeshPool
    from pahm_ops.mesh import load_transforms, spiral_indices

    read = load_transforms(folder / "transform.pkl")
    out = [MeshPool(m)(torch.ones(1, m.shape[1], 2)) for m in (*read.down, *read.up)]
    finite(*read.vertices, *out, below=float("inf"))
    return [read.vertices, read.faces, out, [spiral_indices(faces, 5) for faces in read.faces]]


def make_npz(folder: Path) -> None:
    from importlib import resources

    (folder / "hand.npz").write_bytes((resources.files("pahm") / "assets" / "hand.npz").read_bytes())


def read_npz(folder: Path) -> Any:
    from pahm.hand import HandModel

    return check_hand(HandModel.load(folder / "hand.npz"))


# Meshes.


def mesh(suffix: str, **options: Any) -> tuple[Callable[[Path], None], Callable[[Path], Any]]:
    def make(folder: Path) -> None:
        import trimesh

        sphere = trimesh.creation.icosphere(1)
        content = sphere.export(file_type=suffix, **options)
        data = content.encode() if isinstance(content, str) else content
        (folder / f"mesh.{suffix}").write_bytes(data)

    def read(folder: Path) -> Any:
        from pahm_ops.mesh import load_mesh, spiral_indices

        vertices, faces = load_mesh(folder / f"mesh.{suffix}")
        finite(vertices, below=float("inf"))
        require(faces.min() >= 0 and faces.max() < len(vertices), "faces out of range")
        return [vertices, faces, spiral_indices(faces, 4) if len(vertices) < 10000 else None]

    return make, read


# Matrices that a program passes in, with numbers that must not be trusted.


def make_matrix(folder: Path) -> None:
    (folder / "seed").write_text("0")


def change_seed(path: Path, random: Random) -> tuple[str, bytes]:
    return "hostile", str(random.randrange(1, 1 << 40)).encode()


def read_matrix(folder: Path) -> Any:
    import scipy.sparse as sparse

    from pahm_ops import mesh_pool

    random = Random(seed := int((folder / "seed").read_text()))
    make = random.choice(
        ("csr_matrix", "csc_matrix", "coo_matrix", "bsr_matrix", "dia_matrix", "lil_matrix", "torch")
    )
    matrix: Any = None if make == "torch" else sparse.eye(12, format=make[:3], dtype=np.float64)
    if make == "torch":
        columns = torch.arange(12)
        pointers = torch.arange(13)
        if seed:
            target = random.choice((columns, pointers))
            target[random.randrange(12)] = random.choice((-1, 12, 1 << 40, -(1 << 62)))
        matrix = torch.sparse_csr_tensor(pointers, columns, torch.ones(12), (12, 12), check_invariants=False)
    elif seed:
        names = [
            n for n in ("indices", "indptr", "row", "col", "data", "offsets", "rows") if hasattr(matrix, n)
        ]
        name = random.choice(names)
        array = getattr(matrix, name).copy()
        hostile = random.choice((-1, 12, 1 << 30, -(1 << 30)))
        if name == "rows":
            array[random.randrange(12)] = [hostile]
        elif random.random() < 0.3:
            array = array[: random.randrange(len(array))]
        elif random.random() < 0.2:
            array = array.astype(random.choice((np.float32, np.complex64, object)))
        else:
            array.reshape(-1)[random.randrange(array.size)] = hostile
        setattr(matrix, "coords" if name in ("row", "col") and random.random() < 0.2 else name, array)
    out = mesh_pool(torch.ones(1, 12, 3), matrix)
    require(tuple(out.shape) == (1, 12, 3), f"a result of shape {tuple(out.shape)}")
    finite(out, below=float("inf"))
    return out


# Files that accompany an image, and files that configure a network.


def make_intrinsics(folder: Path) -> None:
    K = [[480.0, 0.0, 112.0], [0.0, 480.0, 112.0], [0.0, 0.0, 1.0]]
    (folder / "K.json").write_text(json.dumps({"K": K}))


def read_intrinsics(folder: Path) -> Any:
    from pahm.data.camera import read_intrinsics

    K = read_intrinsics(next(folder.glob("K.*")))
    (attempt,) = SHARED["predictor"].attempt_many([SHARED["picture"]], intrinsics=K)
    if isinstance(attempt, Exception):
        raise attempt
    finite(K, attempt.vertices)
    require(
        attempt.vertices[:, 2].min() > 0 and attempt.vertices[:, 2].max() < 1000,
        "a hand at an absurd distance",
    )
    return K


def make_npy_intrinsics(folder: Path) -> None:
    np.save(folder / "K.npy", np.array([[480.0, 0, 112], [0, 480, 112], [0, 0, 1]]))


def make_yaml(folder: Path) -> None:
    from importlib import resources

    (folder / "own.yaml").write_bytes((resources.files("pahm") / "configs" / "tiny.yaml").read_bytes())


def read_yaml(folder: Path) -> Any:
    from pahm.config import from_file
    from pahm.model import build_network

    config = from_file(folder / "own.yaml")
    config = config.override({"model.pretrained": False, "model.backbone_weights": None})
    build_network(config)
    return config.to_json()


def kinds() -> Iterable[Kind]:
    for name, suffix, weight, mode, options in (
        ("jpeg", "jpg", 60, "RGB", {}),
        ("png", "png", 60, "RGB", {}),
        ("png of 16 bits", "png", 30, "I;16", {}),
        ("palette gif", "gif", 30, "P", {}),
        ("webp", "webp", 40, "RGB", {}),
        ("avif", "avif", 60, "RGB", {}),
        ("tiff", "tif", 60, "RGB", {}),
        ("tiff, packed", "tiff", 40, "RGB", {"compression": "tiff_lzw"}),
        ("bmp", "bmp", 30, "RGB", {}),
        ("dds", "dds", 40, "RGB", {}),
        ("pgm", "pgm", 30, "L", {}),
        ("tga", "tga", 20, "RGB", {}),
        ("jpeg 2000", "jp2", 20, "RGB", {}),
    ):
        yield Kind(f"image: {name}", weight, *image(suffix, mode, **options))
    yield Kind("backgrounds", 60, make_backgrounds, read_backgrounds)
    yield Kind("mano", 250, make_mano, read_mano)
    yield Kind("transforms", 250, make_transforms, read_transforms)
    yield Kind("hand npz", 100, make_npz, read_npz)
    yield Kind("matrix in memory", 200, make_matrix, read_matrix, damage=change_seed)
    for suffix, text, options in (
        ("obj", True, {}),
        ("off", True, {}),
        ("ply", False, {}),
        ("stl", False, {}),
        ("glb", False, {}),
    ):
        yield Kind(f"mesh: {suffix}", 60, *mesh(suffix, **options), text=text)
    yield Kind("mesh: ply, text", 60, *mesh("ply", encoding="ascii"), text=True)
    yield Kind("intrinsics json", 60, make_intrinsics, read_intrinsics, text=True)
    yield Kind("intrinsics npy", 60, make_npy_intrinsics, read_intrinsics)
    yield Kind("configuration", 100, make_yaml, read_yaml, text=True)
    yield Kind("annotations", 100, make_folder, samples, pattern="*.json", text=True)
    yield Kind("images of a folder", 60, make_folder, samples, pattern="*.jpg")
    yield Kind("annotation cache", 120, make_cached, read_cached, pattern="*.npy", exact=True)
    yield Kind("shards", 150, make_shards, read_shards, pattern="*.tar")
    yield Kind("shards' manifest", 60, make_shards, read_shards, pattern="*.json", text=True)
    yield Kind("weights", 150, make_weights, read_weights, exact=True)
    yield Kind("last.ckpt", 150, make_run, read_last, pattern="last.ckpt", exact=True)
    yield Kind("run.json", 40, make_run, read_report, pattern="*.json", text=True)
    yield Kind("event file", 40, make_run, read_report, pattern="events*")
    yield Kind("submission", 80, make_submission, read_submission, pattern="pred.json", text=True)
    yield Kind("table's records", 60, make_table, read_table, pattern="*.json", text=True)


KINDS = tuple(kinds())
