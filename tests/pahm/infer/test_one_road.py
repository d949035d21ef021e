"""`predict`, `eval`, the report and the evaluation within training give the same hand for the same image."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from pahm.config import preset
from pahm.data.freihand import FreiHand
from pahm.infer.predictor import Predictor
from pahm.model import HandNet
from pahm.report.per_image import score
from pahm.score.evaluation import evaluate, reconstruct_folder
from pahm.score.metrics import HandMetrics
from pahm.synth.generate import generate
from pahm.train.module import HandTraining
from pahm.train.trainer import evaluation_loader

COUNT = 3
CONFIG = preset("tiny").override(
    {
        "model.backbone": "test_resnet",
        "model.pretrained": False,
        "model.image_size": 64,
        "train.batch_size": 2,
        "train.workers": 0,
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 0, COUNT, seed=4, workers=1, progress=False)
    # Hands away from the optical axis: a camera that looks at them is turned by up to a quarter of a radian.
    path = folder / "evaluation_K.json"
    K = np.array(FreiHand(folder, "evaluation").tables["K"].rows, np.float64)
    K[:, 0, 2] -= [40, 90, 130]
    path.write_text(str(K.tolist()))
    return folder


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return HandTraining(CONFIG).eval()


@pytest.fixture
def scored(monkeypatch):
    """The joints and vertices that are scored, image by image."""
    found, update = [], HandMetrics.update

    def spy(self, joints, true_joints, vertices, true_vertices):
        found.extend(zip(joints.double().numpy(), vertices.double().numpy(), strict=True))
        update(self, joints, true_joints, vertices, true_vertices)

    monkeypatch.setattr(HandMetrics, "update", spy)
    return found


def predicted(network: HandNet, data, left=False):
    dataset, predictor = FreiHand(data, "evaluation"), Predictor(network, "cpu")
    records = [dataset.record(i) for i in range(COUNT)]
    hands = [predictor.predict(data / r["name"], intrinsics=r["K"], left=left) for r in records]
    return np.stack([hand.joints for hand in hands]), np.stack([hand.vertices for hand in hands])


@pytest.mark.parametrize("left", [False, True])
def test_predict_and_eval_place_a_hand_alike(module, data, left):
    joints, vertices = predicted(module.network, data, left)
    options = {"left": left, "device": "cpu", "batch_size": 2, "progress": False}
    hands = reconstruct_folder(module.network, data, use_scale=False, **options)
    np.testing.assert_allclose(hands.vertices, vertices, atol=1e-6)
    np.testing.assert_allclose(hands.joints, joints, atol=1e-6)
    np.testing.assert_allclose(evaluate(module.network, data, **options).vertices, vertices, atol=1e-6)


def test_the_report_scores_what_predict_gives(module, data, scored):
    joints, vertices = predicted(module.network, data)
    score(module.network, str(data), range(COUNT), device="cpu", progress=False)
    ours = scored[::2]  # every other hand is the mean hand
    np.testing.assert_allclose([mesh for _, mesh in ours], vertices, atol=1e-6)
    np.testing.assert_allclose([points for points, _ in ours], joints, atol=1e-6)


def test_training_scores_what_predict_gives(module, data, scored):
    joints, vertices = predicted(module.network, data)
    module.metrics = HandMetrics()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.validate(module, evaluation_loader(CONFIG, data, trainer), verbose=False)
    root = joints[:, 9:10]
    for (points, mesh), expected_points, expected in zip(scored, joints - root, vertices - root, strict=True):
        np.testing.assert_allclose(mesh - points[9], expected, atol=1e-6)
        np.testing.assert_allclose(points - points[9], expected_points, atol=1e-6)
