"""Hierarchies in other projects' pickles, and their layers' places taken by ours."""

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
import trimesh

import pahm_ops
from pahm_ops import MeshPool, SpiralConv, mesh_pool
from pahm_ops.mesh import load_transforms, spiral_indices


def content(kind=sp.coo_matrix):
    """Three levels as HandMesh's transform.pkl has them: up transforms of any weights and order."""
    rng = np.random.default_rng(0)
    mesh = trimesh.creation.icosphere(2)
    sizes = (len(mesh.vertices), 60, 20)
    up, down = [], []
    for fine, coarse in ((sizes[0], sizes[1]), (sizes[1], sizes[2])):
        rows = np.repeat(np.arange(fine), 3)
        columns = rng.integers(0, coarse, rows.size)
        values = rng.normal(size=rows.size)
        values[::11] = 0
        order = rng.permutation(rows.size)
        up.append(kind(sp.coo_matrix((values[order], (rows[order], columns[order])), (fine, coarse))))
        kept = rng.choice(fine, coarse, replace=False)
        down.append(kind(sp.coo_matrix((np.ones(coarse), (np.arange(coarse), kept)), (coarse, fine))))
    return {
        "vertices": [rng.normal(size=(n, 3)).astype(np.float32) for n in sizes],
        "face": [np.array(mesh.faces), *(rng.integers(0, n, (2 * n, 3)) for n in sizes[1:])],
        "adj": [sp.identity(n, format="csc") for n in sizes],
        "down_transform": down,
        "up_transform": up,
    }


def write(path, values, protocol=2):
    path.write_bytes(pickle.dumps(values, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", [sp.coo_matrix, sp.csc_matrix, sp.csr_matrix, sp.coo_array])
def test_transforms_are_read_as_they_are(tmp_path, kind, protocol):
    values = content(kind)
    read = load_transforms(write(tmp_path / "transform.pkl", values, protocol))
    for a, b in zip(read.vertices, values["vertices"], strict=True):
        assert a.dtype == np.float64 and np.array_equal(a, b)
    for a, b in zip(read.faces, values["face"], strict=True):
        assert a.dtype == np.int64 and np.array_equal(a, b)
    for ours, theirs in ((read.down, values["down_transform"]), (read.up, values["up_transform"])):
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a.toarray(), b.toarray())
    x = torch.randn(2, 60, 4, dtype=torch.float64)
    expected = torch.from_numpy(values["up_transform"][0].toarray()) @ x
    torch.testing.assert_close(MeshPool(read.up[0])(x), expected)


class Forbidden:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v.pop("face"), "lacks face: a file of transforms has vertices, face, down_transform"),
        (lambda v: v["up_transform"].pop(), "up_transform in .* must have 2 entries for 3 levels, got 1"),
        (lambda v: v["down_transform"].reverse(), r"down_transform\[0\] .* must have shape \(60, 162\)"),
        (lambda v: v.update(face=3), "face in .* must be a list, got int"),
        (lambda v: v["face"].__setitem__(1, v["face"][0]), "face in .* an array of its own for each level"),
        (lambda v: v.update(vertices=[None] * 17), "vertices in .* from 1 to 16 levels, got 17"),
        (lambda v: v["face"].__setitem__(1, [[0.5, 1, 2]]), "face in .* must hold whole numbers"),
        (
            lambda v: v["vertices"].__setitem__(1, v["adj"][1]),
            "vertices in .* must be an array, got a sparse",
        ),
        (lambda v: v["up_transform"][1].data.__setitem__(7, np.nan), r"\[1\] .* finite weights .* got nan"),
        (lambda v: v["up_transform"][1].data.__setitem__(7, -1e200), r"\[1\] .* below 1e\+12, got 1e\+200"),
        (lambda v: v["vertices"][2].__setitem__(7, np.inf), "vertices must be finite"),
        (lambda v: v["up_transform"].insert(0, np.eye(3)) or v["up_transform"].pop(), "scipy.sparse matrix"),
        (lambda v: v.update(adj=Forbidden()), "asks for .*print, and only numpy's and scipy.sparse's"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, capsys, change, sentence):
    values = content()
    change(values)
    with pytest.raises(ValueError, match=sentence):
        load_transforms(write(tmp_path / "transform.pkl", values))
    assert "this ran" not in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"transform\.pkl"):
        load_transforms(tmp_path / "transform.pkl")


# What follows is the public interface of SpiralNet++'s and HandMesh's layers, in a network as they write it.


def pool(x, trans, dim=1):
    """SpiralNet++'s Pool, by its definition: out[:, r] += value * x[:, c]."""
    (rows, columns), values = trans._indices(), trans._values()
    out = torch.zeros(x.shape[0], trans.shape[0], x.shape[2], dtype=x.dtype)
    return out.index_add(dim, rows, values[:, None] * x.index_select(dim, columns))


class Gathered(torch.nn.Module):
    """SpiralNet++'s layer, by its definition."""

    def __init__(self, in_channels, out_channels, indices, dim=1):
        super().__init__()
        self.indices = indices
        self.layer = torch.nn.Linear(in_channels * indices.size(1), out_channels)

    def forward(self, x):
        rows = x.index_select(x.dim() - 2, self.indices.flatten())
        return self.layer(rows.reshape(*x.shape[:-2], self.indices.size(0), -1))


class Decoder(torch.nn.Module):
    def __init__(self, conv, pool, tables, up):
        super().__init__()
        self.pool, self.up = pool, up
        self.first = conv(8, 16, tables[1], dim=1)
        self.last = conv(16, 3, indices=tables[0])

    def forward(self, x):
        return self.last(F.elu(self.pool(self.first(x), self.up)))


def test_a_network_of_theirs_runs_on_ours_with_the_imports_changed():
    mesh = trimesh.creation.icosphere(2)
    fine = torch.from_numpy(spiral_indices(mesh.faces, 9))
    coarse = torch.randint(0, 60, (60, 9))
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(3 * 162,))).float()
    entries = torch.stack([torch.arange(162).repeat_interleave(3), torch.randint(0, 60, (3 * 162,))])
    shuffled = torch.randperm(3 * 162)
    up = torch.sparse_coo_tensor(entries[:, shuffled], values[shuffled], (162, 60))
    theirs = Decoder(Gathered, pool, (fine, coarse), up)
    ours = Decoder(SpiralConv, mesh_pool, (fine, coarse), up)
    assert ours.load_state_dict(theirs.state_dict()) and theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 60, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.first(x[0]), theirs.first(x[0]))
    assert (ours.last.seq_length, ours.last.dim, ours.last.in_channels) == (9, 1, 16)


def test_a_matrix_is_prepared_once_and_anew_when_it_changes(monkeypatch):
    calls = []
    prepare = pahm_ops.MeshTransform.prepare
    monkeypatch.setattr(pahm_ops.MeshTransform, "prepare", lambda m: calls.append(1) or prepare(m))
    x = torch.randn(2, 60, 4)
    matrix = torch.sparse_coo_tensor(torch.tensor([[0, 1], [3, 5]]), torch.tensor([1.0, 2.0]), (7, 60))
    before = [mesh_pool(x, matrix) for _ in range(3)]
    assert len(calls) == 1 and torch.equal(before[0], before[2])
    matrix._values().mul_(2)
    torch.testing.assert_close(mesh_pool(x, matrix), 2 * before[0])
    other = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (7, 60))
    assert mesh_pool(x, other)[0, 0].equal(x[0, 0]) and len(calls) == 3
    with pytest.raises(ValueError, match="dim must be 1 or -2"):
        mesh_pool(x, matrix, 0)
