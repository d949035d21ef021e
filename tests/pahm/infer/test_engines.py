"""Every engine gives the network's own hands, or one sentence that says why it cannot."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from known_hand import KnownNetwork, known_hand, picture

from pahm.config import preset
from pahm.infer import engines, export
from pahm.infer.engines import AUTO, ENGINES, make_engine
from pahm.infer.fold import folded
from pahm.infer.predictor import Predictor
from pahm.model import HandNet

CPU = torch.device("cpu")
SIZE = 64
OTHERS = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    changes = {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": SIZE}
    changes["model.attention_heads"] = [4, 0, 0, 0]  # which makes the exporter faster
    network = HandNet(preset("tiny").override(changes).model).eval()
    with torch.no_grad():  # as far from its first mesh, and from its first statistics, as a trained one
        for level in network.decoder.levels:
            level.offset.layer.weight.normal_(std=0.02)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
    return network


@pytest.fixture(scope="module")
def made(network, tmp_path_factory):
    """Makes an engine once; its files go to a folder of the test's."""
    found = {}

    def make(name):
        for package in OTHERS:
            if package == name:
                pytest.importorskip(package)
        if name not in found:
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporter
                patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
                found[name] = make_engine(network, CPU, name)
        return found[name]

    return make


@pytest.mark.parametrize(
    "name", ["torch", pytest.param("compile", marks=pytest.mark.slow), "openvino", "onnxruntime"]
)
def test_each_engine_gives_the_networks_own_predictions(network, made, name):
    engine = made(name)
    assert engine.name == name and engine.config is network.config
    for batch in (1, 3, 2):
        images = torch.randn(batch, 3, SIZE, SIZE)
        if batch == 3:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected, found = network(images), engine(images)
        assert (len(found.meshes), len(found.cues), found.joints) == (4, 1, [])
        for ours, theirs in zip(export.flatten(found), export.flatten(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(found.meshes, expected.meshes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "openvino", "onnxruntime"])
@pytest.mark.parametrize("shape", [(0, 3, SIZE, SIZE), (1, 3, 32, 32), (3, SIZE, SIZE), (1, 1, SIZE, SIZE)])
def test_images_that_no_network_takes_are_named(made, name, shape):
    message = rf"images: expected \(B, 3, 64, 64\) with B of at least 1, got \({shape[0]}, "
    with pytest.raises(ValueError, match=message):
        made(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", OTHERS)
def test_a_runtime_has_torchs_number_of_threads_and_serves_several(made, name):
    engine, threads = made(name), torch.get_num_threads()
    runtime, images = engine._run, torch.randn(1, 3, SIZE, SIZE)
    expected = engine(images).meshes[-1]
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(engine(images).meshes[-1], expected) and runtime.threads == threads + 1
    finally:
        torch.set_num_threads(threads)
    found = []
    callers = [threading.Thread(target=lambda: found.append(engine(images).meshes[-1])) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 3 and all(torch.equal(mesh, expected) for mesh in found)
    assert runtime.threads == threads


def test_an_onnx_file_is_written_once_for_the_same_weights(network, made, monkeypatch):
    kept = made("onnxruntime")._run.file
    monkeypatch.setenv("TORCH_HOME", str(kept.parents[1]))
    monkeypatch.setattr(engines, "write_onnx", lambda *_: pytest.fail("the file was there"))
    assert make_engine(copy.deepcopy(network), CPU, "onnxruntime")._run.file == kept
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.decoder.levels[0].merge.bias += 1
    # A file with the content of another network.
    path = engines._kept_file(other)
    assert path != kept
    path.write_bytes(kept.read_bytes())
    with pytest.raises(ValueError, match=r"onnxruntime puts a vertex .* m from where the network has it"):
        make_engine(other, CPU, "onnxruntime")
    assert not path.exists() and kept.exists()


def test_a_folder_that_cannot_be_written_to_is_named(network, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot keep its file in .*/file/pahm \(.*set TORCH_HOME"):
        make_engine(network, CPU, "onnxruntime")


def test_what_an_engine_lacks_is_one_sentence(network, monkeypatch):
    with pytest.raises(ValueError, match=r"expected auto or one of torch, compile, openvino, .* got 'tvm'"):
        Predictor(network, "cpu", "tvm")
    for name in OTHERS:
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda _: None)
            needs = "openvino" if name == "openvino" else "onnxruntime and onnx and onnxscript"
            with pytest.raises(ValueError, match=rf"{name} needs {needs}: pip install 'pahm\[{name}\]'"):
                make_engine(network, CPU, name)
            patch.setattr("importlib.util.find_spec", lambda _: "found")
            with pytest.raises(ValueError, match=f"{name} runs on the CPU, got the device cuda"):
                make_engine(network, torch.device("cuda"), name)
            with pytest.raises(ValueError, match=rf"{name} runs float32, got a network of torch\.bfloat16"):
                make_engine(copy.deepcopy(network).bfloat16(), CPU, name)
            with pytest.raises(ValueError, match=f"{name} runs a HandNet, got a KnownNetwork"):
                make_engine(KnownNetwork(known_hand(), [8.0, 0, 0]), CPU, name)
    with pytest.raises(ValueError, match="compile runs a HandNet, got a KnownNetwork"):
        make_engine(KnownNetwork(known_hand(), [8.0, 0, 0]), CPU, "compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match="compile needs a C\\+\\+ compiler, and there is no no-such-compiler"
    ):
        make_engine(network, CPU, "compile")


def test_a_network_that_a_converter_refuses_is_one_sentence(network, monkeypatch):
    class Refuses(engines.OpenVINO):
        def make(self, network):
            raise RuntimeError("Check failed:\n no such operator\n")

    make = engines._runtime(Refuses, [])
    with pytest.raises(
        ValueError, match=r"^engine: openvino cannot run this network \(Check failed: no such"
    ):
        make(network, CPU)


def test_auto_takes_the_first_that_works_and_warns_once_of_what_fails(network, monkeypatch):
    def fails(network, device):
        raise ValueError("engine: openvino is in a bad mood")

    def absent(network, device):
        raise engines.NotInstalled("engine: onnxruntime is not here")

    monkeypatch.setitem(AUTO, "cpu", ["onnxruntime", "openvino", "torch"])
    monkeypatch.setitem(ENGINES, "openvino", fails)
    monkeypatch.setitem(ENGINES, "onnxruntime", absent)
    with pytest.warns(RuntimeWarning) as told:
        predictor = Predictor(network, "cpu")
    assert [str(warning.message) for warning in told] == [
        "engine: openvino is in a bad mood; torch runs instead"
    ]
    assert told[0].filename == __file__ and predictor.engine.name == "torch"
    with pytest.raises(ValueError, match="in a bad mood"):
        Predictor(network, "cpu", "openvino")
    monkeypatch.setitem(AUTO, "cpu", ["onnxruntime", "torch"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Predictor(network, "cpu").engine.name == "torch"


def test_a_folded_network_has_no_normalisation_left_and_leaves_the_other_as_it_was(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other = folded(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in other.modules())
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_predictors_are_copied_and_pickled(network):
    predictor, image = Predictor(network, "cpu", "torch"), picture()
    expected = predictor.predict(image).vertices
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert other.engine.name == "torch" and other.network is not network
        assert abs(other.predict(image).vertices - expected).max() < 1e-6
