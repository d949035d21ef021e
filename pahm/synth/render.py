"""A small ray caster for triangle meshes: Embree finds what each pixel sees, numpy shades it.

Camera space is OpenCV's: x right, y down, z forward, metres. Pixels are measured from the centre of the
top-left pixel: K projects every point on the ray of pixel (row i, column j) to (j, i).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore import EmbreeDevice
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix

Float = NDArray[np.float32]
Int = NDArray[np.int32]

_SUBPIXELS = np.array([[-0.125, -0.375], [0.375, -0.125], [0.125, 0.375], [-0.375, 0.125]], np.float32)
_BIAS = (
    1e-3  # metres; shadow rays start this far off the surface, since smooth normals differ from facet normals
)
_REACH = 0.06  # metres; the length of ambient-occlusion rays


@dataclass(frozen=True)
class Light:
    """One distant light and an ambient term, in linear RGB where 1 is white.

    `direction` points from the surface to the light, in camera space; it need not have unit length.
    `wrap` in [0, 1] lets light reach around the surface, as skin does. `specular` is the height of a
    highlight with exponent `shininess`. `shadow` in [0, 1] is how dark cast shadows are. `occlusion_rays` is
    the number of directions probed for ambient occlusion at each vertex, 0 for none.
    """

    direction: tuple[float, float, float] = (-0.4, -0.6, -0.8)
    colour: tuple[float, float, float] = (0.75, 0.75, 0.75)
    ambient: tuple[float, float, float] = (0.35, 0.35, 0.35)
    wrap: float = 0.0
    specular: float = 0.0
    shininess: float = 20.0
    shadow: float = 0.0
    occlusion_rays: int = 0

    def __post_init__(self) -> None:
        length = float(np.linalg.norm(self.direction))
        if len(self.direction) != 3 or not np.isfinite(length) or length == 0:
            raise ValueError(f"direction: expected three finite numbers, not all 0, got {self.direction}")


class Rendering(NamedTuple):
    """The arrays that `render_mesh` returns for one image of height H and width W."""

    rgb: Float
    """`(H, W, 3)`, 0 to 1: the shaded mesh over the background, silhouettes anti-aliased."""
    alpha: Float
    """`(H, W)`, the fraction of each pixel that the mesh covers, in quarters."""
    mask: NDArray[np.bool_]
    """`(H, W)`, whether the ray through the pixel's centre hits the mesh."""
    depth: Float
    """`(H, W)`, z in metres at the pixel's centre, infinity where nothing is hit."""
    faces: Int
    """`(H, W)`, index of the face at the pixel's centre, -1 where nothing is hit."""


class Hits(NamedTuple):
    """First hits of n rays: face ids `(n,)`, -1 for none; depth `(n,)`; barycentric weights `(n, 3)`."""

    faces: Int
    depth: Float
    weights: Float


@cache
def _device() -> EmbreeDevice:
    return EmbreeDevice()


class Scene:
    """A triangle mesh in camera space that rays can be cast at.

    Parameters: `vertices` (N, 3), metres; `faces` (F, 3), indices into them.
    Raises ValueError or TypeError, naming the argument, for a wrong shape or dtype, for vertices that are
    not finite and for indices out of range.
    """

    def __init__(self, vertices: ArrayLike, faces: ArrayLike) -> None:
        points, indices = np.asarray(vertices), np.asarray(faces)
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"vertices: expected shape (N, 3), got {points.shape}")
        if points.dtype.kind != "f":
            raise TypeError(f"vertices: expected floating-point numbers, got {points.dtype}")
        if not np.isfinite(points).all():
            raise ValueError("vertices: every coordinate must be finite, got NaN or infinity")
        if indices.ndim != 2 or indices.shape[1] != 3:
            raise ValueError(f"faces: expected shape (F, 3), got {indices.shape}")
        if indices.dtype.kind not in "iu":
            raise TypeError(f"faces: expected integers, got {indices.dtype}")
        if indices.size and not (indices.min() >= 0 and indices.max() < len(points)):
            raise ValueError(
                f"faces: indices must lie in [0, {len(points)}), got {indices.min()} to {indices.max()}"
            )
        self.vertices = np.ascontiguousarray(points, dtype=np.float32)
        self.faces = np.ascontiguousarray(indices, dtype=np.int32)
        self._embree = EmbreeScene(_device(), robust=True)
        if len(self.faces):
            TriangleMesh(self._embree, self.vertices, self.faces)

    def cast(self, directions: Float) -> Hits:
        """First hits of rays from the camera along `directions` (n, 3) with z = 1, float32."""
        count = len(directions)
        if not (count and len(self.faces)):
            return Hits(
                np.full(count, -1, np.int32),
                np.full(count, np.inf, np.float32),
                np.zeros((count, 3), np.float32),
            )
        found = self._embree.run(np.zeros_like(directions), directions, output=True)
        faces = found["primID"]
        u, v = found["u"], found["v"]
        depth = np.where(faces >= 0, found["tfar"], np.float32(np.inf))
        return Hits(faces, depth, np.stack([1 - u - v, u, v], axis=1))

    def blocked(self, origins: Float, directions: Float, reach: float = 1e37) -> NDArray[np.bool_]:
        """Whether rays from `origins` (n, 3) hit the mesh within `reach`; `directions` (n, 3) or (1, 3)."""
        if not (len(origins) and len(self.faces)):
            return np.zeros(len(origins), bool)
        found: Int = self._embree.run(origins, directions, dists=reach, query="OCCLUDED")
        return found >= 0


def vertex_normals(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> Float:
    """Unit normals (N, 3) float32 of vertices (N, 3): the area-weighted mean of their faces' normals."""
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    index = faces.ravel()
    sums = [np.bincount(index, np.repeat(normals[:, axis], 3), len(vertices)) for axis in range(3)]
    total = np.stack(sums, axis=1)
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-20)).astype(np.float32)


def sphere_directions(count: int) -> Float:
    """`count` unit vectors (count, 3) float32 spread evenly over the sphere, on a Fibonacci spiral."""
    index = np.arange(count) + 0.5
    z = 1 - 2 * index / count
    angle = np.pi * (1 + 5**0.5) * index
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1).astype(np.float32)


def ambient_occlusion(scene: Scene, normals: Float, rays: int) -> Float:
    """The cosine-weighted share (N,) of each vertex's hemisphere that is free of surfaces within 6 cm.

    It is 1 at vertices that face so far away from the camera that no pixel can show them.
    """
    directions = sphere_directions(rays)
    cosine = normals @ directions.T
    visible = _dot(_unit(scene.vertices), normals) < 0.4
    vertex, ray = np.nonzero((cosine > 0.05) & visible[:, None])
    origins = (scene.vertices + _BIAS * normals)[vertex]
    weight = cosine[vertex, ray]
    free = weight * ~scene.blocked(origins, directions[ray], _REACH)
    count = len(normals)
    total = np.bincount(vertex, weight, count)
    share = np.bincount(vertex, free, count) / np.maximum(total, 1e-6)
    return np.where(total > 0, share, 1).astype(np.float32)


def _pixel_rays(inverse: NDArray[np.float64], u: Float, v: Float) -> Float:
    """Directions (n, 3), with z = 1, of the rays through the pixels (u, v)."""
    pixels = np.stack([u, v, np.ones_like(u)], axis=1)
    return np.ascontiguousarray(pixels @ inverse.T.astype(np.float32))


def _dot(a: Float, b: Float) -> Float:
    return np.einsum("ni,ni->n", a, b)


def _unit(vectors: Float) -> Float:
    lengths: Float = np.sqrt(_dot(vectors, vectors))
    return vectors / np.maximum(lengths, np.float32(1e-12))[:, None]


def _interpolate(table: Float, corners: Int, weights: Float) -> Float:
    """Rows of `table` (N, C) mixed with barycentric `weights` (n, 3) of `corners` (n, 3): (n, C)."""
    starts = np.arange(0, 3 * len(corners) + 1, 3, dtype=np.int32)
    shape = (len(corners), len(table))
    return np.asarray(csr_matrix((weights.ravel(), corners.ravel(), starts), shape=shape) @ table)


def _shade(
    scene: Scene,
    hits: Hits,
    directions: Float,
    normals: Float,
    colours: Float,
    light: Light,
    openness: Float | None,
) -> Float:
    """Linear colours (n, 3) of hits. Every hit must be on the mesh."""
    table = colours if openness is None else np.concatenate([colours, openness[:, None]], axis=1)
    table = np.concatenate([normals, table], axis=1)
    values = _interpolate(table, scene.faces[hits.faces], hits.weights)
    normal, albedo = _unit(values[:, :3]), values[:, 3:6]
    back = _dot(normal, directions) > 0
    normal[back] *= -1

    towards = np.asarray(light.direction, np.float32)
    towards = towards / np.linalg.norm(towards)
    cosine = normal @ towards
    lit = np.clip((cosine + light.wrap) / (1 + light.wrap), 0, None)
    gloss = np.zeros_like(lit)
    if light.specular > 0:
        half = _unit(towards - _unit(directions))
        gloss = light.specular * np.clip(_dot(normal, half), 0, 1) ** light.shininess * (cosine > 0)
    if light.shadow > 0:
        exposed = np.flatnonzero(lit > 0)
        points = (directions * hits.depth[:, None] + 2 * _BIAS * normal)[exposed]
        shadowed = exposed[scene.blocked(np.ascontiguousarray(points), towards[None])]
        lit[shadowed] *= 1 - light.shadow
        gloss[shadowed] *= 1 - light.shadow
    ambient = np.ones_like(lit) if openness is None else values[:, 6]
    radiance = lit[:, None] * np.asarray(light.colour, np.float32)
    radiance += ambient[:, None] * np.asarray(light.ambient, np.float32)
    return np.asarray(albedo * radiance + gloss[:, None] * np.asarray(light.colour, np.float32), np.float32)


def _edges(hits: Hits, height: int, width: int) -> NDArray[np.bool_]:
    """Mask (height, width) of pixels next to a depth step: silhouettes and fingers crossing each other."""
    hit = (hits.faces >= 0).reshape(height, width)
    depth = np.where(hit, hits.depth.reshape(height, width), 0)
    edge = np.zeros((height, width), bool)
    for axis in (0, 1):
        steps = np.abs(np.diff(depth, axis=axis)) > 0.006 * np.maximum(
            np.delete(depth, 0, axis=axis), np.delete(depth, -1, axis=axis)
        )
        before, after = (edge[:-1], edge[1:]) if axis == 0 else (edge[:, :-1], edge[:, 1:])
        before |= steps
        after |= steps
    return edge


def _check_camera(K: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    camera = np.asarray(K, dtype=np.float64)
    if camera.shape != (3, 3):
        raise ValueError(f"K: expected shape (3, 3), got {camera.shape}")
    if not np.isfinite(camera).all() or np.abs(camera[2] - (0, 0, 1)).max() > 0 or np.linalg.det(camera) == 0:
        raise ValueError(
            f"K: expected finite, invertible intrinsics whose last row is 0 0 1, got {camera.tolist()}"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (height, width) of at least one pixel, got {tuple(size)}")
    return camera


def _check_colours(colours: ArrayLike, count: int) -> Float:
    table = np.asarray(colours, dtype=np.float32)
    if table.shape not in ((3,), (count, 3)):
        raise ValueError(f"colours: expected shape (3,) or ({count}, 3), one a vertex, got {table.shape}")
    return np.broadcast_to(table, (count, 3))


class _Window(NamedTuple):
    """The part of the image that a mesh can touch, and the hits of the rays through its pixel centres."""

    box: tuple[slice, slice]
    inverse: NDArray[np.float64]
    u: Float
    v: Float
    rays: Float
    hits: Hits


def _trace(scene: Scene, camera: NDArray[np.float64], size: tuple[int, int]) -> _Window | None:
    """Cast one ray per pixel of the mesh's projected box; None if the box is outside the image."""
    behind = int((scene.vertices[:, 2] <= 0).sum())
    if behind:
        raise ValueError(
            f"vertices: {behind} of {len(scene.vertices)} have z <= 0, expected all in front of the camera"
        )
    if not len(scene.faces):
        return None
    projected = scene.vertices.astype(np.float64) @ camera.T
    projected = projected[:, :2] / projected[:, 2:]
    bounds = (size[1], size[0])
    left, top = np.clip(np.floor(projected.min(axis=0)) - 1, 0, bounds).astype(int)
    right, bottom = np.clip(np.ceil(projected.max(axis=0)) + 2, 0, bounds).astype(int)
    if left >= right or top >= bottom:
        return None
    box = np.s_[top:bottom, left:right]
    v, u = (axis.ravel() for axis in np.mgrid[box].astype(np.float32))
    inverse: NDArray[np.float64] = np.linalg.inv(camera).astype(np.float64)
    rays = _pixel_rays(inverse, u, v)
    return _Window(box, inverse, u, v, rays, scene.cast(rays))


def trace(
    vertices: ArrayLike,
    faces: ArrayLike,
    K: ArrayLike,
    size: tuple[int, int],
    *,
    scene: Scene | None = None,
) -> tuple[Float, Int]:
    """Depth (H, W) float32 and face ids (H, W) int32 at the pixel centres, without shading.

    Infinity and -1 where nothing is hit. Parameters and errors are as in `render_mesh`.
    """
    camera = _check_camera(K, size)
    depth, ids = np.full(size, np.inf, np.float32), np.full(size, -1, np.int32)
    window = _trace(scene or Scene(vertices, faces), camera, size)
    if window is not None:
        depth[window.box] = window.hits.depth.reshape(depth[window.box].shape)
        ids[window.box] = window.hits.faces.reshape(ids[window.box].shape)
    return depth, ids


def render_mesh(
    vertices: ArrayLike,
    faces: ArrayLike,
    K: ArrayLike,
    size: tuple[int, int],
    *,
    colours: ArrayLike = (0.8, 0.8, 0.8),
    light: Light = Light(),
    background: ArrayLike = (0.0, 0.0, 0.0),
    scene: Scene | None = None,
) -> Rendering:
    """Render a triangle mesh through an exact pinhole camera.

    Parameters: `vertices` (N, 3) floating, camera space, metres; `faces` (F, 3) integer, counter-clockwise
    seen from outside; `K` (3, 3), pixels measured from the centre of the top-left pixel; `size` (H, W);
    `colours`, linear RGB, one `(3,)` or one per vertex `(N, 3)`; `light`; `background`, one colour `(3,)` or
    an image `(H, W, 3)`; `scene`, of this mesh, if there is one already. Casts one ray per pixel of the
    mesh's box, four at edges.

    Raises ValueError or TypeError, naming the argument, for a wrong shape, a wrong dtype or an index out of
    range, and if any vertex is not in front of the camera (z <= 0).
    """
    camera = _check_camera(K, size)
    scene = scene or Scene(vertices, faces)
    table = _check_colours(colours, len(scene.vertices))
    height, width = size
    canvas = np.asarray(background, dtype=np.float32)
    if canvas.shape not in ((3,), (height, width, 3)):
        raise ValueError(f"background: expected shape (3,) or ({height}, {width}, 3), got {canvas.shape}")
    rgb = np.array(np.broadcast_to(canvas, (height, width, 3)))
    alpha = np.zeros((height, width), np.float32)
    depth = np.full((height, width), np.inf, np.float32)
    ids = np.full((height, width), -1, np.int32)
    result = Rendering(rgb, alpha, np.zeros((height, width), bool), depth, ids)
    window = _trace(scene, camera, size)
    if window is None:
        return result
    box, hits = window.box, window.hits
    rows, columns = depth[box].shape
    depth[box] = hits.depth.reshape(rows, columns)
    ids[box] = hits.faces.reshape(rows, columns)
    result.mask[box] = ids[box] >= 0

    edge = _edges(hits, rows, columns).ravel()
    inner = np.flatnonzero((hits.faces >= 0) & ~edge)
    edges = np.flatnonzero(edge)
    finer_u = (window.u[edges, None] + _SUBPIXELS[:, 0]).ravel()
    finer_v = (window.v[edges, None] + _SUBPIXELS[:, 1]).ravel()
    finer_rays = _pixel_rays(window.inverse, finer_u, finer_v)
    finer = scene.cast(finer_rays)
    struck = np.flatnonzero(finer.faces >= 0)

    normals = vertex_normals(scene.vertices, scene.faces)
    openness = ambient_occlusion(scene, normals, light.occlusion_rays) if light.occlusion_rays else None
    every = Hits(*(np.concatenate([a[inner], b[struck]]) for a, b in zip(hits, finer, strict=True)))
    directions = np.concatenate([window.rays[inner], finer_rays[struck]])
    shaded = _shade(scene, every, directions, normals, table, light, openness)

    samples = np.zeros((len(finer_rays), 4), np.float32)
    samples[struck] = np.concatenate([shaded[len(inner) :], np.ones((len(struck), 1), np.float32)], axis=1)
    blended = samples.reshape(len(edges), len(_SUBPIXELS), 4).mean(axis=1)
    inner_rows, inner_columns = np.divmod(inner, columns)
    edge_rows, edge_columns = np.divmod(edges, columns)
    colour, cover = rgb[box], alpha[box]
    colour[inner_rows, inner_columns] = shaded[: len(inner)]
    cover[inner_rows, inner_columns] = 1
    colour[edge_rows, edge_columns] *= 1 - blended[:, 3:]
    colour[edge_rows, edge_columns] += blended[:, :3]
    cover[edge_rows, edge_columns] = blended[:, 3]
    np.clip(colour, 0, 1, out=colour)
    return result
