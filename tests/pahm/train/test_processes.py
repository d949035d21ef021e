"""Several processes train what one does: losses, weights and scores.

CPU processes normalise over their own images, so that the comparisons hold batch normalisation's statistics.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from repository import HELPERS
from safetensors.torch import load_file
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from training_lives import finish, logged, score

from pahm.config import preset
from pahm.synth.generate import generate
from pahm.train.trainer import HandTraining, _SynchronisedLayers

CONFIG = preset("tiny").override(
    {
        "model.backbone": "test_resnet",
        "model.pretrained": False,
        "model.image_size": 64,
        "train.epochs": 2,
        "train.batch_size": 4,
        "train.learning_rate": 1e-5,
        "train.workers": 0,
        "train.export": "float32",
        "train.ema": 0.1,
    }
)


def torchrun(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *map(str, command)],
        cwd=HELPERS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 13, 7, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    assert finish(CONFIG, data, out, hold=True) == 0
    return out


@pytest.fixture(scope="module")
def double(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("double")
    (out / "config.json").write_text(CONFIG.to_json())
    shutil.copytree(data, out / "damaged")
    (out / "damaged" / "training" / "rgb" / "00000005.jpg").write_bytes(b"")
    torchrun(HELPERS / "training_lives.py", data, out / "run", out / "config.json")
    return out / "run"


def test_two_processes_have_the_losses_of_one(single, double):
    losses = [json.loads((out / "losses0.json").read_text()) for out in (single, double)]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]] == list(range(6))
    for (_, one), (_, two) in zip(*losses, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert json.loads((double / "losses1.json").read_text()) == losses[1], "processes log one loss"


def test_two_processes_have_the_weights_of_one(single, double):
    one, two = (load_file(out / "model.safetensors") for out in (single, double))
    assert one.keys() == two.keys()
    parameters = {f"network.{name}" for name, _ in HandTraining(CONFIG).network.named_parameters()}
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
        # Six steps of AdamW move each weight by about 2e-5, whatever the size of its gradient; processes that
        # kept their own gradients would move it elsewhere. Where one is all but zero rounding decides.
        if name in parameters:
            assert (two[name] - value).abs().mean() < 1e-6, name


@pytest.fixture
def one_thread():
    """As many threads as each of the two processes has: torch's sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_scores_of_two_processes_are_those_of_one(data, double, one_thread):
    # Seven images in batches of four: the second process's batch is not full.
    found = [json.loads((double.parent / f"found{rank}.json").read_text())["scores"] for rank in range(2)]
    scores, names = score(CONFIG.to_json(), data, {"devices": 1})
    assert found[0][0] == found[1][0] == scores and scores["pa_mpjpe"] > 1 and len(scores) == 8
    assert found[0][1] + found[1][1] == names and len(names) == 7


def test_scores_are_logged_at_the_same_steps(single, double):
    curves = [logged(out) for out in (single, double)]
    assert curves[0].keys() == curves[1].keys()
    for name, curve in curves[0].items():
        assert [step for step, _ in curve] == [step for step, _ in curves[1][name]]


def test_all_processes_stop_and_name_all_images_of_the_step(double):
    errors = [json.loads((double.parent / f"found{rank}.json").read_text())["error"] for rank in range(2)]
    assert errors[0] == errors[1]
    assert re.match(
        r"the loss is nan at step 0, images (training/rgb/000000\d\d\.jpg, ){3}training", errors[0]
    )
    assert "edge nan" in errors[0] and not (double.parent / "spoilt" / "last.ckpt").exists()


def test_all_processes_name_the_image_that_one_of_them_cannot_read(double):
    errors = [json.loads((double.parent / f"found{rank}.json").read_text())["refused"] for rank in range(2)]
    assert errors[0] == errors[1] and "rgb/00000005.jpg" in errors[0]


def test_the_command_line_under_torchrun_gives_the_same_bits(data, double, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "pahm", "train", "--data", data, "--out", out, "--accelerator", "cpu"]
    printed = torchrun(*command, "--config", double / "config.json")
    assert printed.count("is ready for pahm eval") == 1, "one process speaks"
    one, two = (load_file(folder / "model.safetensors") for folder in (double.with_name("plain"), out))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_gpus_normalise_together_and_cpus_apart(monkeypatch):
    """Without a process group only the layers' kinds can be seen."""
    for device, kind in (("cuda", nn.SyncBatchNorm), ("cpu", nn.BatchNorm2d)):
        module = HandTraining(CONFIG.override({"model.backbone": "tf_efficientnet_lite0"}))
        plain = copy.deepcopy(module)
        root = SimpleNamespace(type=device)
        trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=root))
        monkeypatch.setattr(HandTraining, "trainer", trainer)
        _SynchronisedLayers().apply(module)
        assert module.state_dict().keys() == plain.state_dict().keys()
        layers = zip(plain.network.modules(), module.network.modules(), strict=True)
        pairs = [(one, two) for one, two in layers if isinstance(one, nn.BatchNorm2d)]
        assert len(pairs) > 5 and all(isinstance(two, kind) for _, two in pairs)
        # timm's layers include an activation.
        for one, two in pairs:
            assert not isinstance(one, BatchNormAct2d) or isinstance(two, (BatchNormAct2d, SyncBatchNormAct))
