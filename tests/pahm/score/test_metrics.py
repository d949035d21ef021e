"""Scores against a plain reading of FreiHAND's definitions, one sample and one point at a time."""

import json
import math
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.transform import Rotation

from pahm.score.metrics import (
    HandMetrics,
    align_with_scale,
    auc_of_pck,
    f_scores,
    load_joints,
    load_submission,
    pck_counts,
    point_errors,
    procrustes_errors,
    write_submission,
)


def official_alignment(truth, predicted):
    """FreiHAND's alignment of one sample (N, 3)."""
    truth_centre, predicted_centre = truth.mean(0), predicted.mean(0)
    a, b = truth - truth_centre, predicted - predicted_centre
    a_norm, b_norm = np.linalg.norm(a) + 1e-8, np.linalg.norm(b) + 1e-8
    rotation, scale = orthogonal_procrustes(a / a_norm, b / b_norm)
    return (b / b_norm) @ rotation.T * scale * a_norm + truth_centre


def official_f_score(truth, predicted, threshold):
    to_truth = np.array([np.sqrt(((truth - p) ** 2).sum(1)).min() for p in predicted])
    to_predicted = np.array([np.sqrt(((predicted - t) ** 2).sum(1)).min() for t in truth])
    precision, recall = (to_truth < threshold).mean(), (to_predicted < threshold).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def official_auc(errors):
    thresholds = np.linspace(0.0, 0.05, 100)
    areas = []
    for point in errors.T:  # a curve for each point, then their mean
        curve = np.array([(point <= threshold).mean() for threshold in thresholds])
        areas.append(np.trapezoid(curve, thresholds) / np.trapezoid(np.ones(100), thresholds))
    return np.mean(areas)


def hands(count, seed=0, noise=0.006):
    """Random joints and vertices with noisy predictions under a random similarity; float32 tensors."""
    rng = np.random.default_rng(seed)
    sets = []
    for points in (21, 778):
        truth = rng.normal(0, 0.04, (count, points, 3)) + np.array([0, 0, 0.7])
        predicted = truth + rng.normal(0, noise, truth.shape)
        turned = [
            (p - p.mean(0)) @ Rotation.from_quat(rng.normal(size=4)).as_matrix() * rng.uniform(0.5, 2)
            for p in predicted
        ]
        sets += [torch.tensor(np.array(turned), dtype=torch.float32), torch.tensor(truth).float()]
    return sets  # joints, true joints, vertices, true vertices


def reference_scores(joints, true_joints, vertices, true_vertices):
    arrays = [tensor.double().numpy() for tensor in (joints, true_joints, vertices, true_vertices)]
    joints, true_joints, vertices, true_vertices = arrays
    aligned_joints = np.array([official_alignment(t, p) for t, p in zip(true_joints, joints, strict=True)])
    aligned = np.array([official_alignment(t, p) for t, p in zip(true_vertices, vertices, strict=True)])
    joint_errors = np.linalg.norm(aligned_joints - true_joints, axis=2)
    vertex_errors = np.linalg.norm(aligned - true_vertices, axis=2)
    pairs = list(zip(true_vertices, aligned, strict=True))
    relative = (joints - joints[:, 9:10]) - (true_joints - true_joints[:, 9:10])
    return {
        "pa_mpjpe": 1000 * joint_errors.mean(),
        "pa_mpvpe": 1000 * vertex_errors.mean(),
        "f5": np.mean([official_f_score(*pair, 0.005) for pair in pairs]),
        "f15": np.mean([official_f_score(*pair, 0.015) for pair in pairs]),
        "auc_joints": official_auc(joint_errors),
        "auc_vertices": official_auc(vertex_errors),
        "mpjpe": 1000 * np.linalg.norm(relative, axis=2).mean(),
    }


def assert_scores(scores, expected):
    assert set(scores) == set(expected)
    for name, value in expected.items():
        assert float(scores[name]) == pytest.approx(value, rel=1e-8), name


def test_scores_follow_the_official_definitions_over_several_batches():
    sets = hands(7)
    metric = HandMetrics()
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        metric.update(*(points[part] for points in sets))
    expected = reference_scores(*sets)
    assert 1 < expected["pa_mpjpe"] < 20 and 0.05 < expected["f5"] < 0.98
    assert_scores(metric.compute(), expected)
    metric.reset()
    metric.update(*(points[:2] for points in sets))
    assert_scores(metric.compute(), reference_scores(*(points[:2] for points in sets)))


def test_no_sample_gives_nan():
    metric = HandMetrics()
    with pytest.warns(UserWarning, match="compute"):
        assert all(math.isnan(value) for value in metric.compute().values())


def test_a_similarity_is_undone():
    _, _, _, truth = hands(4, seed=1)
    rotation = torch.tensor(Rotation.from_rotvec([0.3, -2.0, 1.0]).as_matrix()).float()
    predicted = 1.7 * truth @ rotation + torch.tensor([3.0, -1.0, 0.2])
    assert procrustes_errors(predicted, truth).max() < 1e-6
    assert procrustes_errors(predicted, truth, reflection=False).max() < 1e-6


def test_a_mirrored_hand_is_only_undone_by_the_official_alignment():
    _, _, _, truth = hands(4, seed=2)
    mirrored = truth * torch.tensor([-1.0, 1.0, 1.0])
    assert procrustes_errors(mirrored, truth).max() < 1e-6
    errors = procrustes_errors(mirrored, truth, reflection=False)
    assert errors.mean() > 0.01
    # The best rotation, found by scipy's Kabsch algorithm and the matching least-squares scale.
    for index in range(4):
        a, b = truth[index].double().numpy(), mirrored[index].double().numpy()
        a, b = a - a.mean(0), b - b.mean(0)
        turned = Rotation.align_vectors(a, b)[0].apply(b)
        scaled = turned * (turned * a).sum() / (turned**2).sum()
        best = np.linalg.norm(scaled - a, axis=1)
        np.testing.assert_allclose(errors[index].numpy(), best, atol=1e-6)


def test_a_prediction_in_one_point_aligns_with_the_centre():
    truth = hands(2)[1]
    aligned = align_with_scale(torch.zeros_like(truth), truth)
    torch.testing.assert_close(aligned, truth.double().mean(1, keepdim=True).expand_as(truth))


def test_f_score_is_strict_at_the_threshold_and_zero_without_a_match():
    truth = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]], dtype=torch.float64)
    predicted = torch.tensor([[[0.25, 0, 0], [5, 0, 0], [9, 0, 0], [1, 0, 0]]], dtype=torch.float64)
    below, above = f_scores(predicted, truth, (0.25, 0.26))[0].tolist()
    assert below == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert above == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert f_scores(predicted + 100, truth, (0.1,)).item() == 0


@pytest.mark.parametrize("limit", [0.005, 0.015])
def test_f_score_is_strict_to_the_last_bit(limit):
    """Hands in front of a camera, so that differences of squares alone would round the wrong way."""
    truth = torch.zeros(1, 300, 3, dtype=torch.float64)
    truth[..., 1] = torch.arange(300, dtype=torch.float64)
    truth[..., 2] = 0.7
    lengths = np.resize([limit, np.nextafter(limit, 0), np.nextafter(limit, 1)], 300)
    predicted = truth.clone()
    predicted[..., 0] = torch.from_numpy(lengths)
    assert f_scores(predicted, truth, (limit,)).item() == pytest.approx(1 / 3, abs=1e-12)


def test_errors_are_those_of_numpy_to_the_last_bit():
    _, _, predicted, truth = hands(30)
    expected = np.sqrt(((predicted.double().numpy() - truth.double().numpy()) ** 2).sum(-1))
    np.testing.assert_array_equal(point_errors(predicted, truth).numpy(), expected)


def test_pck_has_the_thresholds_of_numpy():
    limits = torch.from_numpy(np.linspace(0, 0.05, 100))
    assert pck_counts(limits).tolist() == list(range(1, 101))
    below = torch.from_numpy(np.nextafter(limits.numpy(), 1))
    assert pck_counts(below).tolist() == list(range(100))


def test_raw_scores_are_beside_the_aligned_ones():
    sets = hands(3, seed=5)
    aligned, both = HandMetrics(), HandMetrics(raw=True)
    for metric in (aligned, both):
        metric.update(*sets)
    scores, expected = both.compute(), aligned.compute()
    raw = {"raw_mpjpe", "raw_mpvpe", "raw_f5", "raw_f15", "raw_auc_joints", "raw_auc_vertices"}
    assert set(scores) == set(expected) | raw
    assert all(scores[name] == value for name, value in expected.items())
    errors = (sets[2] - sets[3]).double().norm(dim=-1)
    assert scores["raw_mpvpe"].item() == pytest.approx(1000 * errors.mean().item(), rel=1e-9)


def test_joints_without_vertices():
    joints, true_joints, vertices, true_vertices = hands(3)
    metric, whole = HandMetrics(), HandMetrics()
    metric.update(joints, true_joints)
    whole.update(joints, true_joints, vertices, true_vertices)
    scores, expected = metric.compute(), whole.compute()
    for name, value in scores.items():
        if name in ("pa_mpjpe", "auc_joints", "mpjpe"):
            assert value == expected[name]
        else:
            assert math.isnan(value), name
    with pytest.raises(ValueError, match="vertices: expected both predicted and true ones, or neither"):
        metric.update(joints, true_joints, vertices)


def test_sums_over_many_samples_keep_their_precision():
    """In float32, adding small errors to a large sum would lose a part of them."""
    joints, true_joints, _, _ = hands(1)
    metric = HandMetrics()
    metric.update(joints, true_joints)
    expected = metric.compute()["pa_mpjpe"].item()
    for _ in range(2000):
        metric.update(joints, true_joints)
    assert metric.compute()["pa_mpjpe"].item() == pytest.approx(expected, rel=1e-10)


def test_f_scores_do_not_depend_on_the_chunk(monkeypatch):
    _, _, predicted, truth = hands(5, seed=3)
    whole = f_scores(predicted, truth)
    monkeypatch.setattr("pahm.score.metrics._PAIRS", 1)
    torch.testing.assert_close(f_scores(predicted, truth), whole)
    assert f_scores(predicted[:0], truth[:0]).shape == (0, 2)


def test_pck_counts_the_threshold_itself():
    errors = torch.tensor([[0.0, 0.05], [0.051, 0.02]], dtype=torch.float64)
    counts = pck_counts(errors)
    assert counts[0] == 1 and counts[-1] == 3 and counts[-2] == 2
    assert auc_of_pck(torch.full((100,), 4), 4) == pytest.approx(1)
    assert auc_of_pck(pck_counts(torch.full((9,), 0.025)), 9) == pytest.approx(0.5, abs=0.006)


def worker(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    metric = HandMetrics()
    sets = hands(5, seed=4)
    metric.update(*(points[:2] if rank == 0 else points[2:] for points in sets))
    results[rank] = {name: float(value) for name, value in metric.compute().items()}
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_all_samples():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.get_context("fork").Manager() as manager:
        results = manager.dict()
        mp.start_processes(worker, args=(port, results), nprocs=2, start_method="fork")
        results = dict(results)
    expected = reference_scores(*hands(5, seed=4))
    assert_scores(results[0], expected)
    assert_scores(results[1], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda j, tj, v, tv: (j[..., :2], tj, v, tv), r"predicted: expected shape \(B, N, 3\)"),
        (lambda j, tj, v, tv: (j, tj[:1], v, tv), r"truth: expected shape \(2, N, 3\)"),
        (lambda j, tj, v, tv: (j, tj[:, :20], v, tv), "truth: expected 21 points a sample, got 20"),
        (lambda j, tj, v, tv: (j, tj, v[:1], tv[:1]), "vertices: expected a batch of 2 as in joints, got 1"),
        (lambda j, tj, v, tv: (j / 0, tj, v, tv), "predicted: expected finite points"),
        (lambda j, tj, v, tv: (j, tj, v, tv / 0), "truth: expected finite points"),
    ],
)
def test_bad_batches_are_refused(change, message):
    metric = HandMetrics()
    with pytest.raises(ValueError, match=message):
        metric.update(*change(*hands(2)))
    assert metric.samples == 0 and metric.aligned_joint_count == 0


def test_submission_comes_back(tmp_path):
    joints, _, vertices, _ = hands(3)
    write_submission(tmp_path / "pred.json", joints, vertices.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["pred.json"]
    content = json.loads((tmp_path / "pred.json").read_text())
    assert len(content) == 2 and np.shape(content[0]) == (3, 21, 3) and np.shape(content[1]) == (3, 778, 3)
    xyz, verts = load_submission(tmp_path / "pred.json")
    np.testing.assert_allclose(xyz, joints.numpy(), atol=6e-8)
    np.testing.assert_allclose(verts, vertices.numpy(), atol=6e-8)


def test_hands_may_be_far_away_and_files_in_any_unit(tmp_path):
    path = tmp_path / "pred.json"
    joints, _, vertices, _ = hands(3)
    write_submission(path, joints[:1] + 1000, vertices[:1] + 1000)
    joints[0] *= 1000  # one hand that the network made nothing of
    write_submission(path, joints, vertices)
    path.write_text(json.dumps([(1000 * joints).tolist(), (1000 * vertices).tolist()]))
    np.testing.assert_allclose(load_submission(path)[1], 1000 * vertices.numpy())


def test_joints_are_read_whatever_the_vertices_are(tmp_path):
    path = tmp_path / "pred.json"
    joints = hands(3)[0].tolist()
    for verts in ([], [[[0, 0, 0]] * 6890] * 3, None):
        path.write_text(json.dumps([joints, verts]))
        np.testing.assert_array_equal(load_joints(path), joints)
    path.write_text(json.dumps([joints[0], []]))
    with pytest.raises(ValueError, match=r"pred.json is not a FreiHAND submission: xyz: expected shape"):
        load_joints(path)


def test_bad_submissions_are_refused(tmp_path):
    path = tmp_path / "pred.json"
    xyz, verts = np.zeros((2, 21, 3)), np.zeros((2, 778, 3))
    for arguments, message in [
        ((xyz[:, :20], verts), r"xyz: expected shape \(N, 21, 3\)"),
        ((xyz, verts[:1]), "verts: expected 2 samples as in xyz, got 1"),
        ((xyz, verts * np.nan), "verts: expected finite values, sample 0"),
        ((xyz, 1000 * hands(2)[2]), r"verts: expected metres, got hands that are \d{3} across"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_submission(path, *arguments)
        assert not path.exists()
    for text in (
        "[[], []",
        "[1, 2, 3]",
        "[[[[1, 2]]], []]",
        "[{}, 1]",
        "[[[1], 2], []]",
        "[" * 100_000,
        "\xff",
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"pred.json is not a FreiHAND submission"):
            load_submission(path)


def test_sums_stay_on_the_cpu_for_a_device_without_float64():
    def to_device(values):
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64 there")
        return values.to("meta")

    metrics = HandMetrics()
    metrics._apply(to_device)
    hands = torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(0))
    metrics.update(hands, hands)
    assert float(metrics.compute()["pa_mpjpe"]) == pytest.approx(0, abs=1e-4)
    assert metrics.samples.device.type == "cpu"
