"""The README's code runs as it stands, and its commands exist."""

import re

import pytest
import torch
from repository import ROOT

from pahm.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_in_order():
    torch.manual_seed(0)
    names: dict[str, object] = {}
    runnable = [block for block in blocks("python") if "photo.jpg" not in block]
    assert len(runnable) == 5
    for block in runnable:
        exec(block, names)
    shapes = {name: tuple(names[name].shape) for name in ("y", "coarse", "fine", "features", "weak", "plain")}
    assert shapes == {
        "y": (8, 642, 32),
        "coarse": (8, 320, 32),
        "fine": (8, 642, 32),
        "features": (8, 642, 192),
        "weak": (8, 642, 192),
        "plain": (8, 642, 192),
    }
    assert tuple(names["vertices"].shape) == (1, 778, 3) and tuple(names["joints"].shape) == (1, 21, 3)


def test_commands_and_options_exist(capsys):
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("pahm ")]
    assert {command[0] for command in commands} == {"predict", "synth", "train", "eval", "ablate"}
    for command in commands:
        with pytest.raises(SystemExit):
            main([command[0], "--help"])
        text = capsys.readouterr().out
        for option in (part for part in command if part.startswith("--")):
            assert option in text, f"{command[0]} has no {option}"


def test_the_test_line_is_marked_for_continuous_integration():
    block = README.split("<!-- the test line -->")[1].split("```")[1]
    assert block.startswith("bash\npython3 -m venv") and block.count("\n") == 2
