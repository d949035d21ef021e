"""Mutated pickles end as a sentence or as arrays of the right shapes."""

import pickle
import sys
import types

import numpy as np
import pytest
import scipy.sparse as sp
import trimesh

from pahm.hand import HandModel
from pahm_ops.mesh import load_transforms
from pahm_ops.mesh.pickles import load_arrays, to_array

FORMS = ("csr", "csc", "coo", "dia", "lil", "dok", "bsr")
CHUMPY = {"chumpy.ch": "Ch", "chumpy.reordering": "Select"}


def transforms() -> dict[str, object]:
    rng = np.random.default_rng(0)
    mesh = trimesh.creation.icosphere(1)
    levels = [sp.random(42, 20, 0.1, form, random_state=1) for form in ("csr", "coo")]
    objects = np.empty(2, dtype=object)
    objects[:] = [rng.normal(size=(42, 3)), np.asfortranarray(rng.normal(size=(20, 3)).astype(">f4"))]
    return {
        "vertices": objects,
        "face": [np.array(mesh.faces), rng.integers(0, 20, (9, 3)).tolist()],
        "down_transform": [levels[0].T],
        "up_transform": [levels[1]],
    }


def matrices() -> dict[str, object]:
    return {form: sp.random(9, 6, 0.4, form, random_state=2) for form in FORMS}


def mano() -> dict[str, object]:
    """MANO's layout, its shape blend shapes a chumpy selection; the largest arrays hold zeros."""
    hand = HandModel.load()
    kinds = {name: type(name, (), {"__module__": module}) for module, name in CHUMPY.items()}
    whole, part = kinds["Ch"](), kinds["Select"]()
    whole.x, whole._dirty_vars = np.zeros((778, 3, 10)), {"x"}
    part.a, part.preferred_shape, part.idxs = whole, (778, 3, 10), np.arange(778 * 30)
    return {
        "v_template": hand.template.double().numpy(),
        "f": hand.faces.numpy().astype(np.uint32),
        "weights": hand.skinning_weights.double().numpy(),
        "shapedirs": part,
        "posedirs": np.zeros((778, 3, 135), np.float16),
        "J_regressor": sp.csc_matrix(hand.bone_regressor.numpy()),
        "kintree_table": np.stack([np.array([2**32 - 1, *hand.parents[1:]]), np.arange(16)]).astype(
            np.uint32
        ),
    }


def read_transforms(path):
    found = load_transforms(path)
    for matrix in (*found.down, *found.up):
        matrix.check_format(full_check=True)
    return [array.shape for array in (*found.vertices, *found.faces, *found.down, *found.up)]


def read_matrices(path):
    content = load_arrays(path)
    return [to_array(form, content.get(form), (9, 6)).shape for form in FORMS]


def read_hand(path):
    hand = HandModel.from_mano(path)
    assert int(hand.faces.min()) >= 0 and int(hand.faces.max()) < 778
    return [buffer.shape for buffer in hand.buffers()]


def mutated(content: bytes, places: np.ndarray, rng: np.random.Generator) -> bytes:
    """Bit flips, hostile bytes and counts, cuts, zeroed and repeated blocks, mostly in between the arrays.

    A pickle has no checksum: values may change, indices and shapes may not.
    """
    damaged = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.choice(places)) if rng.random() < 0.9 else int(rng.integers(len(content)))
        kind = rng.integers(7)
        if kind < 2:
            damaged[place : place + 1] = bytes([int(rng.integers(256))])
        elif kind == 2:
            damaged[place : place + 1] = bytes(
                [damaged[min(place, len(damaged) - 1)] ^ 1 << int(rng.integers(8))]
            )
        elif kind == 3:
            damaged[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)])
        elif kind == 4:
            del damaged[place : place + int(rng.integers(1, 9))]
        elif kind == 5:
            other = int(rng.choice(places))
            damaged[place : place + 8] = content[other : other + 8]
        elif rng.random() < 0.2:
            del damaged[place:]
        else:
            damaged[place : place + 64] = bytes(64)
        if not damaged:
            break
    return bytes(damaged)


def campaign(tmp_path, monkeypatch, kind: str, count: int) -> None:
    make, read = {
        "transforms": (transforms, read_transforms),
        "matrices": (matrices, read_matrices),
        "mano": (mano, read_hand),
    }[kind]
    rng = np.random.default_rng(sum(map(ord, kind)))
    path = tmp_path / f"{kind}.pkl"
    content = make()
    with monkeypatch.context() as patch:
        for module, name in CHUMPY.items():
            found = types.ModuleType(module)
            for part in content.values():
                for value in (part, getattr(part, "a", None)):
                    if type(value).__name__ == name:
                        setattr(found, name, type(value))
            patch.setitem(sys.modules, module, found)
        patch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        written = [pickle.dumps(content, protocol=protocol) for protocol in (0, 2, 4, 5)]
    refused = 0
    for text in written:
        path.write_bytes(text)
        expected = read(path)
        # Where the file is not the long inside of an array.
        plain = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(np.isin(plain, np.frombuffer(b"cnumsRbtsX\x8c", np.uint8)))
        places = ends[:: max(1, len(ends) // 4000)]
        for _ in range(count // 4):
            path.write_bytes(mutated(text, places, rng))
            try:
                assert read(path) == expected
            except (ValueError, IndexError) as error:
                assert "\n" not in str(error) and len(str(error)) < 500
                refused += 1
    assert refused > count / 4


@pytest.mark.parametrize("kind", ["transforms", "matrices", "mano"])
def test_mutated_pickles(tmp_path, monkeypatch, kind):
    campaign(tmp_path, monkeypatch, kind, 60 if kind == "mano" else 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transforms", "matrices", "mano"])
def test_many_mutated_pickles(tmp_path, monkeypatch, kind):
    """pytest -m slow tests/pahm_ops/mesh/test_pickle_mutations.py"""
    campaign(tmp_path, monkeypatch, kind, 2000 if kind == "mano" else 8000)
