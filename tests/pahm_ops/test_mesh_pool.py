import numpy as np
import pytest
import scipy.sparse as sp
import torch

import pahm_ops
from pahm_ops import MeshPool, MeshTransform, mesh_pool
from pahm_ops.reference import mesh_pool as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}


def matrix(rows, columns, seed=0):
    """Like the public up transforms: rows of any length (some empty), negative weights, explicit zeros."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 6, rows)
    row = np.repeat(np.arange(rows), count)
    column = rng.integers(0, max(columns, 1), row.size)
    value = rng.normal(size=row.size)
    value[::7] = 0
    order = rng.permutation(row.size)
    return sp.coo_matrix((value[order], (row[order], column[order])), shape=(rows, columns))


def dense(m):
    return torch.from_numpy(m.toarray())


def torch_coo(m):
    return torch.sparse_coo_tensor(np.stack([m.row, m.col]), torch.from_numpy(m.data), m.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 16, 64, 67, 256])
def test_equals_the_dense_product(isa, dtype, channels):
    m = matrix(39, 20)
    x = torch.randn(3, 20, channels, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 39, channels, dtype=dtype)
    out = mesh_pool(x, m)
    (gx,) = torch.autograd.grad(out, x, grad)
    for actual, wanted in ((out, dense(m) @ x.double()), (gx, dense(m).T @ grad.double())):
        assert actual.dtype == dtype
        atol = TOLERANCE[dtype] * float(wanted.detach().abs().max())
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=atol)


def test_reference_equals_the_dense_product():
    m = matrix(39, 20)
    x = torch.randn(3, 20, 5, dtype=torch.float64)
    prepared = MeshTransform.prepare(m)
    torch.testing.assert_close(reference.mesh_pool(x, *prepared.forward), dense(m) @ x)
    grad = torch.randn(3, 39, 5, dtype=torch.float64)
    torch.testing.assert_close(reference.mesh_pool(grad, *prepared.backward), dense(m).T @ grad)


FORMS = {
    "scipy coo, duplicates, unsorted": lambda m: m,
    "scipy csr": lambda m: m.tocsr(),
    "scipy csc": lambda m: m.tocsc(),
    "scipy array": lambda m: sp.csr_array(m),
    "scipy float32": lambda m: m.astype(np.float32).tocsr(),
    "scipy int": lambda m: (m.tocsr() * 8).astype(np.int32),
    "torch coo, uncoalesced": torch_coo,
    "torch coo, coalesced": lambda m: torch_coo(m).coalesce(),
    "torch csr": lambda m: torch_coo(m).coalesce().to_sparse_csr(),
    "torch csr, int32 indices": lambda m: torch.sparse_csr_tensor(
        torch.from_numpy(m.tocsr().indptr), torch.from_numpy(m.tocsr().indices), m.tocsr().data, m.shape
    ),
    "prepared": MeshTransform.prepare,
}


@pytest.mark.parametrize("form", FORMS)
def test_takes_every_form_of_a_matrix(backend, form):
    m = matrix(39, 20)
    transform = FORMS[form](m)
    x = torch.randn(2, 20, 5, dtype=torch.float64)
    expected = dense(m)
    if form == "scipy int":
        expected = torch.from_numpy(transform.toarray()).double()
    tolerance = 1e-6 if form == "scipy float32" else 1e-12
    torch.testing.assert_close(mesh_pool(x, transform), expected @ x, rtol=0, atol=tolerance)
    torch.testing.assert_close(mesh_pool(x[0], transform), expected @ x[0], rtol=0, atol=tolerance)


def test_explicit_zero_is_an_entry(backend):
    m = sp.coo_matrix((np.array([0.0]), (np.array([0]), np.array([1]))), shape=(1, 2))
    out = mesh_pool(torch.tensor([[1.0], [float("inf")]]), m)
    assert out.isnan().all()


@pytest.mark.parametrize(
    "batch, rows, columns, channels", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0), (1, 1, 1, 1)]
)
def test_empty_and_single(backend, batch, rows, columns, channels):
    m = sp.coo_matrix((rows, columns)) if min(rows, columns) == 0 else matrix(rows, columns)
    x = torch.randn(batch, columns, channels, dtype=torch.float64, requires_grad=True)
    out = mesh_pool(x, m)
    torch.testing.assert_close(out, dense(m) @ x)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_input(backend):
    m = matrix(39, 20)
    x = torch.randn(2, 6, 20, dtype=torch.float64).transpose(1, 2)
    torch.testing.assert_close(mesh_pool(x, m), dense(m) @ x)
    expanded = x[:1].expand(4, -1, -1)
    torch.testing.assert_close(mesh_pool(expanded, m), dense(m) @ expanded)


def test_gradients_once_and_twice(backend):
    transform = MeshTransform.prepare(matrix(9, 6))
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mesh_pool(x, transform), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: mesh_pool(x, transform), x)


def test_bfloat16_sums_in_float32(isa):
    m = sp.csr_matrix(np.ones((1, 1000)))
    assert (mesh_pool(torch.ones(1, 1000, 40, dtype=torch.bfloat16), m) == 1000).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    transform = MeshTransform.prepare(matrix(778, 389))
    x = torch.randn(8, 389, 67, dtype=dtype, requires_grad=True)
    grad = torch.randn(8, 778, 67, dtype=dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = mesh_pool(x, transform)
            results.append((out.detach(), *torch.autograd.grad(out, x, grad)))
    finally:
        torch.set_num_threads(before)
    for out, gx in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gx, results[0][1])


def test_op_passes_opcheck():
    if pahm_ops.backends()["mesh_pool"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    transform = MeshTransform.prepare(matrix(9, 6))
    x = torch.randn(2, 6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.pahm_ops.mesh_pool, (x, *transform.forward, *transform.backward))


def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    module = MeshPool(matrix(39, 20))
    x = torch.randn(2, 20, 16, requires_grad=True)
    compiled = torch.compile(lambda x: module(x).square().sum(), fullgraph=True, backend="aot_eager")
    actual = compiled(x)
    (gradient,) = torch.autograd.grad(actual, x)
    expected = module(x).square().sum()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


def test_module_moves_but_keeps_its_values():
    m = matrix(39, 20)
    module = MeshPool(m)
    assert module.state_dict() == {}
    assert module.to(torch.bfloat16).transform.forward[2].dtype == torch.float64
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(module(x), dense(m) @ x)
    moved = torch.nn.Sequential(module).to("meta")
    assert moved[0].transform.device.type == "meta"
    assert all(t.device.type == "meta" for t in (*module.transform.forward, *module.transform.backward))


def test_float16_is_computed_in_float32(backend):
    if backend == "reference":
        pytest.skip("the kernels' business")
    transform = MeshTransform.prepare(matrix(39, 20))
    x = torch.randn(2, 20, 4).half().requires_grad_()
    out = mesh_pool(x, transform)
    assert torch.equal(out, mesh_pool(x.float(), transform).half())
    grad = torch.randn(2, 39, 4).half()
    (wide,) = torch.autograd.grad(mesh_pool(x.float(), transform), x, grad.float())
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], wide)


def test_bad_arguments_are_named():
    m = matrix(9, 6)
    x = torch.randn(2, 6, 5)
    outside = torch.sparse_coo_tensor([[0], [6]], [1.0], (9, 7))
    outside = torch.sparse_coo_tensor(outside._indices(), [1.0], (9, 6), check_invariants=False)
    cases = [
        (TypeError, "x must be a tensor, got list", [1.0], m),
        (TypeError, "x must be float32, .* got torch.int64", x.long(), m),
        (TypeError, "transform must be .* got list", x, [[1.0]]),
        (TypeError, "transform must be a sparse .* got layout torch.strided", x, torch.zeros(9, 6)),
        (TypeError, "transform must be real", x, m.astype(np.complex64)),
        (ValueError, r"x must be \(B, N, C\) or \(N, C\), got shape \(6,\)", x[0, :, 0], m),
        (ValueError, r"transform of shape \(9, 6\) does not fit x of 5 vertices", x[:, 1:], m),
        (
            ValueError,
            r"must be a matrix \(M, N\), got shape \(2, 3, 4\)",
            x,
            torch.zeros(2, 3, 4).to_sparse(),
        ),
        (ValueError, "must not require a gradient", x, torch_coo(m).requires_grad_()),
        (ValueError, "must be on x's device cpu, got meta", x, MeshTransform.prepare(m).to("meta")),
        (IndexError, r"transform of shape \(9, 6\) has an entry outside its 6 columns", x, outside),
    ]
    for error, sentence, features, transform in cases:
        with pytest.raises(error, match=sentence):
            mesh_pool(features, transform)


def test_raw_op_refuses_what_would_read_beyond_a_tensor():
    if pahm_ops.backends()["mesh_pool"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    transform = MeshTransform.prepare(matrix(9, 6))
    x = torch.randn(2, 6, 5)
    pointers, columns, values = transform.forward
    bad = columns.clone()
    bad[3] = 6
    falling = pointers.clone()
    falling[2] = falling[-1] + 1
    cases = [
        (IndexError, (x, pointers, bad, values)),
        (IndexError, (x, pointers, -1 - columns, values)),
        (ValueError, (x, falling, columns, values)),
        (ValueError, (x, pointers[1:], columns, values)),
        (ValueError, (x, pointers[:0], columns, values)),
        (ValueError, (x, pointers, columns, values[1:])),
        (ValueError, (x, pointers, columns.long(), values)),
        (ValueError, (x, pointers, columns, values.half())),
        (ValueError, (x[0], pointers, columns, values)),
    ]
    for error, call in cases:
        with pytest.raises(error, match=r"must"):
            torch.ops.pahm_ops.mesh_pool(*call, *transform.backward)


def test_more_than_two_to_the_31_elements():
    # Untouched pages of the input cost no memory: only its last rows are written and read.
    if pahm_ops.backends()["mesh_pool"]["cpu"] == "reference":
        pytest.skip("nothing was compiled")
    vertices, channels = 2**27 + 8, 16
    try:
        x = torch.empty(1, vertices, channels)
    except RuntimeError:
        pytest.skip("not enough address space")
    x[0, -8:] = torch.randn(8, channels)
    pointers, columns, values = (t := MeshTransform.prepare(matrix(9, 8))).forward
    actual = torch.ops.pahm_ops.mesh_pool(x, pointers, columns + vertices - 8, values, *t.backward)
    torch.testing.assert_close(actual, mesh_pool(x[:, -8:].clone(), t))
