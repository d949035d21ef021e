"""The options of the command line: help, single values of a configuration, and what is said of wrong ones."""

from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from pahm.arguments import Command, parse
from pahm.cli import main
from pahm.config import Config, preset


def test_help_names_every_command_and_every_value(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(kind.__name__.lower() in text for kind in get_args(Command))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    for part in ("model", "loss", "train", "augment"):
        for field in fields(getattr(Config(), part)):
            assert f"--{part}.{field.name.replace('_', '-')} " in text
    assert "Images a step, over all devices together. (default: 64)" in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--train.epoch", "3"], "Perhaps you meant: --train.epochs INT"),
        (
            ["--train.epochs", "many"],
            "Error parsing --train.epochs: invalid literal for int() with base 10: 'many'",
        ),
        (["--train.epochs", "0"], "train.epochs: expected a number from 1 to 1000000, got 0"),
        (["--train.schedule", "linear"], "Expected one of ('step', 'cosine')"),
        (["--loss.mesh", "1", "2"], "--loss.mesh"),
        (["--preset", "resnet"], "invalid choice 'resnet'"),
    ],
)
def test_wrong_options_are_explained(options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "x", "--out", "y", *options])
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert stop.value.code == 2 and sentence in said


def test_options_change_single_values_of_a_preset_or_a_file(tmp_path):
    train = ["train", "--data", "a", "b", "--out", "c"]
    options, debug = parse(
        ["--debug", *train, "--preset", "tiny", "--train.batch-size", "64", "--loss.mesh", *"1234"]
    )
    assert options.data == (Path("a"), Path("b")) and debug
    # 64 is the default of all configurations but this preset's.
    expected = {"train.batch_size": 64, "loss.mesh": [1, 2, 3, 4]}
    assert options.values == preset("tiny").override(expected)
    options, debug = parse([*train, "--model.pretrained", "False", "--train.milestones", "3", "5"])
    assert options.values == preset("resnet18").override(
        {"model.pretrained": False, "train.milestones": [3, 5]}
    )
    (tmp_path / "mine.yaml").write_text("model: {backbone_weights: w.pth}\ntrain: {learning_rate: 1e-3}")
    options, _ = parse([*train, "--config", str(tmp_path / "mine.yaml"), "--model.backbone-weights", "None"])
    assert options.values == Config(name="mine").override({"train.learning_rate": 1e-3}) and not debug


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--config", "{tmp}/none.yaml"], "configuration: {tmp}/none.yaml does not exist"),
        (["--config", "{tmp}/bad.yaml"], "{tmp}/bad.yaml: train.epochs: expected int, got 'many'"),
        (
            ["--config", "{tmp}/bad.yaml", "--preset", "tiny"],
            "--config: expected either a file or a --preset, got both",
        ),
    ],
)
def test_configurations_that_cannot_be_used_end_with_one_sentence(options, sentence, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("train: {epochs: many}")
    options = [option.format(tmp=tmp_path) for option in options]
    assert main(["train", "--data", "x", "--out", "y", *options]) == 2
    assert capsys.readouterr().err == f"pahm: {sentence.format(tmp=tmp_path)}\n"
