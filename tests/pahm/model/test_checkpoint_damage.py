"""A damaged or forged checkpoint is refused, whatever was damaged; older ones have no digest to tell."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pahm.config import preset
from pahm.model import HandNet, load_checkpoint, read_metadata, save_checkpoint
from pahm.model.checkpoint import shipped_checkpoint
from pahm.train.run_folder import resume_place

CONFIG = preset("tiny").override(
    {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": 64}
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "net.safetensors"
    save_checkpoint(path, HandNet(CONFIG.model), CONFIG, scores={"pa_mpjpe": 12.25})
    return path


def parts(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_noticed(whole, tmp_path, seed):
    content = bytearray(whole.read_bytes())
    place = int(np.random.default_rng(seed).integers(8, len(content)))
    content[place] ^= 1 << seed % 8
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^checkpoint: .*net\.safetensors "):
        load_checkpoint(path)


def old(path, tmp_path, **changes):
    """The checkpoint as it was written before there were digests, with some tensors changed."""
    tensors, metadata = parts(path)
    metadata.pop("sha256")
    path = tmp_path / "old.safetensors"
    save_file({**tensors, **changes}, path, metadata)
    return path


def test_files_without_a_digest_are_read(whole, tmp_path):
    assert "sha256" not in parts(shipped_checkpoint())[1]
    load_checkpoint()
    expected, found = load_checkpoint(whole), load_checkpoint(old(whole, tmp_path))
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("network.decoder.levels.0.merge.weight", torch.zeros_like, "has nothing but zeros"),
        ("network.decoder.levels.0.merge.weight", lambda t: t / 0, "has values that are not finite"),
        ("network.decoder.levels.0.merge.weight", lambda t: t[:3], "expected .* for decoder.levels.0.merge"),
        (
            "topology.vertices",
            torch.zeros_like,
            "no whole hand .expected a hand 0.02 to 2.0 metres long, got 0",
        ),
        ("topology.vertices", lambda t: 1000 * t, "no whole hand .expected a hand 0.02 to 2.0 metres long"),
        ("topology.vertices", lambda t: t[:5], "no whole hand"),
        ("topology.faces_0", lambda t: t + 700, "no whole hand .faces must index"),
        (
            "topology.joint_regressor",
            lambda t: t[:3],
            "no whole hand .* regressor .21, 778., got .* .3, 778.",
        ),
        ("topology.joint_regressor", lambda t: 0 * t, "no whole hand .expected a joint regressor"),
    ],
)
def test_what_cannot_be_right_in_a_file_without_a_digest_is_refused(whole, tmp_path, name, change, sentence):
    path = old(whole, tmp_path, **{name: change(parts(whole)[0][name]).contiguous()})
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_channels", [2048, 2048, 2048, 2048]),
        ("decoder_channels", [0, 1, 1, 1]),
        ("feature_channels", [-64, 64, 64, 64]),
        ("image_size", 4096),
        ("image_size", 10**400),
        ("crop", "NaN"),
    ],
)
def test_forged_configurations_are_refused_before_memory_is_taken(whole, tmp_path, name, value, monkeypatch):
    tensors, metadata = parts(whole)
    metadata.pop("sha256")
    config = json.loads(metadata["config"])
    config["model"][name] = value
    metadata["config"] = json.dumps(config)
    path = tmp_path / "net.safetensors"
    save_file(tensors, path, metadata)
    made = []
    linear = torch.nn.Linear.__init__
    monkeypatch.setattr(
        torch.nn.Linear,
        "__init__",
        lambda self, *a, **k: (linear(self, *a, **k), made.append(self.weight.device))[0],
    )
    with pytest.raises(ValueError, match=r"^checkpoint: .*net\.safetensors ") as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < 500
    assert torch.device("cpu") not in made


def test_metadata_is_read_without_the_weights(whole):
    assert read_metadata(whole)[1] == {"pa_mpjpe": 12.25}


@pytest.mark.parametrize("seed", range(12))
def test_a_run_is_not_resumed_from_damage(tmp_path, seed):
    last = tmp_path / "last.ckpt"
    weights = {"w": torch.arange(4000, dtype=torch.float32), "v": torch.ones(3, 5)}
    stored = {"pahm_config": CONFIG.to_json(), "pahm_place": (1, 0), "global_step": 7, "pahm_images": "some"}
    torch.save({**stored, "state_dict": weights}, last)
    assert resume_place(tmp_path, CONFIG) == (1, 0, 7, "some")
    content = bytearray(last.read_bytes())
    random = np.random.default_rng(seed)
    if seed % 3 == 0:
        content = content[: int(random.integers(1, len(content)))]
    elif seed % 3 == 1:  # inside a tensor, of which a flipped bit makes another number
        content[content.find(weights["w"].numpy().tobytes()) + int(random.integers(16000))] ^= 16
    else:
        start = int(random.integers(len(content) // 2))
        content[start : start + 3000] = bytes(3000)
    last.write_bytes(content)
    with pytest.raises(ValueError, match=r"^resume: .*last\.ckpt is not a checkpoint .*; remove it to begin"):
        resume_place(tmp_path, CONFIG)
