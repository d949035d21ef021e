"""What is read of pickles, and that hostile ones neither run, allocate nor crash."""

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from pahm_ops.mesh.pickles import load_arrays, to_array, to_entries, to_integers, to_list

FORMS = ("csr", "csc", "coo", "dia", "lil", "dok", "bsr")


def load(tmp_path, content: bytes):
    (tmp_path / "x.pkl").write_bytes(content)
    return load_arrays(tmp_path / "x.pkl")


def dense(found) -> np.ndarray:
    out = np.zeros(found.shape)
    np.add.at(out, (found.rows, found.columns), found.values)
    return out


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_read_under_every_protocol(tmp_path, protocol):
    rng = np.random.default_rng(0)
    arrays = {
        code: (100 * rng.random((3, 4))).astype(code) for code in ("u1", "<i2", ">i4", "u8", "f2", ">f8")
    }
    arrays["fortran"] = np.asfortranarray(arrays["u8"])
    arrays["turned"] = np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0)
    arrays["part"] = np.arange(24.0).reshape(4, 6)[::2, 1::2]
    arrays["empty"], arrays["one"] = np.zeros((0, 3)), np.array(2.5)
    content = load(tmp_path, pickle.dumps(arrays, protocol=protocol))
    assert content.keys() == arrays.keys()
    for name, expected in arrays.items():
        array = to_array(name, content[name], expected.shape)
        assert array.dtype == expected.dtype.newbyteorder("=") and array.flags.writeable
        np.testing.assert_array_equal(array, expected)


def modules_of_older_versions(content: bytes) -> bytes:
    for form in FORMS:
        content = content.replace(f"scipy.sparse._{form}\n".encode(), f"scipy.sparse.{form}\n".encode())
    return content.replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", FORMS)
def test_matrices_are_read_in_every_form(tmp_path, form, protocol):
    values = np.random.default_rng(0).normal(size=(6, 4)) * (np.arange(24).reshape(6, 4) % 3 == 0)
    content = {kind: getattr(sp, f"{form}_{kind}")(values) for kind in ("matrix", "array")}
    text = pickle.dumps(content, protocol=protocol)
    for written in (text, modules_of_older_versions(text)) if protocol < 4 else (text,):
        for name, matrix in load(tmp_path, written).items():
            np.testing.assert_array_equal(dense(to_entries(name, matrix, (6, 4))), values)
            np.testing.assert_array_equal(to_array(name, matrix, (6, 4)), values)
            with pytest.raises(ValueError, match=r"must have shape \(4, 6\), got \(6, 4\)"):
                to_entries(name, matrix, (4, 6))


def array_of_python_2(array: np.ndarray, text: bool) -> bytes:
    """The opcodes that Python 2 wrote for an array, under protocol 0 (text) or 2."""

    def string(value: bytes) -> bytes:
        if text:
            return b"S" + repr(value).removeprefix("b").encode() + b"\n"
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"I%d\n" % value if text else b"J" + struct.pack("<i", value)

    def several(*parts: bytes) -> bytes:
        return b"(" + b"".join(parts) + b"t"

    reconstruct, ndarray = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n"
    dtype = b"cnumpy\ndtype\n" + several(string(array.dtype.str[1:].encode()), integer(0), integer(1)) + b"R"
    state = several(integer(3), string(b"<"), *[b"N"] * 3, integer(-1), integer(-1), integer(0))
    shape, fortran = several(*map(integer, array.shape)), b"I00\n" if text else b"\x89"
    made = reconstruct + several(ndarray, several(integer(0)), string(b"b")) + b"R"
    return made + several(integer(1), shape, dtype + state + b"b", fortran, string(array.tobytes())) + b"b"


@pytest.mark.parametrize("text", [True, False])
def test_arrays_and_old_objects_of_python_2_are_read(tmp_path, text):
    array = np.random.default_rng(0).normal(size=(5, 3))
    written = array_of_python_2(array, text)
    value = b"ccopy_reg\n_reconstructor\n(cchumpy.ch\nCh\nc__builtin__\nobject\nNtR(dS'x'\n" + written + b"sb"
    start = b"" if text else b"\x80\x02"
    content = load(tmp_path, start + b"(dS'a'\n" + written + b"sS'b'\n" + value + b"sL5L\nI01\ns.")
    assert content.keys() == {"a", "b"}
    for name in content:
        np.testing.assert_array_equal(to_array(name, content[name]), array)


def test_lists_are_read_as_arrays(tmp_path):
    objects = np.empty(2, dtype=object)
    objects[:] = [np.zeros((2, 3)), np.ones((1, 3))]
    values = {"rows": [[1, 2.5], (np.float32(3), np.int64(4))], "levels": objects, "whole": [[1.0], [2.0]]}
    content = load(
        tmp_path,
        pickle.dumps({**values, "half": [0.5], "huge": [1e300], "nan": [np.nan], "ragged": [[1], [2, 3]]}),
    )
    np.testing.assert_array_equal(to_array("rows", content["rows"]), [[1, 2.5], [3, 4]])
    np.testing.assert_array_equal(to_integers("whole", content["whole"]), [[1], [2]])
    assert [to_array("x", level).shape for level in to_list("levels", content["levels"])] == [(2, 3), (1, 3)]
    for name in ("half", "huge", "nan"):
        with pytest.raises(ValueError, match=f"{name} must hold whole numbers"):
            to_integers(name, content[name])
    with pytest.raises(ValueError, match="ragged must hold numbers, got lists of different lengths"):
        to_array("ragged", content["ragged"])


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
FLOATS = b"cnumpy\ndtype\n(U\x02f8tR(K\x03U\x01<NNNtb"
ENCODE = b"c_codecs\nencode\n"


def array(shape: bytes, data: bytes, dtype: bytes = FLOATS) -> bytes:
    return ARRAY + b"(K\x01(" + shape + b"t" + dtype + b"\x89" + data + b"tb"


def raw(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def as_item(value: bytes) -> bytes:
    return b"(dU\x01a" + value + b"s."


def chumpy(attributes: bytes) -> bytes:
    return b"cchumpy.reordering\nSelect\n)\x81(d" + attributes + b"b"


MANY = b"J" + struct.pack("<i", 2**31 - 1)
IDENTITY = raw(np.eye(3).tobytes())
# Each is refused while it is read or, where the dictionary's "a" is such, when an array is made of it.
HOSTILE = {
    "a giant index of the memo": (
        b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
        "takes entry 4294967294 of a memo of 1",
    ),
    "an index of the memo in digits": (b"Np" + b"9" * 9999 + b"\n.", "an integer of 9999 digits"),
    "a giant count of bytes": (b"\x8e" + b"\xff" * 8 + b"x.", r"it ends after \d+ bytes"),
    "a giant string": (b"T\xff\xff\xff\x7fx.", r"it ends after \d+ bytes"),
    "a giant byte array": (b"\x96" + struct.pack("<Q", 2**40) + b".", r"it ends after \d+ bytes"),
    "a giant integer": (b"\x8b" + struct.pack("<i", 4000) + bytes(4000) + b".", "an integer of 4000 bytes"),
    "an integer in digits": (b"L" + b"9" * 400 + b"L\n.", "an integer of 400 digits"),
    "a giant frame": (b"\x80\x05\x95" + b"\xff" * 8, r"it ends after \d+ bytes"),
    "an empty stack": (b"\x80\x02R.", "takes from an empty stack"),
    "marks alone": (b"(((.", "takes from an empty stack"),
    "nothing": (b"", "it ends after 0 bytes"),
    "an opcode of persistent objects": (b"Pfile\n.", "it has the opcode b'P'"),
    "state of a class": (b"cscipy.sparse\ncsr_matrix\n(dU\x01aNsb.", "it sets the state of Name"),
    "state of a function": (b"cnumpy.core.multiarray\nscalar\n(dU\x01aNsb.", "it sets the state of Name"),
    "state of a list": (b"](dU\x01aNsb.", "it sets the state of list"),
    "a call of a matrix's class": (b"cscipy.sparse\ncsr_matrix\n(NtR.", "does not call csr_matrix"),
    "a call of an array": (as_item(array(b"", b"N") + b")R"), "it calls what is no function of arrays"),
    "another encoding": (ENCODE + b"(U\x01xU\x07unicodetR.", "arrays encodes as latin1"),
    "an object of Python 2": (b"(ios\nsystem\n.", "asks for os.system"),
    "a class on the stack": (b"U\x02osU\x06system\x93.", "asks for os.system"),
    "a class of no text": (b"]]\x93.", "names a class by other than text"),
    "an array of one element many times": (
        b"(d"
        + b"U\x01a"
        + raw(bytes(4000))
        + b"q\x01s"
        + b"".join(b"U\x01b" + array(b"M\xf4\x01", b"h\x01") + b"s" for _ in range(99))
        + b".",
        "its arrays have more bytes than the",
    ),
    "a shape beyond its bytes": (
        as_item(array(b"K\x63K\x63", IDENTITY)),
        r"bytes of shape \(99, 99\) in float64",
    ),
    "a giant shape": (as_item(array(MANY * 3, IDENTITY)), "a shape that fits into memory"),
    "a giant shape of nothing": (
        as_item(array(b"K\x00" + MANY * 2, raw(b""))),
        "a shape that fits into memory",
    ),
    "a negative shape": (
        as_item(array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff", raw(bytes(8)))),
        "sizes from 0 to",
    ),
    "a shape of 9 sizes": (as_item(array(b"K\x01" * 9, raw(bytes(8)))), "a shape of at most 8 sizes"),
    "a shape of lists": (as_item(array(b"]]", IDENTITY)), "sizes from 0 to"),
    "no bytes": (as_item(array(b"K\x09", b"K\x09")), r"bytes of shape \(9,\) in float64, got int"),
    "no latin1": (as_item(array(b"K\x09", b"X\x03\x00\x00\x00\xe2\x82\xac")), "a must have bytes, got text"),
    "objects of bytes": (
        as_item(array(b"K\x01", raw(b"\x41" * 8), b"cnumpy\ndtype\n(U\x02O8tR(K\x03U\x01|NNNtb")),
        "must hold numbers, got objects",
    ),
    "a dtype of fields": (
        as_item(array(b"K\x09", IDENTITY, b"cnumpy\ndtype\n(U\x03V24tR(K\x03U\x01|N(U\x01xt(dU\x01xNstb")),
        "a plain dtype, got 'V24' with fields",
    ),
    "a dtype of another kind": (
        as_item(array(b"K\x09", IDENTITY, b"cnumpy\ndtype\n(U\x03U24tR")),
        "got dtype 'U24'",
    ),
    "a dtype of no text": (
        as_item(array(b"K\x09", IDENTITY, b"cnumpy\ndtype\n(NtR")),
        "must have a numpy dtype",
    ),
    "no byte order": (
        as_item(array(b"K\x09", IDENTITY, b"cnumpy\ndtype\n(U\x02f8tR(K\x03NNNNtb")),
        "a known byte order",
    ),
    "a scalar of objects": (
        as_item(b"(lcnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(U\x02O8tR" + raw(b"\x41" * 8) + b"tRa"),
        "a scalar must hold numbers, got objects",
    ),
    "a scalar of few bytes": (
        as_item(b"(lcnumpy.core.multiarray\nscalar\n(" + FLOATS + raw(b"\x41") + b"tRa"),
        r"must have the bytes of",
    ),
    "an array of no state": (as_item(ARRAY), "a numpy array with a state"),
    "axes out of range": (
        as_item(
            b"cnumpy.core.numeric\n_frombuffer\n(" + IDENTITY + FLOATS + b"(K\x03K\x03tU\x01K(K\x00K\x07ttR"
        ),
        "an order of its 2 axes",
    ),
    "axes for an order": (
        as_item(b"cnumpy.core.numeric\n_frombuffer\n(" + IDENTITY + FLOATS + b"(K\x03K\x03t(C\x01xtt" + b"R"),
        "in the order C, F or K",
    ),
    "lists of shared lists": (
        as_item(b"K\x01q\x01" + (b"0(" + b"h\x01" * 99 + b"tq\x01") * 9),
        "at most 262144 numbers in lists",
    ),
    "a list in itself": (as_item(b"(lq\x01h\x01a"), "nested 8 deep"),
    "a chumpy object in itself": (
        as_item(b"cchumpy.ch\nCh\n)\x81q\x01(dU\x01xh\x01sb"),
        "chumpy objects deep",
    ),
    "a chumpy selection outside": (
        as_item(chumpy(b"U\x01a" + array(b"K\x09", IDENTITY) + b"sU\x04idxs(lK\x09as")),
        "a chumpy selection outside its 9 values",
    ),
    "a chumpy selection by itself": (
        as_item(b"cchumpy.reordering\nSelect\n)\x81q\x01(dU\x01ah\x01sU\x04idxsh\x01sb"),
        "chumpy objects deep",
    ),
    "a chumpy selection of its own places": (
        as_item(
            b"cchumpy.reordering\nSelect\n)\x81q\x01(dU\x01a"
            + array(b"K\x09", IDENTITY)
            + b"sU\x04idxsh\x01sb"
        ),
        "chumpy objects deep",
    ),
    "a chumpy shape": (
        as_item(
            chumpy(b"U\x01a" + array(b"K\x09", IDENTITY) + b"sU\x04idxs(lK\x08asU\x0fpreferred_shape(K\x02ts")
        ),
        r"a chumpy selection of 1 values for shape \(2,\)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_in_little_memory(tmp_path, case):
    content, sentence = HOSTILE[case]
    before = {name: id(value) for name, value in vars(sp.csr_matrix).items()}
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=sentence) as caught:
            to_array("a", load(tmp_path, content)["a"])
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert {name: id(value) for name, value in vars(sp.csr_matrix).items()} == before


def test_deep_and_long_pickles_are_read_or_refused(tmp_path):
    deep = b"(dU\x01a" + b"(l" * 100_000 + b"a" * 99_999 + b"s."
    assert isinstance(load(tmp_path, deep)["a"], list)
    with pytest.raises(ValueError, match="nested 8 deep"):
        to_array("a", load(tmp_path, deep)["a"])
    with pytest.raises(ValueError, match="more than 1000000 opcodes"):
        load(tmp_path, b"N0" * 600_000)
    with (tmp_path / "large.pkl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"has {2**40} bytes, expected a pickle of arrays of at most"):
        load_arrays(tmp_path / "large.pkl")


@pytest.mark.parametrize(
    ("form", "part"), [("lil", "rows"), ("lil", "data"), ("csr", "indices"), ("csc", "indptr")]
)
def test_hostile_matrices_are_refused(tmp_path, form, part):
    matrix = getattr(sp, f"{form}_matrix")(np.eye(300))
    if form == "lil":
        row = list(range(300)) * 100
        setattr(matrix, part, np.array([row] * 300 + [None], dtype=object)[:-1])
    else:
        getattr(matrix, part)[7] = 2**30
    content = load(tmp_path, pickle.dumps({"a": matrix}))
    with pytest.raises(ValueError, match=r"must have at most 262144|outside its 300|must rise from"):
        to_entries("a", content["a"], (300, 300))


@pytest.mark.parametrize("form", FORMS)
def test_entries_are_bounded(tmp_path, monkeypatch, form):
    matrix = getattr(sp, f"{form}_matrix")(np.eye(12))
    content = load(tmp_path, pickle.dumps({"a": matrix}))
    assert to_entries("a", content["a"], (12, 12)).values.sum() == 12
    for limit in ("_LIST_LIMIT", "_ENTRY_LIMIT"):
        monkeypatch.setattr(f"pahm_ops.mesh.pickles.{limit}", 11)
    with pytest.raises(ValueError, match="must have at most 11 entries"):
        to_entries("a", content["a"], (12, 12))
