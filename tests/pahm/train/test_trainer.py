"""Training end to end on a few rendered hands: targets, schedules, resuming, what a run leaves."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import CONFIG

from pahm.ablation.tables import configuration
from pahm.config import from_file, from_json
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.data.loading import Batches, FolderImages
from pahm.model import load_checkpoint, read_metadata
from pahm.model.checkpoint import read_provenance
from pahm.score.evaluation import evaluate, mean_hand
from pahm.score.metrics import procrustes_errors
from pahm.synth.generate import generate
from pahm.train.losses import project, total_loss
from pahm.train.provenance import provenance
from pahm.train.trainer import HandTraining, WarmupCosine, train


@pytest.fixture
def steps(monkeypatch):
    """The epochs of the training steps that are taken, in order."""
    taken = []

    def step(self, batch, index, step=HandTraining.training_step):
        taken.append(self.current_epoch)
        return step(self, batch, index)

    monkeypatch.setattr(HandTraining, "training_step", step)
    return taken


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_run_sees_the_part_of_the_images_that_the_configuration_names(data, tmp_path, monkeypatch, step):
    seen, taken = [], getattr(HandTraining, step)

    def look(module, batch, index):
        seen.append(batch)
        return taken(module, batch, index)

    monkeypatch.setattr(HandTraining, step, look)
    config = CONFIG.override({"model.crop": 0.7, "train.epochs": 1})
    train(config, data, tmp_path, accelerator="cpu", progress=False)
    training = step == "training_step"
    images = FreiHand(data, "training" if training else "evaluation")
    transform = CropTransform(64, config.augment if training else None, config.train.seed, share=0.7)
    expected = transform(images[int(seen[0]["index"][1])])
    assert torch.equal(seen[0]["K"][1], expected["K"]) and torch.equal(seen[0]["image"][1], expected["image"])


def batch_of(data, count=4):
    images = FolderImages(FreiHand(data, "training"))
    return Batches(images, CropTransform(64, CONFIG.augment))[0, list(range(count))]


def test_targets_are_the_hand_seen_in_the_crop(data):
    batch = batch_of(data)
    module = HandTraining(CONFIG)
    targets = module.targets(batch)
    joints = batch["joints"]
    assert [mesh.shape[1] for mesh in targets.meshes] == [98, 195, 389, 778]
    assert torch.equal(targets.meshes[-1], batch["vertices"] - joints[:, 9:10])
    # Each level's points are points of the finest mesh, in two and in three dimensions alike.
    for mesh, points in zip(targets.meshes, targets.vertices_2d, strict=True):
        distances = torch.cdist(mesh, targets.meshes[-1], compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.amin(2).max() < 1e-6
        nearest = distances.argmin(2)
        for b in range(len(mesh)):
            assert torch.allclose(points[b], targets.vertices_2d[-1][b, nearest[b]], atol=1e-5)
    # Normalised coordinates put -1 and 1 on the outer edges of the 64-pixel crop.
    assert torch.allclose(targets.joints_2d, (batch["joints_2d"] + 0.5) / 32 - 1, atol=1e-5)
    # The hand is nearly flat as seen from its distance: some weak camera explains the projections.
    x, y = targets.meshes[-1][0, :, :2], targets.vertices_2d[-1][0]
    scale = ((y - y.mean(0)) * (x - x.mean(0))).sum() / (x - x.mean(0)).square().sum()
    camera = torch.cat([scale[None], y.mean(0) / scale - x.mean(0)])[None]
    assert (project(targets.meshes[-1][:1], camera)[0] - y).abs().mean() < 0.05


def test_a_run_writes_what_it_promises(run, data):
    out, scores = run
    names = {path.name for path in out.iterdir()}
    assert {"last.ckpt", "model.safetensors", "config.json", "tensorboard"} <= names
    assert any((out / "tensorboard").iterdir())
    assert scores["images"] == 6 and math.isfinite(scores["pa_mpjpe"])
    config, recorded = read_metadata(out / "model.safetensors")
    assert config == CONFIG and recorded == pytest.approx(scores)


def test_evaluation_of_the_exported_network_gives_the_recorded_scores(run, data):
    out, scores = run
    result = evaluate(
        load_checkpoint(out / "model.safetensors"), data, device="cpu", workers=0, progress=False
    )
    assert result.record() == pytest.approx(scores, rel=1e-4)
    assert result.joints.shape == (6, 21, 3) and result.vertices.shape == (6, 778, 3)
    assert (result.vertices[..., 2] > 0).all()


def test_a_finished_run_is_not_run_again(run, data, steps):
    out, scores = run
    assert train(CONFIG, data, out, accelerator="cpu", progress=False) == pytest.approx(scores)
    assert steps == []


def test_a_run_of_an_earlier_version_is_resumed(run, data, tmp_path, steps):
    """It knows no average of the weights, and no best network."""
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").unlink()
    stored = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    config = json.loads(stored["pahm_config"])
    del config["train"]["ema"]
    stored["pahm_config"] = json.dumps(config)
    stored["callbacks"] = {name: state for name, state in stored["callbacks"].items() if "Best" not in name}
    torch.save(stored, tmp_path / "run" / "last.ckpt")
    assert train(CONFIG, data, tmp_path / "run", accelerator="cpu", progress=False) == run[1]
    assert steps == []


def test_a_stopped_run_goes_on_after_its_last_epoch(run, data, tmp_path, monkeypatch, steps):
    class Stop(Exception):
        pass

    def stop_in_second_epoch(self, batch, index, step=HandTraining.training_step):
        if self.current_epoch == 1:
            raise Stop
        return step(self, batch, index)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(HandTraining, "training_step", stop_in_second_epoch)
        train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not (tmp_path / "model.safetensors").exists()
    steps.clear()
    train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)
    assert steps == [1, 1], "two steps an epoch, and the first epoch not again"
    whole = torch.load(run[0] / "last.ckpt", weights_only=True)
    resumed = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (resumed["epoch"], resumed["global_step"]) == (whole["epoch"], whole["global_step"])
    rates = [state["optimizer_states"][0]["param_groups"][0]["lr"] for state in (whole, resumed)]
    assert rates[0] == rates[1]


def test_a_run_can_start_from_a_checkpoint(run, data, tmp_path):
    start = run[0] / "model.safetensors"
    frozen = CONFIG.override({"train.epochs": 1, "train.learning_rate": 0.0})
    train(frozen, data, tmp_path / "from", initial=start, accelerator="cpu", progress=False)
    train(frozen, data, tmp_path / "scratch", accelerator="cpu", progress=False)
    before = dict(load_checkpoint(start).named_parameters())
    for name, same in [("from", True), ("scratch", False)]:
        after = load_checkpoint(tmp_path / name / "model.safetensors").decoder.embedding
        assert torch.equal(after, before["decoder.embedding"]) == same
    sharper = frozen.override({"model.image_size": 96, "model.crop": 0.8})
    train(sharper, data, tmp_path / "sharper", initial=start, accelerator="cpu", progress=False)
    config, _ = read_metadata(tmp_path / "sharper" / "model.safetensors")
    assert (config.model.image_size, config.model.crop) == (96, 0.8)
    other = frozen.override({"model.spiral_length": 12})
    with pytest.raises(ValueError, match=r"model\.spiral_length = 9, expected 12"):
        train(other, data, tmp_path / "other", initial=start, accelerator="cpu", progress=False)


def test_a_folder_without_evaluation_images_trains_without_scores(data, tmp_path):
    generate(tmp_path / "data", 4, 0, seed=1, workers=1, progress=False)
    config = CONFIG.override({"train.epochs": 1})
    assert train(config, tmp_path / "data", tmp_path / "run", accelerator="cpu", progress=False) == {}
    assert read_metadata(tmp_path / "run" / "model.safetensors") == (config, {})


def test_scores_are_computed_where_the_network_was_trained(data, tmp_path, monkeypatch):
    devices = []

    def scored(*arguments, device, **options):
        devices.append(str(device))
        return evaluate(*arguments, device=device, **options)

    monkeypatch.setattr("pahm.train.trainer.evaluate", scored)
    config = CONFIG.override({"train.epochs": 1})
    assert train(config, data, tmp_path, accelerator="cpu", progress=False)["images"] == 6
    assert devices == ["cpu"]


def test_what_no_output_depends_on_is_not_trained():
    changes = {"model.backbone": "hrnet_w18_small", "model.cues": False}
    config = configuration(CONFIG, "repeat").override(changes)
    module = HandTraining(config)
    prediction = module.network(torch.zeros(2, 3, 64, 64))
    torch.stack([x.sum() for x in (*prediction.meshes, prediction.camera)]).sum().backward()
    missing = {name for name, p in module.network.named_parameters() if p.grad is None}
    frozen = {name for name, p in module.network.named_parameters() if not p.requires_grad}
    assert missing == frozen and any("incre_modules.0" in name for name in frozen) and module.network.training


def test_a_run_says_how_it_was_made(run, data):
    out, _ = run
    record = json.loads((out / "run.json").read_text())
    assert record["data"] == str(data.resolve()) and record["eval_data"] is None
    assert from_file(out / "config.json") == CONFIG
    assert record["config"] == json.loads(CONFIG.to_json())
    stored = torch.load(out / "last.ckpt", weights_only=True)
    made = read_provenance(out / "model.safetensors")
    assert json.loads(stored["pahm_provenance"]) == made == record["provenance"] == provenance()
    assert from_json(stored["pahm_config"]) == CONFIG
    assert made["torch"] == torch.__version__ and made["pytorch-lightning"] and made["timm"]
    assert made["python"] == platform.python_version() and made["cpu"]
    assert str(data).encode() not in (out / "model.safetensors").read_bytes()


def test_other_evaluation_images_can_be_scored(data, tmp_path):
    generate(tmp_path / "other", 0, 2, seed=8, workers=1, progress=False)
    config = CONFIG.override({"train.epochs": 1})
    options = {"eval_data": tmp_path / "other", "accelerator": "cpu", "progress": True}
    assert train(config, data, tmp_path / "run", **options)["images"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["eval_data"] == str(tmp_path / "other")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_training_in_bfloat16(data, tmp_path, clip):
    config = CONFIG.override(
        {"train.precision": "bf16-mixed", "train.epochs": 1, "train.gradient_clip": clip}
    )
    scores = train(config, data, tmp_path, accelerator="cpu", progress=False)
    assert math.isfinite(scores["pa_mpjpe"])


def test_a_few_steps_on_one_batch_bring_the_loss_down(data):
    torch.manual_seed(0)
    module = HandTraining(CONFIG)
    batch = batch_of(data)
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        prediction = module.network(batch["image"])
        loss, parts = total_loss(prediction, module.targets(batch), module.faces, CONFIG.loss)
        loss.backward()
        optimizer.step()
        losses.append(parts["mesh_1"].item())
    # Four images in batch normalisation make single steps jump, differently with every rounding.
    assert sum(losses[-10:]) / 10 < 0.75 * losses[0]


def test_two_processes_share_the_work(data, tmp_path):
    options = ["--preset", "tiny", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    options += ["--model.backbone", "test_resnet", "--model.pretrained", "False", "--model.image-size", "64"]
    options += ["--train.batch-size", "4", "--train.epochs", "1", "--train.workers", "0"]
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pahm", "train", "--data", str(data), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Two steps of four images, two for each process.
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 2
    assert read_metadata(out / "model.safetensors")[1]["images"] == 6


def test_schedules():
    factor = WarmupCosine(100)
    assert [factor(0), factor(4), factor(5)] == [0.2, 1.0, 1.0]
    assert factor(52) == pytest.approx(0.5, abs=0.02) and factor(100) == pytest.approx(0, abs=1e-9)
    assert all(factor(i) >= factor(i + 1) for i in range(5, 100))


def test_mean_hand_beats_any_single_hand(data):
    dataset = FreiHand(data, "training")
    hands = torch.from_numpy(dataset.tables["vertices"].rows.copy()).double()
    mean = mean_hand(hands.numpy())

    def score(constant):
        return procrustes_errors(constant.double().expand_as(hands), hands, reflection=False).mean()

    assert mean.shape == (778, 3) and mean.mean(0).abs().max() < 1e-6
    assert score(mean) < min(score(hand) for hand in hands)
