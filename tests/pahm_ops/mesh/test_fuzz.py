"""Generated meshes: the compiled tables equal their definition, or refuse with a sentence.

The quick tests draw a few hundred cases, the slow ones 20,000 a function
(`pytest -m slow tests/pahm_ops/mesh/test_fuzz.py`); `tools/sanitize.sh` runs the same with the address and
undefined-behaviour sanitizers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pahm_ops.mesh import MeshHierarchy, spiral_indices
from pahm_ops.mesh._checks import compiled_tables
from pahm_ops.reference.spiral_indices import ordered_neighbors

pytestmark = pytest.mark.skipif(compiled_tables() is None, reason="installed without a compiler")
REFUSALS = (TypeError, ValueError, IndexError)
LARGEST, SMALLEST = np.finfo(np.float64).max, 5e-324
EXTREMES = [0.0, -0.0, SMALLEST, -SMALLEST, 1e-308, 1e-160, 1e77, 1e150, -1e154, 1e300, LARGEST, -LARGEST]

Draw = Callable[[st.SearchStrategy[Any]], Any]
Mesh = tuple[NDArray[np.float64], NDArray[np.int64]]


def grid(rows: int, columns: int) -> Mesh:
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    vertices = np.stack([i, j, (i * j) % 3], -1).reshape(-1, 3).astype(float)
    corner = (i * columns + j)[:-1, :-1].reshape(-1)
    lower = np.stack([corner, corner + columns, corner + columns + 1], -1)
    upper = np.stack([corner, corner + columns + 1, corner + 1], -1)
    return vertices, np.concatenate([lower, upper])


def double_pyramid(sides: int) -> Mesh:
    angle = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
    k = np.arange(sides)
    top = np.stack([k, (k + 1) % sides, 0 * k + sides], -1)
    bottom = np.stack([(k + 1) % sides, k, 0 * k + sides + 1], -1)
    return np.concatenate([ring, [[0, 0, 1.0], [0, 0, -1]]]), np.concatenate([top, bottom])


def random_mesh(draw: Draw, rng: np.random.Generator) -> Mesh:
    """A manifold, with or without boundary, a soup of triangles, or two of these; then changed at random."""
    kind = draw(st.sampled_from(["grid", "pyramid", "two", "soup", "none"]))
    if kind == "soup":
        n = draw(st.integers(1, 12))
        vertices, faces = rng.normal(size=(n, 3)), rng.integers(0, n, (draw(st.integers(0, 12)), 3))
    elif kind == "none":
        n = draw(st.integers(0, 3))
        vertices, faces = rng.normal(size=(n, 3)), np.zeros((0, 3), np.int64)
    else:
        vertices, faces = grid(draw(st.integers(2, 6)), draw(st.integers(2, 6)))
        if kind != "grid":
            closed, closed_faces = double_pyramid(draw(st.integers(3, 12)))
            both = kind == "two"
            faces = np.concatenate([faces, closed_faces + len(vertices)]) if both else closed_faces
            vertices = np.concatenate([vertices, closed + 9]) if both else closed
    for change in draw(st.just([]) | st.lists(st.sampled_from(CHANGES), max_size=2)):
        vertices, faces = change(rng, vertices, faces)
    return coordinates(draw, rng, vertices), faces


def duplicate_face(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    return v, np.concatenate([f, f[rng.integers(0, max(len(f), 1), min(len(f), 1))]])


def drop_faces(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    return v, f[rng.random(len(f)) < 0.8]


def flip_face(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    f = f.copy()
    f[: len(f) // 8] = f[: len(f) // 8, ::-1]
    return v, f


def move_corner(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    f = f.copy()
    if f.size:
        f[rng.integers(len(f)), rng.integers(3)] = rng.integers(len(v))
    return v, f


def add_isolated(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    return np.concatenate([v, rng.normal(size=(2, 3))]), f


def shuffle(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    order = rng.permutation(len(v))
    return v[np.argsort(order)], rng.permutation(order[f])


def same_place(rng: np.random.Generator, v: NDArray, f: NDArray) -> Mesh:
    return v[rng.integers(0, max(len(v), 1), len(v))], f


CHANGES = [duplicate_face, drop_faces, flip_face, move_corner, add_isolated, shuffle, shuffle, same_place]


def coordinates(draw: Draw, rng: np.random.Generator, vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The vertices at any size and place that a double holds, some or all of them extreme."""
    kind = draw(st.sampled_from(["as they are", "noisy", "scaled", "axes", "far", "some", "all"]))
    v = np.array(vertices, dtype=np.float64)
    with np.errstate(over="ignore"):
        if kind == "noisy":
            v += rng.normal(size=v.shape) * 0.1
        elif kind == "scaled":
            v = np.ldexp(v, draw(st.integers(-1080, 1023)))
        elif kind == "axes":
            v = np.ldexp(v, rng.integers(-1080, 1023, 3))
        elif kind == "far":
            v += draw(st.sampled_from(EXTREMES)) * np.array([1.0, -1, 1])
        elif kind == "some":
            v = np.where(rng.random(v.shape) < 0.1, rng.choice(EXTREMES, v.shape), v)
        elif kind == "all":
            v = rng.choice(EXTREMES, v.shape)
    return np.clip(v, -LARGEST, LARGEST)


def case_spirals(draw: Draw) -> None:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vertices, faces = random_mesh(draw, rng)
    dilation = draw(st.integers(1, 3))
    length = draw(st.integers(1, len(vertices) // dilation + 1))
    positions = vertices if draw(st.integers(0, 4)) else None

    def answer() -> Any:
        try:
            return spiral_indices(faces, length, dilation, positions)
        except ValueError as error:
            assert "\n" not in str(error)
            return str(error)

    compiled = answer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pahm_ops.mesh.spirals.compiled_tables", lambda: None)
        defined = answer()
    assert np.array_equal(compiled, defined), (compiled, defined)


def case_levels(draw: Draw) -> None:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vertices, faces = random_mesh(draw, rng)
    n = len(vertices)
    coarse = draw(st.lists(st.integers(max(n // 3, 1), max(n - 1, 1)), min_size=1, max_size=3, unique=True))
    sizes = [n, *sorted(coarse, reverse=True)]
    try:
        built = MeshHierarchy.build(vertices, faces, sizes)
    except ValueError as error:
        assert len(str(error)) > 15 and "\n" not in str(error)
        return
    assert built.sizes == tuple(sizes)
    for s, up in enumerate(built.up):
        selected = built.selection(s + 1)
        assert (np.diff(selected) > 0).all()
        assert np.array_equal(np.unique(built.faces[s + 1]), np.arange(sizes[s + 1]))
        ordered_neighbors(built.faces[s + 1], sizes[s + 1])  # raises unless manifold
        assert up.data.min() > 0 and up.data.max() <= 1 and np.diff(up.indptr).max() <= 3
        assert np.abs(up.sum(axis=1) - 1).max() <= 1e-12
        kept = built.down[s].indices
        assert np.array_equal(up[kept].toarray(), np.eye(sizes[s + 1]))


def exact_distances(points: NDArray, vertices: NDArray, faces: NDArray) -> NDArray[np.longdouble]:
    """(P, F) distances of points to triangles. Extended precision holds the fourth power of every double."""
    p, v = points.astype(np.longdouble)[:, None], vertices.astype(np.longdouble)
    a, b, c = (v[faces[:, k]] for k in range(3))
    best = np.full((len(points), len(faces)), np.inf, np.longdouble)
    for start, end in ((a, b), (b, c), (c, a)):
        step = end - start
        length = (step**2).sum(-1)
        along = ((p - start) * step).sum(-1) / np.where(length > 0, length, 1)
        nearest = start + np.clip(along, 0, 1)[..., None] * step
        best = np.minimum(best, np.sqrt(((p - nearest) ** 2).sum(-1)))
    normal = np.cross(b - a, c - a)
    area = (normal**2).sum(-1)
    area = np.where(area > 0, area, 1)
    to_b = (np.cross(p - a, c - a) * normal).sum(-1) / area
    to_c = (np.cross(b - a, p - a) * normal).sum(-1) / area
    inside = (to_b >= 0) & (to_c >= 0) & (to_b + to_c <= 1) & (normal**2).any(-1)
    offset = (p - a) - to_b[..., None] * (b - a) - to_c[..., None] * (c - a)
    return np.where(inside, np.minimum(best, np.sqrt((offset**2).sum(-1))), best)


def case_closest(draw: Draw) -> None:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vertices, faces = random_mesh(draw, rng)
    if len(faces) == 0:
        with pytest.raises(ValueError, match="faces must not be empty"):
            compiled_tables().closest(vertices, faces, vertices)
        return
    points = np.concatenate([vertices[rng.integers(0, len(vertices), 4)], rng.normal(size=(3, 3))])
    if draw(st.booleans()):
        points = np.concatenate([points, coordinates(draw, rng, points)])
    corners, weights = compiled_tables().closest(vertices, faces, points)
    assert {tuple(c) for c in corners.tolist()} <= {tuple(f) for f in faces.tolist()}
    assert weights.min() >= 0 and np.abs(weights.sum(1) - 1).max() <= 1e-12
    used = vertices[np.unique(faces)].astype(np.longdouble)
    reached = (vertices[corners].astype(np.longdouble) * weights[..., None]).sum(1)
    distance = np.sqrt(((reached - points) ** 2).sum(1))
    expected = exact_distances(points, vertices, faces).min(1)
    span = np.ptp(used, axis=0).max() + SMALLEST * 2**55
    # The mesh counts as one size, with the vertices of no face.
    span = max(span, np.ptp(vertices.astype(np.longdouble), axis=0).max())
    assert (distance <= expected + 1e-9 * (span + expected)).all()


def laid_out(draw: Draw, array: NDArray) -> Any:
    """The array, or something like it in another dtype, layout, shape or type, with indices out of range."""
    kind = draw(
        st.sampled_from(["as it is", "as it is", "as it is", "dtype", "strides", "shape", "values", "other"])
    )
    if kind == "dtype":
        kinds = ["f4", "i2", "u1", "u8", ">f8", ">i8", "c16", "?", "O", "S8", "U8", "m8[s]", "f2", "i4,i4"]
        try:
            with np.errstate(all="ignore"):
                return array.astype(draw(st.sampled_from(kinds)))
        except TypeError:
            return array
    if kind == "strides":
        views = [
            np.asfortranarray(array),
            array[::-1],
            array[:, ::-1] if array.ndim == 2 else array,
            array.repeat(2, 0)[::2],
            np.broadcast_to(array[:1], array.shape),
            np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape),
        ]
        return views[draw(st.integers(0, len(views) - 1))]
    if kind == "shape":
        shapes = [
            array.ravel(),
            array[None],
            array[:, :2],
            array[:0],
            array.T,
            array[0] if len(array) else array,
        ]
        return shapes[draw(st.integers(0, len(shapes) - 1))]
    if kind == "values" and array.size:
        array = array.copy()
        floats = [np.nan, np.inf, -np.inf, LARGEST, SMALLEST]
        integers = [-1, len(array), 2**31 - 1, 2**31, 2**32, -(2**31), 2**63 - 1, -(2**63)]
        array.flat[draw(st.integers(0, array.size - 1))] = draw(
            st.sampled_from(floats if array.dtype.kind == "f" else integers)
        )
        return array
    if kind == "other":
        return draw(
            st.sampled_from([None, 3, "faces", [], [[0, 1, 2]], {}, [[0, 1], [2]], np.zeros((2, 3), "V8")])
        )
    return array


def case_direct_calls(draw: Draw) -> None:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vertices, faces = random_mesh(draw, rng)
    tables, number = (
        compiled_tables(),
        st.integers(1, 5) | st.integers(-2, 60) | st.sampled_from([2**31, 2**63 - 1, 2**64, -(2**63)]),
    )
    given_vertices, given_faces = laid_out(draw, vertices), laid_out(draw, faces)
    right = st.just(len(vertices))
    count = draw(right | st.sampled_from([len(vertices) + 1, 0, -1, 2**31, 2**63 - 1, -(2**63)]))
    kind = draw(st.sampled_from(["spirals", "levels", "closest"]))
    sizes = draw(st.lists(number, max_size=3))
    try:
        if kind == "spirals":
            points = given_vertices if draw(st.booleans()) else None
            out = tables.spirals(given_faces, count, draw(number), draw(number), points)
            assert out.shape[0] == count and ((out >= 0) & (out < count)).all()
        elif kind == "levels":
            for selection, level in tables.levels(given_vertices, given_faces, sizes):
                assert ((selection >= 0) & (selection < np.shape(given_vertices)[0])).all()
                assert ((level >= 0) & (level < len(selection))).all()
        else:
            corners, weights = tables.closest(given_vertices, given_faces, laid_out(draw, vertices))
            assert ((corners >= 0) & (corners < np.shape(given_vertices)[0])).all()
            assert (np.abs(weights.sum(1) - 1) <= 1e-12).all()
    except REFUSALS as error:
        assert len(str(error)) > 10


CASES = {
    f.__name__.removeprefix("case_"): f for f in (case_spirals, case_levels, case_closest, case_direct_calls)
}
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(case: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=CHECKS, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        CASES[case](data.draw)

    run()


@pytest.mark.filterwarnings("ignore:Casting complex values:Warning")
@pytest.mark.parametrize("case", CASES)
def test_a_few_hundred_cases(case):
    fuzz(case, 200)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Casting complex values:Warning")
@pytest.mark.parametrize("case", CASES)
def test_twenty_thousand_cases(case):
    fuzz(case, 20_000)
