"""Operands that are prepared once: what they hold, what is refused, and for how long they are remembered."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pahm_ops import MeshTransform, SpiralConv, SpiralTable, prepared, spiral_conv


def spirals(rows: int = 9, length: int = 4, vertices: int = 7) -> torch.Tensor:
    return torch.randint(0, vertices, (rows, length))


def test_a_table_and_the_lists_of_its_transpose():
    indices = spirals()
    made = SpiralTable.prepare(indices, 7)
    assert made.vertices == 7 and torch.equal(made.indices, indices)
    assert torch.equal(made.table, indices.t()) and made.table.is_contiguous()
    assert {t.dtype for t in made[2:]} == {torch.int32}
    for position in range(4):
        for n in range(7):
            begin, end = made.t_pointers[position * 7 + n : position * 7 + n + 2].tolist()
            wanted = (indices[:, position] == n).nonzero().flatten().tolist()
            assert made.t_rows[begin:end].tolist() == wanted


def test_a_table_of_no_rows():
    made = SpiralTable.prepare(torch.zeros(0, 3, dtype=torch.int64), 5)
    assert made.table.shape == (3, 0) and made.t_rows.numel() == 0 and not made.t_pointers.any()


def test_a_table_is_a_copy():
    indices = spirals()
    made = SpiralTable.prepare(indices, 7)
    before = made.indices.clone()
    indices.zero_()
    assert torch.equal(made.indices, before) and torch.equal(made.table, before.t())


def test_a_table_serves_as_its_indices_do_and_knows_its_vertices():
    indices, x, weight = spirals(), torch.randn(2, 7, 3), torch.randn(5, 12)
    table = SpiralTable.prepare(indices, 7)
    assert torch.equal(spiral_conv(x, table, weight), spiral_conv(x, indices, weight))
    with pytest.raises(ValueError, match="x must have the 7 vertices of the spiral table, got shape"):
        spiral_conv(x[:, 1:], table, weight)
    with pytest.raises(ValueError, match="indices must be on x's device cpu, got meta"):
        spiral_conv(x, table.to("meta"), weight)


@pytest.mark.parametrize("value", [-1, 7])
def test_indices_are_checked_when_a_table_is_made(value):
    indices = spirals()
    indices[3, 2] = value
    with pytest.raises(IndexError, match=rf"indices must lie in \[0, 7\), got {value}"):
        SpiralTable.prepare(indices, 7)


def test_more_indices_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\^31, .* got 1 x 2 indices and 2147483648 vertices"):
        SpiralTable.prepare(torch.zeros(1, dtype=torch.int64).expand(1, 2), 2**31)


def test_indices_are_prepared_once_and_anew_when_values_change():
    indices = spirals()
    first = prepared.spiral_table(indices, 7)
    assert prepared.spiral_table(indices, 7) is first
    assert prepared.spiral_table(indices, 8) is not first
    indices[0, 0] = (indices[0, 0] + 1) % 7
    changed = prepared.spiral_table(indices, 7)
    assert changed.table[0, 0] == indices[0, 0] != first.table[0, 0]


def test_what_was_prepared_dies_with_its_source():
    indices = spirals()
    table = weakref.ref(prepared.spiral_table(indices, 7).table)
    matrix = torch.eye(3).to_sparse()
    values = weakref.ref(prepared.mesh_transform(matrix).forward[2])
    gc.collect()
    assert table() is not None and values() is not None
    del indices, matrix
    gc.collect()
    assert table() is None and values() is None


def test_a_tensor_of_inference_mode_is_not_remembered():
    with torch.inference_mode():
        indices = torch.zeros(2, 3, dtype=torch.int64)
        assert not prepared.spiral_table(indices, 7).table.any()
        indices[1, 2] = 5
        assert prepared.spiral_table(indices, 7).table[2, 1] == 5


def test_many_threads_prepare_at_once():
    def make(_: int) -> bool:
        indices = spirals()
        return torch.equal(prepared.spiral_table(indices, 7).table, indices.t())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(make, range(400)))


def test_a_capture_refuses_what_was_not_prepared(monkeypatch):
    monkeypatch.setattr(prepared, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"call SpiralTable\.prepare or MeshTransform\.prepare before"):
        prepared.spiral_table(spirals(), 7)
    matrix = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        prepared.mesh_transform(matrix)


def test_a_transform_is_int32_and_keeps_the_type_of_its_values():
    matrix = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 3.0]])
    for dtype, kept in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        made = MeshTransform.prepare(matrix.to(dtype).to_sparse())
        assert made.shape == (3, 2)
        pointers, columns, values = made.forward
        assert (pointers.dtype, columns.dtype, values.dtype) == (torch.int32, torch.int32, kept)
        assert pointers.tolist() == [0, 1, 2, 3] and columns.tolist() == [1, 0, 1]
        assert made.backward[0].tolist() == [0, 1, 3] and made.backward[1].tolist() == [1, 0, 2]


def test_a_module_prepares_its_spirals_once(monkeypatch):
    indices = spirals(7)
    module = SpiralConv(3, 5, indices)
    monkeypatch.setattr(SpiralTable, "prepare", lambda *_: pytest.fail("prepared again"))
    module(torch.randn(2, 7, 3)).sum().backward()
    assert module.spirals.vertices == 7 and module.state_dict().keys() == {"layer.weight", "layer.bias"}


def test_a_module_takes_the_vertices_that_its_spirals_name():
    down = torch.tensor([[8, 1], [0, 3]])  # two vertices of nine
    assert SpiralConv(3, 5, down).vertices == 9 and SpiralConv(3, 5, down, vertices=12).vertices == 12
    module = SpiralConv(3, 5, down)
    x = torch.randn(1, 12, 3)
    assert torch.equal(module(x), module(x[:, :9]))
    with pytest.raises(IndexError, match=r"indices must lie in \[0, 8\), got 8"):
        module(x[:, :8])
    with pytest.raises(IndexError, match=r"indices must lie in \[0, 5\), got 8"):
        SpiralConv(3, 5, down, vertices=5)
