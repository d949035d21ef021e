"""The moving average of the weights, and the best network, of a run with parts of the user's own."""

import math
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file
from small_run import CONFIG
from torch.utils._python_dispatch import TorchDispatchMode

from pahm.data.freihand import FreiHand
from pahm.data.loading import Images
from pahm.model import load_checkpoint, read_metadata
from pahm.score.evaluation import evaluate
from pahm.train.trainer import train

AVERAGED = CONFIG.override({"train.ema": 0.15, "train.epochs": 3, "train.export": "float32"})


class Watch(pl.Callback):
    """Keeps the weights after each step, and the scores of each evaluation."""

    def __init__(self):
        self.weights, self.scores = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})

    def on_validation_end(self, trainer, pl_module):
        self.scores.append(float(trainer.callback_metrics["eval/pa_mpjpe"]))


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    out, watch = tmp_path_factory.mktemp("averaged"), Watch()
    loggers = [CSVLogger(out, name="mine", version="")]
    options = {"callbacks": [watch], "loggers": loggers, "accelerator": "cpu", "progress": False}
    return out, train(AVERAGED, data, out, **options), watch


def test_the_average_of_the_weights_is_exported(averaged):
    out, _, watch = averaged
    expected = watch.weights[0]
    for step, weights in enumerate(watch.weights[1:], start=1):
        decay = min(0.15, step / (step + 10))
        for name, value in weights.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    found = load_file(out / "model.safetensors")
    assert len(watch.weights) == 6
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[f"network.{name}"], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[f"network.{name}"], value) or name.endswith("num_batches_tracked")
    last = watch.weights[-1]["decoder.embedding"]
    assert not torch.allclose(found["network.decoder.embedding"], last, rtol=1e-6, atol=1e-7)


def test_evaluations_score_the_average(averaged):
    _, scores, watch = averaged
    assert watch.scores[-1] == pytest.approx(scores["pa_mpjpe"], rel=1e-5) and len(watch.scores) == 3


def test_the_best_network_is_kept(averaged, data):
    out, _, watch = averaged
    _, recorded = read_metadata(out / "best.safetensors")
    assert recorded["pa_mpjpe"] == pytest.approx(min(watch.scores)) and recorded["images"] == 6
    network = load_checkpoint(out / "best.safetensors")
    found = evaluate(network, data, device="cpu", workers=0, progress=False).scores
    assert found == pytest.approx({name: recorded[name] for name in found}, rel=1e-4)


@pytest.mark.parametrize("scores", [(3.0, 2.0, 1.0), (1.0, 2.0, 3.0), (2.0, math.nan, 1.0)])
def test_a_lower_score_replaces_the_best_network(data, tmp_path, monkeypatch, scores):
    written, given = [], iter(scores)
    monkeypatch.setattr(
        "pahm.score.metrics.HandMetrics.compute", lambda self: {"pa_mpjpe": torch.tensor(next(given, 0.0))}
    )
    monkeypatch.setattr("pahm.train.run_folder.export", lambda *parts: written.append(parts[-1]["pa_mpjpe"]))
    config = CONFIG.override({"train.epochs": 3, "train.batch_size": 8})
    train(config, data, tmp_path, accelerator="cpu", progress=False)
    assert written == [score for at, score in enumerate(scores) if score == min(scores[: at + 1])]


def test_loggers_of_the_user_see_losses_and_scores(averaged):
    header = (averaged[0] / "mine" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "train/mesh_1", "eval/pa_mpjpe"} <= set(header)


class InMemory(Images):
    """Six hands of a folder, held in memory."""

    has_masks = False

    def __init__(self, data):
        dataset = FreiHand(data, "training")
        self.samples = [dataset[i] for i in range(6)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return {name: value for name, value in self.samples[index].items() if name != "mask"}

    def vertices(self, count):
        return np.stack([sample["vertices"] for sample in self.samples[:count]])


def test_images_of_the_user_are_trained_on(data, tmp_path, caplog):
    config = CONFIG.override({"train.epochs": 1, "train.batch_size": 3})
    options = {"accelerator": "cpu", "progress": False}
    assert train(config, InMemory(data), tmp_path, **options) == {}
    assert "data: InMemory has no masks: silhouettes are not trained" in caplog.messages
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not (tmp_path / "best.safetensors").exists()
    assert train(config, InMemory(data), tmp_path, eval_data=data, **options)["images"] == 6


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, for which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_no_device(data, tmp_path):
    reads, counts = Reads(), []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts.append(reads.count)

    # A loader's process makes the batches, as in a real run.
    config = AVERAGED.override({"train.epochs": 1, "train.batch_size": 1, "train.workers": 1})
    with reads:
        train(config, InMemory(data), tmp_path, accelerator="cpu", callbacks=[Count()])
    assert len(counts) == 6 and reads.count > counts[-1]
    assert [after - before for before, after in pairwise(counts[1:])] == [0] * 4
