"""The evaluation images of FreiHAND's layout, reconstructed in camera space, and `pahm eval --freihand`."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pahm.cli import main
from pahm.config import preset
from pahm.data.freihand import FreiHand
from pahm.hand.topology import HandTopology
from pahm.model import HandNet, save_checkpoint
from pahm.model.network import Prediction
from pahm.score.evaluation import evaluate, reconstruct_folder
from pahm.score.metrics import load_submission, procrustes_errors
from pahm.score.protocol import score_predictions
from pahm.synth.generate import generate

COUNT = 4
QUIET = {"device": "cpu", "workers": 0, "progress": False}
CONFIG = preset("tiny").override(
    {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": 64}
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of `pahm synth`, its pictures without loss so that they can be mirrored exactly."""
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 1, COUNT, seed=11, workers=1, progress=False)
    for path in (folder / "evaluation" / "rgb").iterdir():
        save(Image.open(path).convert("RGB"), path)
    return folder


def save(image, path):
    image.save(path, format="PNG")  # whatever its name, it is read for what it is


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = HandNet(CONFIG.model).eval()
    # Training leaves the mean hand about its centroid, not about the root joint.
    network.mean_hand -= network.mean_hand.mean(0)
    return network


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    save_checkpoint(path, network, CONFIG)
    return path


def released(data, folder, labels=True):
    """The evaluation archive of FreiHAND as it is unpacked: no training split, no masks, other files."""
    shutil.copytree(data / "evaluation" / "rgb", folder / "evaluation" / "rgb")
    (folder / "evaluation" / "anno").mkdir()
    for name in ("K", "scale", *(("xyz", "verts") if labels else ())):
        shutil.copy(data / f"evaluation_{name}.json", folder)
    for name in ("mano", "errors"):
        (folder / f"evaluation_{name}.json").write_text("[[1, 2], 3]")
    return folder


class Oracle(torch.nn.Module):
    """Gives the true hands at 0.8 of their size, and the weak camera that puts them where they are seen."""

    def __init__(self, data, network):
        super().__init__()
        self.config, self.topology, self.mean_hand = network.config, network.topology, network.mean_hand
        self.joint_regressor = network.joint_regressor
        self.items = iter([FreiHand(data, "evaluation").record(index) for index in range(COUNT)])

    def forward(self, images):
        meshes, cameras = [], []
        for item in (next(self.items) for _ in images):
            root = item["joints"][9]
            meshes.append(0.8 * (item["vertices"] - root))
            scale = 2 * item["K"][0, 0] / (224 * self.config.crop) / root[2]
            centre = root[:2] + root[2] * (item["K"][:2, 2] - 111.5) / np.diag(item["K"])[:2]
            cameras.append([scale / 0.8, *(0.8 * centre)])
        meshes = torch.tensor(np.array(meshes), dtype=torch.float32)
        return Prediction([meshes], torch.tensor(np.array(cameras), dtype=torch.float32), [], [])


def truths(data):
    dataset = FreiHand(data, "evaluation")
    return np.array(dataset.tables["joints"].rows), np.array(dataset.tables["vertices"].rows)


def bones(joints):
    return np.linalg.norm(joints[:, 9] - joints[:, 10], axis=1)


def test_the_known_bone_length_sets_size_and_distance(data, network):
    joints, _ = truths(data)
    right = reconstruct_folder(Oracle(data, network), data, **QUIET)
    assert np.abs(bones(right.joints) / bones(joints) - 1).max() < 1e-4
    assert np.linalg.norm(right.joints - joints, axis=2).mean() < 0.02
    small = reconstruct_folder(Oracle(data, network), data, use_scale=False, **QUIET)
    assert np.abs(bones(small.joints) / bones(joints) - 0.8).max() < 1e-3
    np.testing.assert_allclose(small.joints[:, 9, 2] / right.joints[:, 9, 2], 0.8, atol=0.01)
    # The size changes nothing once hands are aligned, nor where they are seen.
    both = [torch.from_numpy(hands.joints) for hands in (right, small)]
    assert procrustes_errors(*both).max() < 1e-7
    for one, other in zip(right.joints, small.joints, strict=True):
        np.testing.assert_allclose(one[9, :2] / one[9, 2], other[9, :2] / other[9, 2], atol=1e-3)


def test_without_the_scale_it_is_what_evaluate_scores(data, network):
    hands, evaluation = (
        reconstruct_folder(network, data, use_scale=False, **QUIET),
        evaluate(network, data, **QUIET),
    )
    np.testing.assert_array_equal(hands.vertices, evaluation.vertices)
    scores = score_predictions(hands.joints, hands.vertices, *truths(data))
    for name, value in evaluation.scores.items():
        assert scores[name] == pytest.approx(value, rel=1e-9), name
    assert evaluation.mean_hand_scores["pa_mpjpe"] > 0


def mirrored(data, folder):
    """The data set as it would be with left hands in front of the same cameras, seen in a mirror."""
    (folder / "evaluation" / "rgb").mkdir(parents=True)
    for path in (data / "evaluation" / "rgb").iterdir():
        save(ImageOps.mirror(Image.open(path)), folder / "evaluation" / "rgb" / path.name)
    tables = {
        name: np.array(json.loads((data / f"evaluation_{name}.json").read_text()))
        for name in ("K", "scale", "xyz", "verts")
    }
    tables["K"][:, 0, 2] = 223 - tables["K"][:, 0, 2]
    for name, values in tables.items():
        if name in ("xyz", "verts"):
            values[..., 0] *= -1
        (folder / f"evaluation_{name}.json").write_text(json.dumps(values.tolist()))
    return folder


def test_left_hands_are_the_mirror_of_right_ones(data, network, tmp_path):
    folder = mirrored(data, tmp_path)
    right, left = (
        reconstruct_folder(network, data, **QUIET),
        reconstruct_folder(network, folder, left=True, **QUIET),
    )
    np.testing.assert_allclose(left.vertices, right.vertices * [-1, 1, 1], atol=1e-4)
    np.testing.assert_allclose(left.joints, right.joints * [-1, 1, 1], atol=1e-4)
    ours, theirs = evaluate(network, data, **QUIET), evaluate(network, folder, left=True, **QUIET)
    assert theirs.scores == pytest.approx(ours.scores, rel=1e-3)
    assert theirs.mean_hand_scores == pytest.approx(ours.mean_hand_scores, rel=1e-3)


def test_annotations_are_of_the_pixels_as_they_are_stored(data, network, tmp_path):
    folder = released(data, tmp_path)
    turned = Image.Exif()
    turned[0x112] = 6
    path = folder / "evaluation" / "rgb" / "00000001.jpg"
    Image.open(path).save(path, format="PNG", exif=turned)
    options = {"use_scale": False, **QUIET}
    expected = reconstruct_folder(network, data, **options).vertices
    np.testing.assert_allclose(reconstruct_folder(network, folder, **options).vertices, expected, atol=1e-6)


@pytest.fixture
def damaged(data, tmp_path):
    folder = released(data, tmp_path)
    path = folder / "evaluation" / "rgb" / "00000002.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    return folder


def test_a_damaged_image_gets_the_mean_hand(data, damaged, network, capsys):
    whole, hands = (reconstruct_folder(network, folder, **QUIET) for folder in (data, damaged))
    rest = [0, 1, 3]
    np.testing.assert_allclose(hands.vertices[rest], whole.vertices[rest], atol=1e-6)
    assert np.abs(bones(hands.joints)[2] - FreiHand(data, "evaluation")[2]["scale"]) < 1e-7
    mean = network.mean_hand[None].double()
    assert procrustes_errors(torch.from_numpy(hands.vertices[2:3]), mean, reflection=False).max() < 1e-6
    place = np.median(whole.joints[rest, 9], axis=0)
    np.testing.assert_allclose(hands.joints[2, 9], place, atol=1e-6)
    (sentence,) = hands.unreadable
    lines = capsys.readouterr().err.splitlines()
    assert "00000002.jpg is not a readable image" in sentence and lines[0] == sentence
    assert lines[1] == "1 of 4 images cannot be read: the mean hand stands for them" and len(lines) == 2


def test_no_readable_image(data, network, tmp_path):
    folder = released(data, tmp_path)
    for path in (folder / "evaluation" / "rgb").iterdir():
        path.write_text("nothing")
    with pytest.raises(ValueError, match=r"none of the evaluation images can be read: .*00000000.jpg is not"):
        reconstruct_folder(network, folder, **QUIET)


def test_a_scale_that_is_none_is_named(data, network, tmp_path):
    folder = released(data, tmp_path)
    (folder / "evaluation_scale.json").write_text("[0.03, 0.03, 0, 0.03]")
    with pytest.raises(ValueError, match=r"evaluation_scale.json: record 2 is 0, expected a positive length"):
        reconstruct_folder(network, folder, **QUIET)
    assert len(reconstruct_folder(network, folder, use_scale=False, **QUIET).joints) == COUNT


def test_an_output_that_is_not_finite_is_named(data, network):
    class Broken(Oracle):
        def forward(self, images):
            prediction = super().forward(images)
            prediction.meshes[-1][1, 5] = torch.nan
            return prediction

    with pytest.raises(FloatingPointError, match=r"00000001.jpg: the network's output is not finite"):
        reconstruct_folder(Broken(data, network), data, **QUIET)


def run(folder, checkpoint, out, *options):
    command = ["eval", "--freihand", str(folder), "--checkpoint", str(checkpoint), "--out", str(out)]
    return main([*command, "--device", "cpu", *options])


def test_a_made_data_set_is_scored_by_the_protocol(data, checkpoint, network, tmp_path, capsys):
    assert run(data, checkpoint, tmp_path / "mine.json") == 0
    printed = capsys.readouterr().out
    xyz, verts = load_submission(tmp_path / "mine.json")
    hands = reconstruct_folder(network, data, **QUIET)
    np.testing.assert_allclose(verts, hands.vertices, atol=1e-6)
    written = json.loads((tmp_path / "mine.scores.json").read_text())
    truth = [
        np.array(json.loads((data / f"evaluation_{name}.json").read_text())) for name in ("xyz", "verts")
    ]
    assert written == pytest.approx(score_predictions(xyz, verts, *truth), abs=1e-9)
    assert f"{written['raw_mpvpe']:.2f}" in printed and f"{written['pa_mpjpe']:.2f}" in printed
    assert run(data, checkpoint, tmp_path / "mine.json", "--no-scale") == 0
    _, unscaled = load_submission(tmp_path / "mine.json")
    expected = reconstruct_folder(network, data, use_scale=False, **QUIET).vertices
    np.testing.assert_allclose(unscaled, expected, atol=1e-6)
    assert np.abs(unscaled - verts).max() > 1e-3


def test_the_released_archive_with_the_packages_own_hand(data, checkpoint, tmp_path, capsys):
    folder = released(data, tmp_path)
    pred = tmp_path / "pred.json"
    assert run(folder, checkpoint, pred) == 2
    error = capsys.readouterr().err
    assert "its mesh is the package's own hand" in error and "have MANO's" in error
    assert "--joints-only" in error and len(error.strip().splitlines()) == 1 and not pred.exists()
    assert run(folder, checkpoint, pred, "--joints-only") == 0
    assert "raw_mpjpe" in (tmp_path / "pred.scores.json").read_text()
    assert "vertices" not in (tmp_path / "pred.scores.json").read_text()


@pytest.fixture
def other(tmp_path):
    """A checkpoint of another mesh."""
    own = HandTopology.load()
    topology = own._replace(joint_regressor=np.roll(own.joint_regressor, 1, axis=1))
    path = tmp_path / "other.safetensors"
    save_checkpoint(path, HandNet(CONFIG.model, topology), CONFIG)
    return path


def test_the_released_archive_with_another_mesh(data, other, tmp_path, capsys):
    folder = released(data, tmp_path / "real")
    assert run(folder, other, tmp_path / "pred.json") == 0
    assert len(json.loads((tmp_path / "pred.scores.json").read_text())) == 14
    capsys.readouterr()
    assert run(data, other, tmp_path / "pred.json") == 2
    assert "its mesh is MANO's, while the hands of" in capsys.readouterr().err


def test_the_archive_without_annotations(data, other, tmp_path, capsys):
    folder = released(data, tmp_path / "real", labels=False)
    assert run(folder, other, tmp_path / "pred.json") == 0
    assert len(load_submission(tmp_path / "pred.json")[0]) == COUNT
    assert "evaluation_xyz.json is missing: nothing to score against" in capsys.readouterr().out
    assert not (tmp_path / "pred.scores.json").exists()


def test_a_damaged_image_and_strict(damaged, checkpoint, tmp_path, capsys):
    pred = tmp_path / "pred.json"
    assert run(damaged, checkpoint, pred, "--joints-only", "--strict") == 2
    error = capsys.readouterr().err
    assert "00000002.jpg is not a readable image" in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("pahm eval: image: ") and not pred.exists()
    assert run(damaged, checkpoint, pred, "--joints-only") == 0
    assert len(load_submission(pred)[0]) == COUNT
    assert "1 of 4 images cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("evaluation_K.json", None, "is not in FreiHAND's layout, evaluation_K.json is missing"),
        ("evaluation_scale.json", "[0.03, 0.03, 0.0", "evaluation_scale.json: expected ',' or ']'"),
        ("evaluation_xyz.json", "[]", "evaluation_xyz.json has 0"),
        ("evaluation_K.json", "", "evaluation_K.json is not a JSON array: it is empty"),
        ("evaluation/rgb/00000003.jpg", None, "evaluation/rgb has 3 images for the 4 records"),
    ],
)
def test_a_bad_folder_ends_with_one_sentence(name, text, sentence, data, checkpoint, tmp_path, capsys):
    path = released(data, tmp_path) / name
    path.unlink() if text is None else path.write_text(text)
    assert run(tmp_path, checkpoint, tmp_path / "pred.json", "--joints-only") == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1


def test_a_folder_that_is_none(checkpoint, tmp_path, capsys):
    assert run(tmp_path / "none", checkpoint, tmp_path / "pred.json") == 2
    assert "none is not a folder" in capsys.readouterr().err
    assert run(tmp_path, checkpoint, tmp_path / "pred.json") == 2
    assert "not in FreiHAND's layout, evaluation/rgb is missing" in capsys.readouterr().err
