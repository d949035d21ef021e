"""FreiHAND's scores against a second implementation of the definition, in numpy and scipy alone."""

import json

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from pahm.cli import main
from pahm.score.metrics import write_submission
from pahm.score.protocol import score_predictions, score_submission

CENTRE = np.array([0.02, -0.01, 0.7])


class Curves:
    """Errors collected apart for each point, then averaged over points, as the official script does it."""

    def __init__(self):
        self.errors = []

    def add(self, truth, predicted):
        self.errors.append(np.sqrt(((truth - predicted) ** 2).sum(1)))

    def mean(self):
        return 1000 * np.mean([np.mean(column) for column in np.array(self.errors).T])

    def area(self):
        limits = np.linspace(0.0, 0.05, 100)
        curves = (np.array(self.errors)[..., None] <= limits).mean(0)  # one for each point
        curve = curves.mean(0)
        return np.trapezoid(curve, limits) / np.trapezoid(np.ones(100), limits)


def aligned(truth, predicted):
    target, source = truth - truth.mean(0), predicted - predicted.mean(0)
    target_size, source_size = np.linalg.norm(target) + 1e-8, np.linalg.norm(source) + 1e-8
    rotation, scale = orthogonal_procrustes(target / target_size, source / source_size)
    return (source / source_size) @ rotation.T * scale * target_size + truth.mean(0)


def f_score(truth, predicted, limit):
    to_predicted, _ = cKDTree(predicted).query(truth)
    to_truth, _ = cKDTree(truth).query(predicted)
    a, b = np.mean(to_predicted < limit), np.mean(to_truth < limit)
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def official(xyz, verts, true_xyz, true_verts):
    curves = {f"{kind}{points}": Curves() for kind in ("raw_", "") for points in ("joints", "vertices")}
    f = {"raw_f5": [], "raw_f15": [], "f5": [], "f15": []}
    for j, v, tj, tv in zip(xyz, verts, true_xyz, true_verts, strict=True):
        for kind, joints, vertices in (("raw_", j, v), ("", aligned(tj, j), aligned(tv, v))):
            curves[f"{kind}joints"].add(tj, joints)
            curves[f"{kind}vertices"].add(tv, vertices)
            for name, limit in (("f5", 0.005), ("f15", 0.015)):
                f[kind + name].append(f_score(tv, vertices, limit))
    scores = {name: np.mean(values) for name, values in f.items()}
    for kind, mean in (("raw_", "raw_"), ("", "pa_")):
        scores[f"{mean}mpjpe"] = curves[f"{kind}joints"].mean()
        scores[f"{mean}mpvpe"] = curves[f"{kind}vertices"].mean()
        scores[f"{kind}auc_joints"] = curves[f"{kind}joints"].area()
        scores[f"{kind}auc_vertices"] = curves[f"{kind}vertices"].area()
    return scores


def hands(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.04, (count, points, 3)) + CENTRE for points in (21, 778)]


def noisy(truth, noise, seed=1):
    rng = np.random.default_rng(seed)
    return [points + rng.normal(0, noise, points.shape) for points in truth]


def turned(truth, seed=2):
    """Another place, orientation and size for each hand, its joints and vertices apart."""
    rng = np.random.default_rng(seed)
    sets = []
    for points in noisy(truth, 0.003):
        turns = [Rotation.from_quat(rng.normal(size=4)).as_matrix() for _ in points]
        moved = [
            (p - CENTRE) @ r * rng.uniform(0.3, 3) + rng.normal(size=3)
            for p, r in zip(points, turns, strict=True)
        ]
        sets.append(np.array(moved))
    return sets


def steps(truth):
    """Every distance along x is one of the 100 thresholds or the next number above or below it."""
    limits = np.linspace(0.0, 0.05, 100)
    sets = []
    for points in truth:
        points[..., 0] = 0.0  # so that the differences are exact
        moved = points.copy()
        count = points.shape[0] * points.shape[1]
        lengths = np.resize(np.stack([limits, np.nextafter(limits, 0), np.nextafter(limits, 1)]), count)
        moved[..., 0] = lengths.reshape(points.shape[:2])
        sets.append(moved)
    return sets


def lattice(truth, limit):
    """Points 1 m apart, predicted at exactly the limit of an F-score, just below it and just above it."""
    joints, vertices = truth
    vertices[:] = 0.0
    vertices[..., 1] = np.arange(778) / 100
    moved = vertices.copy()
    moved[..., 0] = np.resize([limit, np.nextafter(limit, 0), np.nextafter(limit, 1)], 778)
    return [joints, moved]


def sheared_lattice(truth):
    """A grid of 5 mm and the grid moved by 5 mm: many neighbours at the limit, up to rounding."""
    joints, vertices = truth
    grid = np.stack(np.meshgrid(*[0.005 * np.arange(10)] * 3, indexing="ij"), -1).reshape(-1, 3)[:778]
    vertices[:] = grid + CENTRE
    moved = vertices + np.array([0.0, 0.0, 0.005])
    return [joints, moved]


CASES = {
    "noise": (20, lambda truth: noisy(truth, 0.006)),
    "large noise": (5, lambda truth: noisy(truth, 0.05)),
    "similarity": (20, turned),
    "mirrored": (8, lambda truth: [p * [-1, 1, 1] for p in noisy(truth, 0.004)]),
    "mirrored and turned": (8, lambda truth: [-p for p in turned(truth)]),
    "perfect": (3, lambda truth: [p.copy() for p in truth]),
    "one point": (3, lambda truth: [np.full_like(p, 0.1) for p in truth]),
    "almost one point": (3, lambda truth: [CENTRE + 1e-9 * (p - CENTRE) for p in truth]),
    "flat": (4, lambda truth: [p * [1, 1, 0] for p in noisy(truth, 0.004)]),
    "far away": (3, lambda truth: [p + 5 for p in truth]),
    "one hand": (1, lambda truth: noisy(truth, 0.006)),
    "exactly at the thresholds": (15, steps),
    "exactly at 5 mm": (2, lambda truth: lattice(truth, 0.005)),
    "exactly at 15 mm": (2, lambda truth: lattice(truth, 0.015)),
    "grid moved by 5 mm": (2, sheared_lattice),
    "more hands than a batch": (40, lambda truth: noisy(truth, 0.01)),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_definition(case, record_property):
    count, change = CASES[case]
    truth = hands(count)
    predicted = change(truth)
    scores, expected = score_predictions(*predicted, *truth), official(*predicted, *truth)
    assert set(scores) == set(expected) | {"images", "mpjpe"} and scores["images"] == count
    largest = max(abs(scores[name] - value) for name, value in expected.items())
    record_property("largest_difference", float(largest))
    print(f"{case}: {largest:.1e}")
    assert largest < 1e-6
    if case == "noise":
        assert 0.2 < expected["f5"] < 0.9 and 0.5 < expected["auc_joints"] < 0.95


def test_batches_do_not_matter(monkeypatch):
    truth = hands(7)
    predicted = noisy(truth, 0.01)
    whole = score_predictions(*predicted, *truth)
    monkeypatch.setattr("pahm.score.protocol._BATCH", 3)
    assert score_predictions(*predicted, *truth) == pytest.approx(whole, abs=1e-12)


def write_truth(folder, truth, kinds=("xyz", "verts")):
    for kind, points in zip(("xyz", "verts"), truth, strict=True):
        if kind in kinds:
            (folder / f"evaluation_{kind}.json").write_text(json.dumps(points.tolist()))


def test_a_file_is_scored_as_its_numbers_are(tmp_path):
    """The annotations count in full precision: in float32, half of these errors would be beyond 5 mm."""
    predicted = [(points + np.array([0, 0, 0.005])).round(7) for points in hands(2)]
    truth = [points - np.array([0, 0, 0.005 - 1e-9]) for points in predicted]
    write_truth(tmp_path, truth)
    write_submission(tmp_path / "pred.json", *predicted)
    scores = score_submission(tmp_path / "pred.json", tmp_path)
    expected = official(*predicted, *truth)
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert scores["raw_f5"] == 1 and scores["raw_mpjpe"] == pytest.approx(5 - 1e-6, abs=1e-8)


def score(folder, *options):
    return main(["eval", "--freihand", str(folder), "--submission", str(folder / "pred.json"), *options])


def test_the_command_prints_and_writes_the_scores(tmp_path, capsys):
    truth = hands(3)
    predicted = noisy(truth, 0.006)
    write_truth(tmp_path, truth)
    write_submission(tmp_path / "pred.json", *predicted)
    assert score(tmp_path) == 0
    written = json.loads((tmp_path / "pred.scores.json").read_text())
    assert written == score_submission(tmp_path / "pred.json", tmp_path)
    printed = capsys.readouterr().out
    for name in ("raw_mpjpe", "pa_mpvpe"):
        assert f"{written[name]:.2f}" in printed
    for name in ("raw_auc_vertices", "auc_joints", "raw_f5", "f15"):
        assert f"{written[name]:.3f}" in printed
    assert "pred.scores.json" in printed and "3 images" in printed


def test_joints_are_scored_alone(tmp_path, capsys):
    truth = hands(3)
    predicted = [points.round(7) for points in noisy(truth, 0.006)]
    write_truth(tmp_path, truth, kinds=("xyz",))
    write_submission(tmp_path / "pred.json", *predicted)
    assert score(tmp_path) == 2
    assert f"{tmp_path / 'evaluation_verts.json'} is missing" in capsys.readouterr().err
    assert score(tmp_path, "--joints-only") == 0
    written = json.loads((tmp_path / "pred.scores.json").read_text())
    expected = official(*predicted, *truth)
    joints = {"raw_mpjpe", "pa_mpjpe", "raw_auc_joints", "auc_joints"}
    assert set(written) == joints | {"images", "mpjpe"}
    assert {name: written[name] for name in joints} == pytest.approx(
        {name: expected[name] for name in joints}, abs=1e-6
    )
    for verts in ([], [[[0, 0, 0]] * 6890] * 3):  # none, or another mesh
        (tmp_path / "pred.json").write_text(json.dumps([predicted[0].tolist(), verts]))
        assert score_submission(tmp_path / "pred.json", tmp_path, joints_only=True) == written
        write_truth(tmp_path, truth)
        with pytest.raises(ValueError, match="verts: expected shape"):
            score_submission(tmp_path / "pred.json", tmp_path)


def break_count(folder, truth):
    write_submission(folder / "pred.json", *(points[:2] for points in truth))
    return rf"submission: expected 3 hands as in {folder}/evaluation_xyz.json, got 2 in {folder}/pred.json"


def break_truth_count(folder, truth):
    write_truth(folder, [truth[0], truth[1][:2]])
    return rf"submission: expected 2 hands as in {folder}/evaluation_verts.json, got 3"


def truncate_truth(folder, truth):
    path = folder / "evaluation_verts.json"
    path.write_text(path.read_text()[:-100])
    return f"{path} ends inside element 2"


def remove_truth(folder, truth):
    (folder / "evaluation_xyz.json").unlink()
    return f"freihand: {folder}/evaluation_xyz.json is missing"


def remove_submission(folder, truth):
    (folder / "pred.json").unlink()
    return f"{folder}/pred.json does not exist"


def truncate_submission(folder, truth):
    (folder / "pred.json").write_text((folder / "pred.json").read_text()[:5000])
    return f"{folder}/pred.json is not a FreiHAND submission"


def fill_submission(folder, truth):
    (folder / "pred.json").write_text('[{"xyz": 1}, null]')
    return f"{folder}/pred.json is not a FreiHAND submission: xyz: expected (N, 21, 3) numbers"


@pytest.mark.parametrize(
    "damage",
    [
        break_count,
        break_truth_count,
        truncate_truth,
        remove_truth,
        remove_submission,
        truncate_submission,
        fill_submission,
    ],
)
def test_bad_files_end_with_one_sentence(damage, tmp_path, capsys):
    truth = hands(3)
    write_truth(tmp_path, truth)
    write_submission(tmp_path / "pred.json", *truth)
    sentence = damage(tmp_path, truth)
    assert score(tmp_path) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "pred.scores.json").exists()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--data", "x", "--submission", "pred.json"], "--submission"),
        (["--data", "x", "--no-scale"], "--no-scale"),
        (["--data", "x", "--joints-only"], "--joints-only"),
        (["--freihand", "x", "--submission", "pred.json", "--left"], "--left"),
        (["--freihand", "x", "--submission", "pred.json", "--checkpoint", "y"], "--checkpoint"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, flag, capsys):
    assert main(["eval", *options]) == 2
    assert capsys.readouterr().err.startswith(f"pahm eval: {flag}: goes with")


@pytest.mark.parametrize("options", [[], ["--data", "x", "--freihand", "y"]])
def test_one_folder_is_required(options, capsys):
    assert main(["eval", *options]) == 2
    assert "--freihand" in capsys.readouterr().err


def test_counts_of_arrays_must_agree():
    truth = hands(2)
    with pytest.raises(ValueError, match="xyz: expected 2 hands as in true_xyz, at least 1, got 1"):
        score_predictions(truth[0][:1], truth[1][:1], *truth)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        score_predictions(*(points[:0] for points in truth * 2))
