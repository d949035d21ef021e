"""The command line: every command end to end on a small scale, and one sentence for bad input."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import pahm
import pahm_ops
from pahm.cli import Stopped, main
from pahm.config import preset
from pahm.data.freihand import FreiHand
from pahm.data.shards import ShardImages, find_shards
from pahm.model import HandNet, read_metadata, save_checkpoint
from pahm.score.metrics import load_submission
from pahm.train.trainer import HandTraining

SMALL = ["--model.backbone", "test_resnet", "--model.image-size", "64", "--model.pretrained", "False"]
SMALL += ["--train.epochs", "1", "--train.batch-size", "4", "--train.workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth") / "set"
    command = ["synth", "--out", str(folder), "--train", "4", "--eval", "3", "--seed", "5", "--workers", "1"]
    assert main(command) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    changes = {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": 64}
    config = preset("tiny").override(changes)
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    scores = {"images": 9.0, "pa_mpjpe": 12.25, "mean_hand_pa_mpjpe": 15.5}
    save_checkpoint(path, HandNet(config.model), config, scores=scores)
    return path


def test_synth_then_train_then_eval(data, tmp_path, capsys, caplog, monkeypatch):
    out = tmp_path / "run"
    train = ["train", "--data", str(data), "--out", str(out), "--preset", "tiny", "--accelerator", "cpu"]
    lightning = logging.getLogger("pytorch_lightning")
    monkeypatch.setattr(lightning, "propagate", True)
    assert main([*train, *SMALL]) == 0
    shown = capsys.readouterr()
    assert "loss" in shown.out + shown.err and "v_num" not in shown.out + shown.err
    assert not [record for record in caplog.records if record.name.startswith(lightning.name)]
    config, scores = read_metadata(out / "model.safetensors")
    assert (config.model.backbone, config.train.epochs, scores["images"]) == ("test_resnet", 1, 3)
    table = next(line for line in shown.out.splitlines() if "network" in line)
    assert f"{scores['pa_mpjpe']:.2f}" in table and "mean hand" in shown.out
    pred = tmp_path / "pred.json"
    evaluate = [
        "eval",
        "--data",
        str(data),
        "--checkpoint",
        str(out / "model.safetensors"),
        "--out",
        str(pred),
    ]
    assert main([*evaluate, "--device", "cpu"]) == 0
    xyz, verts = load_submission(pred)
    assert np.shape(xyz) == (3, 21, 3) and np.shape(verts) == (3, 778, 3)
    printed = capsys.readouterr().out
    assert f"{scores['pa_mpjpe']:.2f}" in printed and f"{scores['mean_hand_pa_mpjpe']:.2f}" in printed


def test_training_needs_no_masks(data, tmp_path, caplog):
    folder = tmp_path / "set"
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "training" / "mask")
    train = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--preset", "tiny"]
    assert main([*train, "--accelerator", "cpu", *SMALL]) == 0
    assert caplog.messages.count(f"data: {folder} has no masks: silhouettes are not trained") == 1
    assert main(["shards", "--data", str(folder), "--out", str(tmp_path / "shards")]) == 0
    images = ShardImages(find_shards(tmp_path / "shards"), 4, strict=True)
    assert len(images) == 4 and "mask" not in images[0] and not images.has_masks


def test_eval_without_annotations_writes_the_submission_only(data, checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "evaluation").symlink_to(data / "evaluation")
    for name in ("K", "scale"):
        (bare / f"evaluation_{name}.json").write_bytes((data / f"evaluation_{name}.json").read_bytes())
    pred = tmp_path / "pred.json"
    assert main(["eval", "--data", str(bare), "--checkpoint", str(checkpoint), "--out", str(pred)]) == 0
    assert "nothing to score" in capsys.readouterr().out and pred.exists()


@pytest.mark.parametrize("folder", ["--data", "--freihand"])
def test_eval_finds_a_bad_output_before_the_work(folder, data, tmp_path, capsys, monkeypatch):
    def load(path):
        raise ValueError("the network is loaded")

    monkeypatch.setattr("pahm.model.load_checkpoint", load)
    file, inner = tmp_path / "file", tmp_path / "a" / "b"
    file.write_text("")
    for out, sentence in (
        (tmp_path, f"--out: expected a file, {tmp_path} is a folder"),
        (file / "pred.json", f"--out: {file} cannot be made a folder (File exists)"),
        (inner / "pred.json", "the network is loaded"),
    ):
        assert main(["eval", folder, str(data), "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"pahm eval: {sentence}\n"
    assert inner.is_dir()
    monkeypatch.setattr("os.access", lambda *arguments: False)
    assert main(["eval", folder, str(data), "--out", str(inner / "pred.json")]) == 2
    assert f"--out: expected a folder that can be written to, got {inner}" in capsys.readouterr().err


def test_scores_are_printed_though_the_submission_cannot_be_written(
    data, checkpoint, tmp_path, capsys, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pahm.score.metrics.write_submission", full)
    command = ["eval", "--data", str(data), "--checkpoint", str(checkpoint), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "pred.json")]) == 2
    printed = capsys.readouterr()
    assert "mean hand" in printed.out and "pred.json is full; what is finished stays" in printed.err


def test_eval_takes_an_image_that_is_gone_for_an_unreadable_one(data, checkpoint, tmp_path, capsys):
    folder, pred = tmp_path / "set", tmp_path / "pred.json"
    shutil.copytree(data, folder)
    image = folder / "evaluation" / "rgb" / "00000001.jpg"
    image.unlink()
    image.symlink_to(tmp_path / "gone.jpg")
    command = ["eval", "--data", str(folder), "--checkpoint", str(checkpoint), "--out", str(pred)]
    command += ["--device", "cpu"]
    assert main([*command, "--strict"]) == 2
    assert capsys.readouterr().err.endswith(f"pahm eval: image: {image} does not exist\n")
    assert main(command) == 0
    errors = capsys.readouterr().err
    assert f"image: {image} does not exist\n" in errors and "1 of 3 images cannot be read" in errors
    assert len(load_submission(pred)[0]) == 3


def test_predict_writes_overlay_mesh_and_json(data, checkpoint, tmp_path):
    sample = FreiHand(data, "evaluation")[0]
    image = data / sample["name"]
    (tmp_path / "K.json").write_text(json.dumps(np.asarray(sample["K"]).tolist()))
    command = ["predict", str(image), "--checkpoint", str(checkpoint), "--device", "cpu"]
    command += ["--out", str(tmp_path / "right"), "--intrinsics", str(tmp_path / "K.json")]
    assert main([*command, "--bbox", "40", "40", "120", "130"]) == 0
    stem = image.stem
    assert Image.open(tmp_path / "right" / f"{stem}_overlay.png").size == (224, 224)
    for suffix in ("glb", "ply"):
        mesh = trimesh.load_mesh(tmp_path / "right" / f"{stem}.{suffix}", process=False)
        assert len(mesh.vertices) == 778 and len(mesh.faces) == 1538
    record = json.loads((tmp_path / "right" / f"{stem}.json").read_text())
    assert np.shape(record["vertices"]) == (778, 3) and np.shape(record["joints"]) == (21, 3)
    assert record["K"] == np.asarray(sample["K"], np.float64).tolist() and not record["intrinsics_assumed"]


def test_demo_shows_and_scores_new_hands(checkpoint, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--count", "2", "--checkpoint", str(checkpoint)]) == 0
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 5 * sheet.height / 2
    assert len(list(out.glob("*.glb"))) == 2 and len(list(out.glob("*_overlay.png"))) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "12.25 mm, mean hand 15.50 mm" in printed and "9 held-out images" in printed


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["demo", "--count", "0"], "count: expected at least 1 hand, got 0"),
        (["train", "--data", "{tmp}", "--out", "{tmp}/run"], "training"),
        (["train", "--data", "{tmp}", "--out", "{tmp}/run", "--devices", "0"], "at least 1, got 0"),
        (["predict"], "expected image files or folders, got none"),
        (["eval"], "--data: expected a folder either there or with --freihand, got neither"),
        (["eval", "--data", "{tmp}", "--freihand", "{tmp}"], "got both"),
        (["train", "--data", "{tmp}", "--out", "{tmp}/run", "--mano", "{tmp}/none.pkl"], "none.pkl"),
        (
            ["train", "--data", "{tmp}", "--out", "{tmp}/run", "--accelerator", "gpu", "--devices", "99"],
            "gpu",
        ),
        (["eval", "--data", "{tmp}", "--checkpoint", "{tmp}/none"], "no file at"),
        (["export", "--checkpoint", "{tmp}/none"], "no file at"),
        (["eval", "--data", "{tmp}/none", "--checkpoint", "{checkpoint}"], "none is not a folder"),
        (["predict", "{tmp}/none.jpg", "--checkpoint", "{checkpoint}"], "none.jpg does not exist"),
        (["predict", "{tmp}/text.jpg", "--checkpoint", "{checkpoint}"], "not a readable image"),
        (["predict", "{tmp}/text.jpg", "--checkpoint", "{tmp}/text.jpg"], "not a safetensors file"),
        (
            ["predict", "{tmp}/text.jpg", "--checkpoint", "{checkpoint}", "--intrinsics", "{tmp}/k"],
            "does not exist",
        ),
        (["predict", "{tmp}/text.jpg", "--checkpoint", "{checkpoint}", "--device", "abacus"], "abacus"),
        (["predict", "{tmp}/text.jpg", "--checkpoint", "{checkpoint}", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_ends_with_one_sentence(command, sentence, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("not an image")
    assert main([part.format(tmp=tmp_path, checkpoint=checkpoint) for part in command]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith(f"pahm {command[0]}: ")
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "function", "more"),
    [
        (["synth", "--out", "{tmp}"], "pahm.synth.generate.generate", " to go on"),
        (["predict", "{tmp}", "--out", "{tmp}"], "pahm.model.load_checkpoint", ""),
    ],
)
def test_a_full_disk_is_one_sentence(command, function, more, monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(function, full)
    assert main([part.format(tmp=tmp_path) for part in command]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"pahm {command[0]}: the disk that holds {tmp_path} is full; what is finished stays"
    )
    assert said.endswith(f"run the same command again{more}\n") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("first", "code", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk that holds {tmp} is full; what is"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from here"),
        (Stopped(signal.SIGTERM), 143, "stopped; the same command goes on from here"),
    ],
)
def test_what_ends_a_checkpoint_in_the_middle_is_told(
    first, code, sentence, data, tmp_path, monkeypatch, capsys
):
    def save(checkpoint, stream):  # torch.save ends a file that it cannot write with a RuntimeError
        try:
            raise first
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 704 vs 598")

    monkeypatch.setattr("pahm.train.run_folder.torch.save", save)
    train = ["train", "--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--accelerator", "cpu"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main([*train, *SMALL]) == code
    finally:
        signal.signal(signal.SIGINT, handler)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"pahm train: {sentence.format(tmp=tmp_path)}")
    assert not list(tmp_path.glob("last.ckpt*"))


def test_what_cannot_be_put_in_its_place_is_named_by_that_place(monkeypatch, capsys, tmp_path):
    def moves(*args, **kwargs):
        (tmp_path / "new.partial").write_text("")
        (tmp_path / "new").mkdir()
        (tmp_path / "new.partial").replace(tmp_path / "new")

    monkeypatch.setattr("pahm.synth.generate.generate", moves)
    assert main(["synth", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"pahm synth: {tmp_path / 'new'}: Is a directory\n"


@pytest.mark.parametrize(
    ("command", "function", "more"),
    [
        (["synth", "--out", "{tmp}"], "pahm.synth.generate.generate", True),
        (["shards", "--data", "{tmp}", "--out", "{tmp}"], "pahm.data.shards.write_shards", True),
        (["ablate", "table2", "--out", "{tmp}"], "pahm.ablation.ablate", True),
        (["demo", "--out", "{tmp}"], "pahm.demo.demo", False),
        (["predict", "{tmp}"], "pahm.model.load_checkpoint", False),
    ],
)
def test_a_stop_by_the_user_says_whether_the_command_goes_on(
    command, function, more, monkeypatch, capsys, tmp_path
):
    def interrupted(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if command[0] == "ablate":
                sys.exit(1)  # as Lightning does
            raise

    monkeypatch.setattr(function, interrupted)
    assert main([part.format(tmp=tmp_path) for part in command]) == 130
    more = "; the same command goes on from here" if more else ""
    assert capsys.readouterr().err == f"pahm {command[0]}: stopped{more}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_training_stops_it(number, data, tmp_path, monkeypatch, capsys):
    def stops(*arguments):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(HandTraining, "training_step", stops)
    train = ["train", "--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--accelerator", "cpu"]
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        assert main([*train, *SMALL]) == 128 + number
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():  # Lightning ignores Ctrl-C from then on
            signal.signal(number, handler)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "pahm train: stopped; the same command goes on from here"


@pytest.mark.parametrize("code", [1, 130])
def test_other_exits_are_left_alone(code, monkeypatch, capsys, tmp_path):
    def ends(*args, **kwargs):
        try:
            raise KeyboardInterrupt if code == 130 else ValueError
        except BaseException:
            sys.exit(code)

    monkeypatch.setattr("pahm.synth.generate.generate", ends)
    with pytest.raises(SystemExit) as stop:
        main(["synth", "--out", str(tmp_path)])
    assert stop.value.code == code and not capsys.readouterr().err


def test_help_and_version_come_without_what_is_slow_to_import():
    code = (
        "import sys; sys.argv = ['pahm', {!r}]; slow = ['torch', 'numpy', 'PIL', 'rich', 'trimesh']\n"
        "try: import pahm.__main__\n"
        "except SystemExit as end: assert not end.code and not set(slow) & set(sys.modules), sys.modules"
    )
    said = [
        subprocess.run([sys.executable, "-c", code.format(flag)], check=True, capture_output=True, text=True)
        for flag in ("--help", "--version")
    ]
    assert said[0].stdout.startswith("usage: pahm ")
    assert said[1].stdout == f"pahm {pahm.__version__}\n"
    assert pahm.__version__ == pahm_ops.__version__ == metadata.version("pahm")
