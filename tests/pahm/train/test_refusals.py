"""What ends a training run or keeps it from starting, and what is left of it then."""

import errno
import json
import math
import shutil

import pytest
import torch
from small_run import CONFIG

from pahm.hand.topology import HandTopology
from pahm.model import HandNet, load_checkpoint
from pahm.score.evaluation import evaluate
from pahm.synth.generate import generate
from pahm.train.trainer import HandTraining, train


def test_a_full_disk_loses_no_finished_epoch(data, tmp_path, monkeypatch):
    written = []

    def save(checkpoint, stream, save=torch.save):
        written.append(stream.name)
        if len(written) == 2:
            stream.write(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, stream)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("torch.save", save)
        train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)
    assert len(written) == 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    assert train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)["images"] == 6


def test_a_run_of_another_configuration_is_not_continued(run, data):
    out, _ = run
    with pytest.raises(ValueError, match=r"model\.spiral_length = 9, expected 12"):
        train(CONFIG.override({"model.spiral_length": 12}), data, out, accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match=r"made with train\.learning_rate = 0\.001, now 0\.1"):
        train(CONFIG.override({"train.learning_rate": 0.1}), data, out, accelerator="cpu", progress=False)


def test_a_run_on_other_images_is_not_continued(run, data, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(run[0], tmp_path / "run")
    shutil.copytree(data, moved)
    generate(other, 8, 0, seed=4, workers=1, progress=False)
    assert train(CONFIG, moved, tmp_path / "run", accelerator="cpu", progress=False) == run[1]
    with pytest.raises(ValueError, match=r"last\.ckpt was made from other training images; use another"):
        train(CONFIG, other, tmp_path / "run", accelerator="cpu", progress=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == str(moved)


def test_unusable_data_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="training"):
        train(CONFIG, tmp_path, tmp_path / "out", accelerator="cpu", progress=False)
    for options, devices, sentence in [
        ({"train.batch_size": 9}, 1, "8 images, expected at least 9"),
        ({}, 3, "4 images cannot be split over 3 devices"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            train(
                CONFIG.override(options),
                data,
                tmp_path / "out",
                accelerator="cpu",
                devices=devices,
                strategy="ddp",
                progress=False,
            )
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_with_the_images(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pahm.train.losses.mesh_loss", lambda predicted, target: torch.tensor(math.nan))
    sentence = r"the loss is nan at step 0, images training/rgb/0000000\d\.jpg, .*mesh_4 nan"
    with pytest.raises(FloatingPointError, match=sentence):
        train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)


@pytest.mark.parametrize("often", [{"train.save_every": 1}, {"train.save_minutes": 1e-9}])
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(run, data, tmp_path, monkeypatch, often):
    config = CONFIG.override(often)

    def step(self, batch, index, step=HandTraining.training_step):
        with pytest.MonkeyPatch.context() as patch:
            if self.global_step == 3:
                patch.setattr("pahm.train.losses.edge_loss", lambda *arguments: torch.tensor(math.inf))
            return step(self, batch, index)

    monkeypatch.setattr(HandTraining, "training_step", step)
    with pytest.raises(FloatingPointError, match=r"the loss is inf at step 3, images training/rgb"):
        train(config, data, tmp_path, accelerator="cpu", progress=False)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 3 and stored["pahm_place"] == [1, 1]
    monkeypatch.undo()
    train(config, data, tmp_path, accelerator="cpu", progress=False)
    one, two = (load_checkpoint(out / "model.safetensors").state_dict() for out in (run[0], tmp_path))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("last", [2, 3])  # the third step is an epoch's first, the fourth its last
def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch, last):
    def spoil(self, optimizer):
        if self.global_step == last:
            next(iter(self.network.parameters())).grad.fill_(math.nan)

    monkeypatch.setattr(HandTraining, "on_before_optimizer_step", spoil)
    # Clipping would make all gradients NaN.
    config = CONFIG.override({"train.save_every": 1, "train.gradient_clip": 0})
    sentence = (
        rf"weights of .* are not finite after step {last}, images training/rgb/.*jpg; .* stays as it was"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        train(config, data, tmp_path, accelerator="cpu", progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == last


def test_meshes_that_are_not_finite_in_evaluation_are_named(data, tmp_path, monkeypatch):
    def forward(self, images, forward=HandNet.forward):
        prediction = forward(self, images)
        return prediction if self.training else prediction._replace(meshes=[m / 0 for m in prediction.meshes])

    monkeypatch.setattr(HandNet, "forward", forward)
    sentence = r"evaluation after step 1: meshes are not finite .*, images evaluation/rgb/00000000\.jpg, "
    with pytest.raises(FloatingPointError, match=sentence):
        train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)


def test_the_mesh_of_another_hand_is_refused(run, data, tmp_path):
    strange = tmp_path / "data"
    shutil.copytree(data, strange)
    for split in ("training", "evaluation"):
        path = strange / f"{split}_verts.json"
        path.write_text(json.dumps([mesh[::-1] for mesh in json.loads(path.read_text())]))
    sentence = r"data: .*data: the joints lie \d+ mm from where the network's hand has them in the same mesh"
    with pytest.raises(ValueError, match=sentence):
        train(CONFIG, strange, tmp_path / "run", accelerator="cpu", progress=False)
    with pytest.raises(ValueError, match=sentence):
        train(CONFIG, data, tmp_path / "run", eval_data=strange, accelerator="cpu", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=sentence):
        evaluate(load_checkpoint(run[0] / "model.safetensors"), strange, device="cpu", progress=False)


def test_weights_of_another_hand_are_refused(run, data, tmp_path):
    topology = HandTopology.load()
    topology = topology._replace(joint_regressor=topology.joint_regressor[::-1].copy())
    start = run[0] / "model.safetensors"
    with pytest.raises(ValueError, match=r"init: .*model\.safetensors is a network of another hand"):
        train(CONFIG, data, tmp_path, topology=topology, initial=start, accelerator="cpu", progress=False)
