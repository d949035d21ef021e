"""A run that is killed, at any moment, ends with the bits of one that is not."""

import random
import time

import pytest
import torch
from safetensors.torch import load_file
from training_lives import finish, logged, start

from pahm.config import preset
from pahm.model.checkpoint import read_metadata
from pahm.synth.generate import generate

CONFIG = preset("tiny").override(
    {
        "model.backbone": "test_resnet",
        "model.pretrained": False,
        "model.image_size": 64,
        "train.epochs": 3,
        "train.batch_size": 4,
        "train.workers": 0,
        "train.save_every": 4,
        "train.ema": 0.9,
    }
)
STEPS = 6  # an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 4 * STEPS + 1, 6, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert finish(CONFIG, data, out) == 0
    return out


def check_same_end(one, other):
    for file in ("model.safetensors", "best.safetensors"):
        exports = [load_file(out / file) for out in (one, other)]
        assert exports[0].keys() == exports[1].keys()
        assert all(torch.equal(value, exports[1][name]) for name, value in exports[0].items())
        assert read_metadata(one / file)[1] == read_metadata(other / file)[1] != {}
    states = [torch.load(out / "last.ckpt", weights_only=True) for out in (one, other)]
    assert states[0]["pahm_place"] == states[1]["pahm_place"] == [3, 0]
    assert states[0]["lr_schedulers"] == states[1]["lr_schedulers"]
    leaves = [
        torch.utils._pytree.tree_flatten([state["state_dict"], state["optimizer_states"]])[0]
        for state in states
    ]
    assert len(leaves[0]) == len(leaves[1]) > 100
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert logged(one) == logged(other)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_end_with_the_same_bits(data, whole, tmp_path, workers):
    config = CONFIG.override({"train.workers": workers})
    middle = random.Random(workers).randrange(STEPS + 1, STEPS + 4)
    deaths = [
        ("step", 2),  # before anything was saved
        ("step", 5),  # after the checkpoint of step 4
        ("border", 0),
        ("write", 8),
        ("step", middle),
        ("saved", 1),
        ("export", 0),
    ]
    # What the loader's processes change: where an epoch begins, and in its middle.
    for death in (deaths[2], deaths[4]) if workers else deaths:
        assert finish(config, data, tmp_path, death) == -9, death
        assert not (tmp_path / "model.safetensors").exists()
        if (tmp_path / "last.ckpt").exists():
            torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert finish(config, data, tmp_path) == 0
    check_same_end(tmp_path, whole)
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_runs_killed_at_any_time_end_with_the_same_bits(data, whole, tmp_path):
    config = CONFIG.override({"train.save_every": 1, "train.workers": 1})
    clock, killed = random.Random(0), 0
    for life in range(60):
        process = start(config, data, tmp_path)
        deadline = time.monotonic() + clock.uniform(0, 1 + life / 4)
        while process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        killed += 1
    else:
        assert finish(config, data, tmp_path) == 0
    assert process.exitcode in (0, -9) and killed
    check_same_end(tmp_path, whole)
