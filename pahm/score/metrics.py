"""Scores of reconstructed hands, as FreiHAND's official script defines them, and its submission file.

Points are `(B, N, 3)` tensors in metres; sums are float64. The definitions are from Zimmermann et al.,
"FreiHAND" (ICCV 2019) and its published evaluation script. The paper's scores are in section 4.1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from pahm.text_files import read_json
from pahm.whole_file import whole_file

T = TypeVar("T")

F_THRESHOLDS = (0.005, 0.015)
PCK_MAXIMUM, PCK_STEPS = 0.05, 100
_LARGEST = 10.0  # metres across; a hand in millimetres or centimetres is larger
_PAIRS = 1 << 22  # distances held at once while looking for nearest neighbours


def align_with_scale(predicted: Tensor, truth: Tensor, *, reflection: bool = True) -> Tensor:
    """Align predictions with the truth by translation, rotation and scale (Procrustes analysis).

    predicted, truth: (B, N, 3), metres. reflection: allow a reflection if that fits better, as the official
    script does; with False the orthogonal matrix is always a rotation (METRO, CMR).
    Returns the aligned predictions (B, N, 3) in float64. Raises ValueError for wrong shapes or points that
    are not finite.
    """
    predicted, truth = _points(predicted, truth)
    truth_centre = truth.mean(1, keepdim=True)
    source, target = predicted - predicted.mean(1, keepdim=True), truth - truth_centre
    source_norm = torch.linalg.matrix_norm(source, keepdim=True) + 1e-8
    target_norm = torch.linalg.matrix_norm(target, keepdim=True) + 1e-8
    source, target = source / source_norm, target / target_norm
    u, values, vt = torch.linalg.svd(source.mT @ target)
    if not reflection:
        sign = torch.sign(torch.linalg.det(u) * torch.linalg.det(vt))
        values = torch.cat([values[:, :2], values[:, 2:] * sign[:, None]], dim=1)
        u = torch.cat([u[:, :, :2], u[:, :, 2:] * sign[:, None, None]], dim=2)
    return source @ (u @ vt) * values.sum(1)[:, None, None] * target_norm + truth_centre


def point_errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """Euclidean distances (B, N) in metres, float64, between points (B, N, 3) of the same index."""
    return _distances(*_points(predicted, truth))


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Distances between points (..., 3), bit for bit as numpy computes them step by step."""
    x, y, z = (first - second).square().unbind(-1)
    squares = x + y + z
    # Torch uses MKL's square root on the CPU, which is not always correctly rounded.
    return torch.from_numpy(np.sqrt(squares.numpy())) if squares.device.type == "cpu" else squares.sqrt()


def procrustes_errors(predicted: Tensor, truth: Tensor, *, reflection: bool = True) -> Tensor:
    """Distances (B, N) in metres after `align_with_scale`. Their mean is PA-MPJPE or PA-MPVPE."""
    return point_errors(align_with_scale(predicted, truth, reflection=reflection), truth)


def f_scores(predicted: Tensor, truth: Tensor, thresholds: Sequence[float] = F_THRESHOLDS) -> Tensor:
    """F-scores (B, T) at T distances in metres: the harmonic mean of precision and recall.

    Precision is the share of predicted points (B, N, 3) with a true point (B, M, 3) strictly nearer than the
    threshold; recall is the reverse. The score is 0 if both are 0. Raises ValueError for wrong shapes.
    """
    predicted, truth = _points(predicted, truth, same_count=False)
    limits = torch.tensor(list(thresholds), dtype=torch.float64, device=truth.device)
    step = max(1, _PAIRS // max(1, predicted.shape[1] * truth.shape[1]))
    scores = [
        _f_scores(*chunk, limits) for chunk in zip(predicted.split(step), truth.split(step), strict=True)
    ]
    return torch.cat(scores) if scores else truth.new_zeros(0, len(limits))


def _f_scores(predicted: Tensor, truth: Tensor, limits: Tensor) -> Tensor:
    # |p - t|^2 of all pairs as one matrix product. Its cancellation error is 1e-15 of the largest |p|^2.
    centre = truth.mean(1, keepdim=True)
    p, t = predicted - centre, truth - centre
    p_squares, t_squares = p.square().sum(-1, keepdim=True), t.square().sum(-1, keepdim=True)
    left = torch.cat([-2 * p, p_squares, torch.ones_like(p_squares)], dim=-1)
    squares = left @ torch.cat([t, torch.ones_like(t_squares), t_squares], dim=-1).mT
    nearest = [squares.amin(2), squares.amin(1)]
    hits = [values[..., None] < limits**2 for values in nearest]
    # If that error could decide a comparison, as for points exactly at a threshold, compute exactly.
    margin = 1e-13 * torch.maximum(p_squares.amax(1), t_squares.amax(1))[..., None]
    doubts = [((values[..., None] - limits**2).abs() <= margin).any(2).any(1) for values in nearest]
    for index in (doubts[0] | doubts[1]).nonzero().flatten().tolist():
        distances = _distances(predicted[index, :, None], truth[index, None])
        for dim, values in ((1, hits[0]), (0, hits[1])):
            values[index] = distances.amin(dim)[:, None] < limits
    precision, recall = (values.double().mean(1) for values in hits)
    return 2 * precision * recall / (precision + recall).clamp_min(1e-300)


def pck_counts(errors: Tensor, maximum: float = PCK_MAXIMUM, steps: int = PCK_STEPS) -> Tensor:
    """Count the errors (any shape, metres) that are at most each of `steps` thresholds from 0 to `maximum`.

    Returns (steps,) int64.
    """
    # Use numpy's linspace; torch rounds some of these thresholds differently.
    limits = torch.from_numpy(np.linspace(0, maximum, steps)).to(errors.device)
    ordered = errors.flatten().double().sort().values
    return torch.searchsorted(ordered, limits, right=True)


def auc_of_pck(counts: Tensor, total: Tensor | int) -> Tensor:
    """Area under the PCK curve by the trapezoidal rule, divided by the range: 0 to 1.

    counts: (steps,), as from `pck_counts`. total: number of errors counted.
    """
    curve = counts.double() / total
    return (curve.sum() - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)


class HandMetrics(Metric):
    """FreiHAND's scores over all samples seen; lengths are in millimetres.

    `update(joints, true_joints, vertices, true_vertices)` takes (B, 21, 3) and (B, 778, 3) tensors in
    metres. Predictions may be relative to any origin, since each set is aligned separately. Without
    vertices only the joints are scored.
    `compute()` returns a dict of float64 scalars: `pa_mpjpe`, `pa_mpvpe` (mean error in mm after alignment
    with scale), `f5`, `f15` (F-scores of the aligned vertices at 5 and 15 mm), `auc_joints`, `auc_vertices`
    (of PCK from 0 to 50 mm, aligned), and `mpjpe` (mm, both relative to the root joint, not aligned); NaN if
    there was nothing to score.

    reflection: see `align_with_scale`. root_joint: index of the joint that `mpjpe` is relative to. raw: also
    score the unaligned points in camera space: `raw_mpjpe`, `raw_mpvpe`, `raw_f5`, `raw_f15`,
    `raw_auc_joints` and `raw_auc_vertices`.
    Raises ValueError for wrong shapes, different batch sizes and points that are not finite.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self, *, reflection: bool = True, root_joint: int = 9, raw: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.reflection = reflection
        self.root_joint = root_joint
        self.raw = raw
        self._add("samples", torch.int64)
        self._add("meshes", torch.int64)
        self._add("root_error")
        for kind in self._kinds:
            for points in ("joint", "vertex"):
                self._add(f"{kind}_{points}_error")
                self._add(f"{kind}_{points}_pck", torch.int64, PCK_STEPS)
                self._add(f"{kind}_{points}_count", torch.int64)
            self._add(f"{kind}_f_sums", torch.float64, len(F_THRESHOLDS))

    samples: Tensor
    meshes: Tensor
    root_error: Tensor

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("aligned", "raw") if self.raw else ("aligned",)

    def _add(self, name: str, dtype: torch.dtype = torch.float64, *size: int) -> None:
        self.add_state(name, torch.zeros(size, dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        try:
            fn(torch.zeros(1, dtype=torch.float64, device="cpu"))
        except TypeError:
            return self  # a device without float64, such as Apple's, keeps the sums on the CPU
        return super()._apply(fn, exclude_state)

    @torch.no_grad()
    def update(
        self,
        joints: Tensor,
        true_joints: Tensor,
        vertices: Tensor | None = None,
        true_vertices: Tensor | None = None,
    ) -> None:
        """Add a batch; see the class."""
        if (vertices is None) != (true_vertices is None):
            raise ValueError("vertices: expected both predicted and true ones, or neither")
        if vertices is not None and len(joints) != len(vertices):
            raise ValueError(f"vertices: expected a batch of {len(joints)} as in joints, got {len(vertices)}")
        # Check and compute everything before adding anything.
        root = slice(self.root_joint, self.root_joint + 1)
        relative = point_errors(joints - joints[:, root], true_joints - true_joints[:, root])
        sums = {"samples": torch.tensor(len(joints)), "root_error": relative.mean(1).sum()}
        sums |= self._sums("joint", joints, true_joints)
        if vertices is not None and true_vertices is not None:
            sums |= {"meshes": torch.tensor(len(vertices))} | self._sums("vertex", vertices, true_vertices)
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value.to(self.samples.device))

    def _sums(self, points: str, predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """The amounts that a batch of joints or vertices adds to the states."""
        sums = {}
        for kind in self._kinds:
            placed = predicted
            if kind == "aligned":
                placed = align_with_scale(predicted, truth, reflection=self.reflection)
            errors = point_errors(placed, truth)
            sums[f"{kind}_{points}_error"] = errors.mean(1).sum()
            sums[f"{kind}_{points}_pck"] = pck_counts(errors)
            sums[f"{kind}_{points}_count"] = torch.tensor(errors.numel())
            if points == "vertex":
                sums[f"{kind}_f_sums"] = f_scores(placed, truth).sum(0)
        return sums

    def compute(self) -> dict[str, Tensor]:
        """The scores; see the class."""
        scores = {}
        for kind in self._kinds:
            mean, other = ("pa_", "") if kind == "aligned" else ("raw_", "raw_")
            f_mean = getattr(self, f"{kind}_f_sums") / self.meshes
            scores[f"{mean}mpjpe"] = 1000 * getattr(self, f"{kind}_joint_error") / self.samples
            scores[f"{mean}mpvpe"] = 1000 * getattr(self, f"{kind}_vertex_error") / self.meshes
            scores[f"{other}f5"], scores[f"{other}f15"] = f_mean[0], f_mean[1]
            for points, plural in (("joint", "joints"), ("vertex", "vertices")):
                counts, total = (getattr(self, f"{kind}_{points}_{what}") for what in ("pck", "count"))
                scores[f"{other}auc_{plural}"] = auc_of_pck(counts, total)
        return scores | {"mpjpe": 1000 * self.root_error / self.samples}


def write_submission(
    path: str | os.PathLike[str], xyz: npt.ArrayLike | Tensor, verts: npt.ArrayLike | Tensor
) -> None:
    """Write FreiHAND's `pred.json`, the JSON array `[xyz, verts]`, completely or not at all.

    xyz: (N, 21, 3) joints, verts: (N, 778, 3) vertices of the N evaluation images in order, metres, camera
    space; written to a tenth of a micrometre. Raises ValueError for wrong shapes, for values that are not
    finite and for hands more than 10 across (median extent), which cannot be in metres.
    """
    arrays = _submission(xyz, verts)
    for name, array in zip(("xyz", "verts"), arrays, strict=True):
        size = np.median(np.ptp(array, axis=1).max(axis=1))
        if size > _LARGEST:
            raise ValueError(f"{name}: expected metres, got hands that are {size:.3g} across")
    with whole_file(path, shared=True) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.writelines(_submission_text(arrays))


def load_submission(
    path: str | os.PathLike[str],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Read a `pred.json`. Returns joints (N, 21, 3) and vertices (N, 778, 3), float64, of any size.

    Raises FileNotFoundError, or ValueError naming the file if it is not such a submission.
    """
    return _load(path, _submission)


def load_joints(path: str | os.PathLike[str]) -> npt.NDArray[np.float64]:
    """Read the joints (N, 21, 3) of a `pred.json` as `load_submission` does, whatever its vertices are."""
    return _load(path, lambda xyz, verts: _hands("xyz", xyz, 21))


def _load(path: str | os.PathLike[str], check: Callable[[Any, Any], T]) -> T:
    try:
        content = read_json(path, limit=1 << 30)
        if not (isinstance(content, list) and len(content) == 2):
            raise ValueError("expected a JSON array of two, [xyz, verts]")
        return check(*content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not a FreiHAND submission: {error}") from error


def _submission_text(arrays: Iterable[npt.NDArray[np.float64]]) -> Iterator[str]:
    yield "["
    for which, array in enumerate(arrays):
        yield ",[" if which else "["
        for index, points in enumerate(array):
            yield ("," if index else "") + json.dumps(points.round(7).tolist(), separators=(",", ":"))
        yield "]"
    yield "]\n"


def _submission(xyz: Any, verts: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    joints, vertices = _hands("xyz", xyz, 21), _hands("verts", verts, 778)
    if len(joints) != len(vertices):
        raise ValueError(f"verts: expected {len(joints)} samples as in xyz, got {len(vertices)}")
    return joints, vertices


def _hands(name: str, values: Any, count: int) -> npt.NDArray[np.float64]:
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected (N, {count}, 3) numbers, got something else: {error}") from error
    if array.ndim != 3 or array.shape[1:] != (count, 3) or len(array) == 0:
        raise ValueError(f"{name}: expected shape (N, {count}, 3) with N > 0, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, sample {_first_bad(array)} has others")
    return array


def _first_bad(array: npt.NDArray[np.float64]) -> int:
    return int(np.argmin(np.isfinite(array).all(axis=(1, 2))))


def _points(predicted: Tensor, truth: Tensor, *, same_count: bool = True) -> tuple[Tensor, Tensor]:
    """Check two sets of points and return them in float64."""
    if predicted.dim() != 3 or predicted.shape[2] != 3 or predicted.shape[1] == 0:
        raise ValueError(f"predicted: expected shape (B, N, 3) with N > 0, got {tuple(predicted.shape)}")
    if truth.dim() != 3 or truth.shape[2] != 3 or truth.shape[1] == 0 or len(truth) != len(predicted):
        raise ValueError(
            f"truth: expected shape ({len(predicted)}, N, 3) with N > 0, got {tuple(truth.shape)}"
        )
    if same_count and truth.shape != predicted.shape:
        raise ValueError(f"truth: expected {predicted.shape[1]} points a sample, got {truth.shape[1]}")
    for name, points in (("predicted", predicted), ("truth", truth)):
        if not torch.isfinite(points).all():
            raise ValueError(f"{name}: expected finite points, got NaN or infinity")
    return _float64(predicted), _float64(truth)


def _float64(points: Tensor) -> Tensor:
    """Convert to float64, on the points' device or on the CPU if the device has no float64."""
    place = "cpu" if points.device.type == "mps" else points.device
    return points.detach().to(place).double()
