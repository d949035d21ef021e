"""Checkpoints: a network comes back the same, and the wrong file is named."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pahm.config import preset
from pahm.model import HandNet, load_checkpoint, read_metadata, save_checkpoint

TINY = preset("tiny").override({"model.pretrained": False})


@pytest.fixture
def network():
    torch.manual_seed(0)
    return HandNet(TINY.model).eval()


def images(count):
    size = TINY.model.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_gives_the_same_network_back(network, tmp_path, dtype):
    path = tmp_path / "net.safetensors"
    # Where the first weights of a run lay is nobody else's business.
    started = TINY.override({"model.backbone_weights": "/home/somebody/weights.pth"})
    save_checkpoint(path, network, started, scores={"pa_mpjpe": 9.5}, dtype=dtype)
    loaded = load_checkpoint(path, expect=TINY)
    assert read_metadata(path) == (TINY, {"pa_mpjpe": 9.5})
    tolerance = 0 if dtype == torch.float32 else 1e-3
    with torch.no_grad():
        before, after = network(images(1)), loaded(images(1))
    assert (before.meshes[-1] - after.meshes[-1]).abs().max() <= tolerance
    assert not loaded.training
    assert np.array_equal(loaded.faces, network.faces)
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_checkpoint_is_refused_with_the_reason(network, tmp_path):
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, network, TINY)
    other = TINY.override({"model.spiral_length": 12})
    with pytest.raises(ValueError, match=r"model\.spiral_length = 9, expected 12"):
        load_checkpoint(path, expect=other)
    save_checkpoint(path, network, other)
    with pytest.raises(ValueError, match="do not fit its configuration"):
        load_checkpoint(path)
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_checkpoint(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_checkpoint(tmp_path / "none")


def test_a_checkpoint_of_another_version_or_without_its_hand_is_named(network, tmp_path):
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, network, TINY)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del metadata["sha256"]  # as files were written before
    config = json.loads(metadata["config"])
    config["model"]["mystery"] = 1
    for changed in ({"config": json.dumps(config)}, {"config": "{"}, {"config": None}):
        made = {name: value for name, value in {**metadata, **changed}.items() if value is not None}
        save_file(tensors, path, made)
        with pytest.raises(ValueError, match=r"net\.safetensors does not describe a network of this version"):
            read_metadata(path)
    for name in ("topology.joint_regressor", "topology.faces_0"):
        save_file({key: value for key, value in tensors.items() if key != name}, path, metadata)
        with pytest.raises(ValueError, match=r"net\.safetensors has no whole hand \("):
            load_checkpoint(path)
