"""Reading .npy and .npz files: whole ones as NumPy reads them, damaged and hostile ones not at all."""

import io
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from pahm.hand import HandModel
from pahm_ops.array_files import read_npy, read_npz
from pahm_ops.mesh import MeshHierarchy

ARRAYS = {
    "square": np.arange(12.0).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">f4"),
    "scalar": np.float16(2.5),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.uint8),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_npy_is_read_as_numpy_reads_it(tmp_path, name):
    np.save(tmp_path / "x.npy", ARRAYS[name])
    array, expected = read_npy(tmp_path / "x.npy"), ARRAYS[name]
    assert array.dtype == expected.dtype and array.shape == expected.shape and array.flags.writeable
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_as_numpy_reads_it(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    for names in (None, ["scalar", "flags", "absent"]):
        arrays = read_npz(tmp_path / "x.npz", names)
        assert set(arrays) == set(ARRAYS) & set(names or ARRAYS)
        for name, array in arrays.items():
            assert array.dtype == np.asarray(ARRAYS[name]).dtype
            np.testing.assert_array_equal(array, ARRAYS[name])


def npy(header: str, data: bytes = bytes(8), version: int = 1) -> bytes:
    text = header.encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def header(dtype: str, shape: str) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"


HOSTILE = {
    "huge": (
        npy(header("<f8", "(1000000000000,)")),
        r"\(1000000000000,\) of float64 does not fit the 8 bytes",
    ),
    "overflow": (npy(header("<f8", "(4294967296, 4294967296)")), "not one of an array in memory"),
    "huge and empty": (npy(header("<f8", "(0, 999999999999999)"), b""), "not one of an array in memory"),
    "many digits": (npy(header("<f8", f"({'1' * 3000},)")), "its header is not that of an array of integers"),
    "negative": (npy(header("<f8", "(-1,)")), "its header is not that of an array of integers"),
    "objects": (npy(header("|O", "(1,)")), "its header is not that of an array of integers"),
    "code": (npy(header("<f8", "(__import__('os').getpid(),)")), "its header is not that of an array"),
    "long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xffx", "it announces a header of 4294967295 bytes"),
    "version": (npy(header("<f8", "(1,)"), version=9), "its version 9.0 is unknown"),
    "short": (npy(header("<f8", "(2,)")), r"shape \(2,\) of float64 does not fit the 8 bytes"),
    "text": (b"no array at all", "it does not start as a .npy file"),
    "nothing": (b"", "it does not start as a .npy file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_npy_is_refused(tmp_path, case):
    content, sentence = HOSTILE[case]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not a whole .npy file .*{sentence}"):
        read_npy(path)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(ValueError, match=f"x.npz is not a .npz file of numbers: array 'x': .*{sentence}"):
        read_npz(tmp_path / "x.npz")


def test_bytes_of_booleans_become_booleans(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(header("|b1", "(3,)"), b"\x00\x02\xff"))
    array = read_npy(tmp_path / "x.npy")
    assert array.dtype == bool and array.view(np.uint8).tolist() == [0, 1, 1]


def test_too_large_files_are_refused_unread(tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        file.truncate(2**40)
    for read in (read_npy, read_npz):
        with pytest.raises(ValueError, match=f"has {2**40} bytes, expected .* of at most {2**27}"):
            read(tmp_path / "x.npy")
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        file.write(npy(header("|u1", f"({150 << 20},)"), b""))
        for _ in range(150):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"its arrays have \d+ bytes, expected at most 134217728"):
            read_npz(tmp_path / "bomb.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy(header("<f8", "(1,)")))
    with pytest.raises(ValueError, match=r"'x\.npy' is compressed in a way that NumPy does not use"):
        read_npz(tmp_path / "lzma.npz")


def test_damaged_archives_are_refused_or_read_as_they_were(tmp_path):
    """Bit flips, cuts and zeroed blocks of a hierarchy and of a hand."""
    hand = HandModel.load()
    buffer = io.BytesIO()
    names = ("template", "skinning_weights", "shape_basis", "bone_regressor")
    arrays = {name: getattr(hand, name).numpy() for name in names}
    np.savez_compressed(buffer, **arrays, faces=hand.faces, parents=hand.parents, tips=hand.tips)
    (tmp_path / "hand.npz").write_bytes(buffer.getvalue())
    whole = MeshHierarchy([np.eye(3)], [np.array([[0, 1, 2]])], [], [])
    whole.save(tmp_path / "levels.npz")
    rng = np.random.default_rng(0)
    refused = 0
    for name, load, value in (
        ("hand.npz", HandModel.load, lambda loaded: loaded.template.numpy()),
        ("levels.npz", MeshHierarchy.load, lambda loaded: loaded.vertices[0]),
    ):
        content = (tmp_path / name).read_bytes()
        expected = value(load(tmp_path / name))
        path = tmp_path / f"damaged_{name}"
        for case in range(60):
            damaged = bytearray(content)
            place = int(rng.integers(len(content)))
            if case % 3 == 0:
                damaged[place] ^= 1 << int(rng.integers(8))
            elif case % 3 == 1:
                del damaged[place:]
            else:
                damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
            path.write_bytes(damaged)
            try:
                loaded = value(load(path))
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                np.testing.assert_array_equal(loaded, expected)
    assert refused > 90
