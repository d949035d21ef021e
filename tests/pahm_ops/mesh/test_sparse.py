"""Sparse matrices whose parts do not fit each other are refused before compiled code reads them."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pahm_ops import MeshPool, mesh_pool
from pahm_ops.mesh.sparse import entries, scipy_entries

FORMS = ("csr", "csc", "coo", "dia", "lil", "dok", "bsr")
BIG = 2**40


def values(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.random((12, 8)) < 0.4) * rng.normal(size=(12, 8))


def dense(found) -> np.ndarray:
    out = np.zeros(found.shape)
    np.add.at(out, (found.rows, found.columns), found.values)
    return out


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, np.uint64, bool])
@pytest.mark.parametrize("kind", ["matrix", "array"])
@pytest.mark.parametrize("form", FORMS)
def test_entries_of_every_form(form, kind, dtype):
    matrix = getattr(sp, f"{form}_{kind}")(values().astype(dtype))
    np.testing.assert_array_equal(dense(scipy_entries(matrix)), matrix.toarray())


def test_entries_of_odd_matrices():
    blocks = sp.bsr_matrix(values(), blocksize=(3, 2))
    np.testing.assert_array_equal(dense(scipy_entries(blocks)), values())
    wide = sp.dia_matrix((np.arange(1.0, 31).reshape(3, 10), [-11, 0, 6]), shape=(4, 9))
    np.testing.assert_array_equal(dense(scipy_entries(wide)), wide.toarray())
    room = sp.csr_matrix(values())
    room.data, room.indices = np.append(room.data, 9.0), np.append(room.indices, 99)
    np.testing.assert_array_equal(dense(scipy_entries(room)), values())
    big = {"data": np.ones(2, ">f8"), "row": np.array([0, 1], ">u2"), "col": np.array([1, 0], ">i4")}
    found = entries("coo", big, (2, 2))
    assert found.values.dtype == np.float64 and found.values.dtype.isnative and found.rows.dtype.isnative
    np.testing.assert_array_equal(dense(found), [[0, 1], [1, 0]])


def put(part, place, value):
    def change(matrix):
        array = getattr(matrix, part).astype(np.int64)
        array[place] = value
        setattr(matrix, part, array)

    return change


def cut(part):
    return lambda matrix: setattr(matrix, part, getattr(matrix, part)[:-1])


def set_to(part, value):
    return lambda matrix: setattr(matrix, part, value)


def move(axis, value):
    def change(matrix):
        coordinates = [np.array(index) for index in (matrix.row, matrix.col)]
        coordinates[axis][3] = value
        if hasattr(matrix, "coords"):
            matrix.coords = tuple(coordinates)
        else:
            matrix.row, matrix.col = coordinates

    return change


def add_item(key, value):
    def change(matrix):
        (matrix._dict if hasattr(matrix, "_dict") else super(dict, matrix))[key] = value

    return change


COMPRESSED = [
    (put("indices", 5, BIG), IndexError, r"of shape \(12, 8\) has an entry outside its"),
    (put("indices", 5, -1), IndexError, "has an entry outside its"),
    (put("indptr", -1, BIG), ValueError, "its pointers must rise from 0 to at most"),
    (put("indptr", 3, BIG), ValueError, "its pointers must rise from 0 to at most"),
    (put("indptr", 3, -5), ValueError, "its pointers must rise from 0 to at most"),
    (put("indptr", 0, 1), ValueError, "its pointers must rise from 0 to at most"),
    (cut("indptr"), ValueError, r"it has \d+ pointers, expected \d+"),
    (cut("data"), ValueError, r"it has \d+ indices for \d+ values"),
    (cut("indices"), ValueError, r"it has \d+ indices for \d+ values"),
    (set_to("indptr", np.zeros(0, int)), ValueError, r"it has 0 pointers, expected \d+"),
    (set_to("indices", np.zeros(3)), ValueError, "its indices must be integers, got dtype float64"),
    (set_to("indices", [0]), ValueError, "its indices must be an array of 1 dimensions, got list"),
    (set_to("indptr", np.full(13, 2**64 - 1, np.uint64)), ValueError, r"its indptr must be below 2\^31"),
]
ANY = [
    (
        set_to("_shape", (-12, 8)),
        ValueError,
        r"must have sides from 0 to 2\^26, got shape \(-12",
    ),
    (set_to("_shape", (12, BIG)), ValueError, r"must have sides from 0 to 2\^26"),
    (set_to("_shape", (12, 8, 1)), ValueError, r"must be a matrix \(M, N\), got shape \(12, 8, 1\)"),
    (set_to("_shape", (2, 8)), (ValueError, IndexError), "outside its 2 rows|expected|must be 2 lists"),
]
CASES = {
    "csr": COMPRESSED,
    "csc": COMPRESSED,
    "bsr": [
        *COMPRESSED,
        (set_to("data", np.zeros((30, 5, 2))), ValueError, r"its blocks of shape \(5, 2\) do not divide"),
        (set_to("data", np.zeros((30, 0, 2))), ValueError, r"its blocks of shape \(0, 2\) do not divide"),
        (set_to("data", np.zeros(30)), ValueError, r"its data must be an array of 3 dimensions"),
    ],
    "coo": [
        (move(0, 12), IndexError, "outside its 12 rows"),
        (move(0, -1), IndexError, "outside its 12 rows"),
        (move(1, 8), IndexError, "outside its 8 columns"),
        (cut("data"), ValueError, r"it has \d+ rows and \d+ columns for \d+ values"),
        (
            set_to("data", np.array([None] * 40)),
            (TypeError, ValueError),
            "must be real, got values of object|it has",
        ),
    ],
    "dia": [
        (cut("data"), ValueError, r"it has 8 offsets for 7 diagonals|it has \d+ offsets for"),
        (set_to("offsets", np.zeros(3)), ValueError, "its offsets must be integers, got dtype float64"),
        (set_to("data", np.zeros(3)), ValueError, "its data must be an array of 2 dimensions"),
    ],
    "lil": [
        (lambda m: m.rows[2].append(BIG), ValueError, "its rows and its data differ in length"),
        (
            lambda m: m.rows[2].__setitem__(0, BIG),
            ValueError,
            r"its indices must lie in \[0, 2\^31\)",
        ),
        (lambda m: m.rows[2].__setitem__(0, 8), IndexError, "outside its 8 columns"),
        (lambda m: m.rows[2].__setitem__(0, 0.5), TypeError, "its indices must be integers, got float"),
        (lambda m: m.data[2].__setitem__(0, "x"), TypeError, "its values must be real numbers, got str"),
        (lambda m: m.rows.__setitem__(2, None), ValueError, "its rows must be 12 lists"),
        (cut("rows"), ValueError, "its rows must be 12 lists"),
    ],
    "dok": [
        (add_item((99, 0), 1.0), IndexError, "outside its 12 rows"),
        (add_item((0, -1), 1.0), ValueError, r"its indices must lie in \[0, 2\^31\)"),
        (add_item((0, 1, 2), 1.0), ValueError, "its keys must be pairs"),
        (add_item((0, 1), "x"), TypeError, "its values must be real numbers, got str"),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_hostile_parts_are_named(form):
    for change, error, sentence in [*CASES[form], *ANY[: 3 if form == "dia" else 4]]:
        matrix = getattr(sp, f"{form}_matrix")(values())
        change(matrix)
        for use in (MeshPool, scipy_entries):
            with pytest.raises(error, match=f"^transform .*({sentence})"):
                use(matrix)


def test_diagonals_far_outside_hold_no_entries():
    matrix = sp.dia_matrix(values())
    matrix.offsets = np.full(len(matrix.offsets), -(2**63))
    assert scipy_entries(matrix).values.size == 0


def test_unchecked_torch_tensors_are_checked():
    pointers, columns = torch.tensor([0, 2, 3, 3]), torch.tensor([0, 1, 1])
    cases = [
        ([0, 2, 1, 3], [0, 1, 1], 3, ValueError, "crow_indices that never fall"),
        ([0, 2**63 - 1, -2, 3], [0, 1, 1], 3, ValueError, "crow_indices that never fall"),
        ([0, 2, 3, 2**40], [0, 1, 1], 3, ValueError, "crow_indices from 0 to its 3 entries"),
        ([0, 2, 3, 2], [0, 1, 1], 3, ValueError, "crow_indices from 0 to its 3 entries"),
        ([1, 2, 3, 3], [0, 1, 1], 3, ValueError, "crow_indices from 0 to its 3 entries"),
        ([0, 3], [0, 1, 1], 3, ValueError, "crow_indices from 0 to its 3 entries"),
        (pointers, [0, -1, 1], 3, IndexError, "outside its 2 columns"),
        (pointers, [0, 2, 1], 3, IndexError, "outside its 2 columns"),
        (pointers, columns, 2, ValueError, r"as many values as indices, got \(2,\)"),
    ]
    for crow, col, count, error, sentence in cases:
        crow, col = torch.as_tensor(crow), torch.as_tensor(col)
        matrix = torch.sparse_csr_tensor(crow, col, torch.ones(count), (3, 2), check_invariants=False)
        with pytest.raises(error, match=sentence):
            mesh_pool(torch.zeros(2, 3), matrix)
    tall = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (2**40, 2))
    with pytest.raises(ValueError, match=r"sides of 2\^26 at most, got shape \(1099511627776, 2\)"):
        mesh_pool(torch.zeros(2, 3), tall)
    for row in (-1, 3):
        indices = torch.tensor([[0, row], [0, 1]])
        matrix = torch.sparse_coo_tensor(indices, torch.ones(2), (3, 2), check_invariants=False)
        with pytest.raises(IndexError, match="outside its 3 rows"):
            mesh_pool(torch.zeros(2, 3), matrix)
