"""The losses of equations 5 and 6 against plain loops, and what they are zero for."""

import math

import numpy as np
import pytest
import torch

from pahm.config import LossConfig
from pahm.model import Prediction
from pahm.model.network import Cues
from pahm.train.losses import (
    Targets,
    edge_loss,
    heatmaps,
    joint_loss,
    mesh_loss,
    normal_loss,
    pose_loss,
    position_loss,
    project,
    projection_loss,
    silhouette_loss,
    total_loss,
)

FACES = torch.tensor([[0, 1, 2], [2, 1, 3]])


@pytest.fixture
def vertices():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 2, 4, 3, generator=generator, dtype=torch.float64)


def test_mesh_loss_is_the_mean_distance_of_coordinates(vertices):
    predicted, target = vertices
    assert mesh_loss(predicted, target).item() == pytest.approx(np.abs((predicted - target).numpy()).mean())


def test_edge_and_normal_loss_against_a_loop(vertices):
    predicted, target = vertices.numpy()
    edges, cosines = [], []
    for p, t in zip(predicted, target, strict=True):
        for face in FACES.tolist():
            normal = np.cross(t[face[1]] - t[face[0]], t[face[2]] - t[face[0]])
            normal /= np.linalg.norm(normal)
            for a, b in [(0, 1), (1, 2), (2, 0)]:
                e, true = p[face[b]] - p[face[a]], t[face[b]] - t[face[a]]
                edges.append(abs(np.linalg.norm(e) - np.linalg.norm(true)))
                cosines.append(abs(e @ normal) / np.linalg.norm(e))
    assert edge_loss(*vertices, FACES).item() == pytest.approx(np.mean(edges))
    assert normal_loss(*vertices, FACES).item() == pytest.approx(np.mean(cosines))


def test_edge_and_normal_loss_are_zero_for_a_rigidly_moved_and_a_flat_mesh(vertices):
    target = vertices[1]
    assert edge_loss(target + 1, target, FACES).item() == pytest.approx(0, abs=1e-12)
    assert normal_loss(2 * target + 1, target, FACES).item() == pytest.approx(0, abs=1e-12)
    assert normal_loss(vertices[0], target, FACES).item() > 0.01


def test_losses_have_finite_gradients_for_collapsed_meshes(vertices):
    predicted = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    (edge_loss(predicted, vertices[1], FACES) + normal_loss(predicted, vertices[1], FACES)).backward()
    assert torch.isfinite(predicted.grad).all()


def test_heatmap_peaks_at_the_joint_and_falls_off_by_sigma():
    size, sigma = 56, 3.5
    pixel = torch.tensor([20.0, 31.0])
    maps = heatmaps(((2 * pixel + 1) / size - 1)[None, None], (size, size), sigma)
    assert maps.shape == (1, 1, size, size)
    assert maps[0, 0, 31, 20].item() == pytest.approx(1.0)
    spread = sigma * size / 224
    assert maps[0, 0, 31, 22].item() == pytest.approx(math.exp(-(2**2) / (2 * spread**2)), rel=1e-4)
    assert maps[0, 0, 32, 20].item() == pytest.approx(math.exp(-1 / (2 * spread**2)), rel=1e-4)


def test_pose_loss_prefers_the_right_place():
    joints = torch.tensor([[[0.3, -0.2]]])
    target = heatmaps(joints, (28, 28), 3.5)
    right = pose_loss(torch.logit(target, eps=1e-4), joints, 3.5)
    assert right < 0.5 * pose_loss(torch.logit(target.transpose(2, 3), eps=1e-4), joints, 3.5)


def test_position_loss_reads_the_heatmaps_centre_of_mass():
    logits = torch.full((1, 1, 4, 8), -50.0)
    logits[0, 0, 2, 1] = logits[0, 0, 2, 5] = 0.0  # mass half and half: the centre is at x = 3, y = 2
    centre = torch.tensor([[[2 * 3.5 / 8 - 1, 2 * 2.5 / 4 - 1]]])
    assert position_loss(logits, centre).item() == pytest.approx(0, abs=1e-6)
    assert position_loss(logits, centre + torch.tensor([0.1, 0.3])).item() == pytest.approx(0.2, abs=1e-6)


def test_silhouette_loss_ignores_images_without_a_mask():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4] = 1
    logits = torch.full((2, 1, 4, 4), -8.0)
    logits[0, :, :2] = 8
    logits[1] = 5
    only_first = silhouette_loss(logits, mask, torch.tensor([True, False]))
    assert only_first.item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-3)
    assert silhouette_loss(logits, mask, torch.tensor([True, True])) > 1
    assert silhouette_loss(logits, mask, torch.tensor([False, False])).item() == 0


def test_projection_loss_is_zero_for_the_right_camera(vertices):
    mesh, camera = vertices[0], torch.tensor([[5.0, 0.1, -0.2], [7.0, 0.0, 0.1]], dtype=torch.float64)
    x = camera[:, :1] * (mesh[..., 0] + camera[:, 1:2])
    y = camera[:, :1] * (mesh[..., 1] + camera[:, 2:3])
    assert torch.allclose(project(mesh, camera), torch.stack([x, y], -1))
    truth = [project(mesh, camera)]
    assert projection_loss([mesh], camera, truth).item() == 0
    assert projection_loss([mesh], camera + 0.1, truth).item() > 0.05


SIZES = (3, 4, 5, 6)


def prediction_and_targets(sizes, stacks=1, joints=0):
    meshes = [0.1 * torch.randn(2, n, 3) for n in sizes]
    cues = [Cues(torch.randn(2, 21, 8, 8), torch.randn(2, 1, 8, 8)) for _ in range(stacks)]
    points = [0.1 * torch.randn(2, 21, 3) for _ in range(joints)]
    targets = Targets(
        [0.1 * torch.randn(2, n, 3) for n in SIZES],
        [torch.rand(2, n, 2) for n in SIZES],
        0.1 * torch.randn(2, 21, 3),
        torch.rand(2, 21, 2),
        torch.rand(2, 1, 32, 32).round(),
        torch.tensor([True, True]),
    )
    return Prediction(meshes, torch.tensor([[6.0, 0, 0]] * 2), cues, points), targets


def test_total_is_the_weighted_sum_and_every_weight_counts():
    prediction, targets = prediction_and_targets(SIZES)
    config = LossConfig()
    total, parts = total_loss(prediction, targets, FACES, config)
    weights = {"mesh_4": 0.25, "mesh_3": 0.5, "mesh_2": 0.75, "mesh_1": 1.0, "edge": 1.0, "normal": 0.1}
    weights |= {"silhouette": 2.5, "pose": 10.0, "projection": 1.0, "position": 1.0}
    assert set(parts) == set(weights)
    assert total.item() == pytest.approx(sum(weights[n] * parts[n].item() for n in weights), rel=1e-5)


def test_every_mesh_of_a_level_counts_and_absent_predictions_do_not():
    prediction, targets = prediction_and_targets((5, 5, 6, 6), stacks=0)
    _, parts = total_loss(prediction, targets, FACES, LossConfig())
    assert set(parts) == {"mesh_2", "mesh_1", "edge", "normal", "projection"}
    for name, place, pair in (("mesh_2", 2, prediction.meshes[:2]), ("mesh_1", 3, prediction.meshes[2:])):
        each = [mesh_loss(mesh / 0.2, targets.meshes[place] / 0.2) for mesh in pair]
        assert parts[name].item() == pytest.approx(sum(each).item())
    finest = edge_loss(prediction.meshes[3] / 0.2, targets.meshes[3] / 0.2, FACES)
    assert parts["edge"].item() == pytest.approx(finest.item())


def test_each_hourglass_and_each_set_of_joints_is_supervised():
    prediction, targets = prediction_and_targets(SIZES, stacks=2, joints=3)
    total, parts = total_loss(prediction, targets, FACES, LossConfig())
    poses = [pose_loss(c.pose_logits, targets.joints_2d, 3.5) for c in prediction.cues]
    assert parts["pose"].item() == pytest.approx(sum(poses).item() / 2)
    masks = [silhouette_loss(c.silhouette_logits, targets.mask, targets.has_mask) for c in prediction.cues]
    assert parts["silhouette"].item() == pytest.approx(sum(masks).item() / 2)
    joints = [joint_loss(j / 0.2, targets.joints / 0.2) for j in prediction.joints]
    assert parts["joints"].item() == pytest.approx(sum(joints).item() / 3)
    doubled, _ = total_loss(prediction, targets, FACES, LossConfig(joints=2.0))
    assert (doubled - total).item() == pytest.approx(parts["joints"].item(), rel=1e-4)
