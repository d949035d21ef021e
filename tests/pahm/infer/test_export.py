"""ONNX files of the network and of networks on the three ops, run by ONNX Runtime."""

import contextlib
import io
import json

import onnx
import onnxruntime
import pytest
import torch

from pahm.cli import main
from pahm.config import preset
from pahm.infer.export import INPUT, OUTPUTS, export_onnx
from pahm.model import HandNet, load_checkpoint, save_checkpoint
from pahm_ops import MeshPool, SpiralConv, vertex_sample

CHANGES = {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": 64}


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, the file that `pahm export` makes of its checkpoint, and what the command prints."""
    torch.manual_seed(0)  # before the tests' own
    config = preset("tiny").override({**CHANGES, "model.crop": 0.75})
    network = HandNet(config.model)
    with torch.no_grad():  # as far from its first mesh as a trained one
        for level in network.decoder.levels:
            level.offset.layer.weight.normal_(std=0.02)
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    save_checkpoint(checkpoint, network, config)
    path = tmp_path_factory.mktemp("exported") / "hand.onnx"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["export", "--checkpoint", str(checkpoint), "--out", str(path)]) == 0
    return load_checkpoint(checkpoint), path, said.getvalue()


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path)
    values = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(value) for value in values], [output.name for output in session.get_outputs()]


def test_the_network_gives_the_same_hands_for_any_batch(exported):
    network, path, _ = exported
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 64, 64)
        (vertices, joints, camera), names = run(path, **{INPUT: images})
        assert names == list(OUTPUTS)
        with torch.no_grad():
            prediction = network(images)
        expected = prediction.meshes[-1]
        torch.testing.assert_close(vertices, expected, rtol=0, atol=3e-6)
        torch.testing.assert_close(joints, network.joints(expected), rtol=0, atol=3e-6)
        torch.testing.assert_close(camera, prediction.camera)


def test_the_file_and_the_command_say_what_the_network_takes(exported):
    _, path, said = exported
    assert list(path.parent.iterdir()) == [path]
    assert f"{path}: takes images (64 x 64 pixels, crop 0.75), gives vertices" in said
    found = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert found == {
        "image_size": 64,
        "crop": 0.75,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "root_joint": 9,
    }


class Layers(torch.nn.Module):
    def __init__(self, pooled):
        super().__init__()
        self.conv = SpiralConv(4, 6, torch.randint(0, 10, (10, 3)), activation="elu")
        matrix = torch.rand(14, 10) * (torch.rand(14, 10) < 0.3)
        self.pool = MeshPool(matrix.to_sparse()) if pooled else torch.nn.Identity()

    def forward(self, x, features, points):
        return self.pool(self.conv(x)), vertex_sample(features, points, padding_mode="border")


@pytest.mark.parametrize("dynamo", [True, False])
def test_the_ops_export_from_any_network(tmp_path, dynamo):
    layers = Layers(pooled=dynamo).eval()
    inputs = {
        "x": torch.randn(2, 10, 4),
        "features": torch.randn(2, 3, 8, 8),
        "points": 2.4 * torch.rand(2, 7, 2) - 1.2,
    }
    path = str(tmp_path / "layers.onnx")
    options = {"dynamo": True} if dynamo else {"dynamo": False, "opset_version": 20}
    torch.onnx.export(layers, tuple(inputs.values()), path, input_names=list(inputs), **options)
    values, _ = run(path, **inputs)
    with torch.no_grad():
        for actual, expected in zip(values, layers(*inputs.values()), strict=True):
            torch.testing.assert_close(actual, expected)


def test_the_exporter_that_would_write_a_wrong_sum_is_refused(tmp_path):
    inputs = torch.randn(2, 10, 4), torch.randn(2, 3, 8, 8), torch.rand(2, 7, 2)
    with pytest.raises(ValueError, match=r"torch\.onnx\.export\(\.\.\., dynamo=True\) only"):
        torch.onnx.export(Layers(pooled=True), inputs, str(tmp_path / "layers.onnx"), dynamo=False)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    network = HandNet(preset("tiny").override(CHANGES).model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript: pip install onnx onnxscript"):
        export_onnx(network, tmp_path / "hand.onnx")
