"""The documentation's code runs, and its page of settings has every variable and every option."""

import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from documents import PAGES, blocks, commands
from repository import ROOT

from pahm.cli import main

#: what a reader brings
THEIRS = ("photo.jpg", "MANO_RIGHT.pkl", "runs/")
SETTINGS = PAGES["docs/settings.md"]
COMMANDS = re.findall(r"^### pahm (\w+)$", SETTINGS, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page, "python")])
def test_the_python_blocks_of_a_page_run_in_order(page):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        code = "\n".join(line.partition("  #")[0] for line in block.splitlines())
        if not any(name in code for name in THEIRS):
            exec(block, names)
    shapes = {
        "docs/operators.md": {
            "y": (8, 642, 32),
            "coarse": (8, 320, 32),
            "fine": (8, 642, 32),
            "features": (8, 642, 192),
            "weak": (8, 642, 192),
            "plain": (8, 642, 192),
        },
        "docs/data.md": {"vertices": (1, 778, 3), "joints": (1, 21, 3)},
    }
    for name, shape in shapes.get(page, {}).items():
        assert tuple(names[name].shape) == shape, name


@pytest.fixture(scope="module")
def options():
    """The options of each command, by its help."""
    found = {}
    for command in COMMANDS:
        with redirect_stdout(StringIO()) as shown, pytest.raises(SystemExit):
            main([command, "--help"])
        found[command] = set(re.findall(r"--[a-z][a-z.-]*[a-z]", shown.getvalue())) - {"--help"}
    return found


def test_commands_in_the_documentation_exist_with_their_options(options):
    named = {words[0] for _, words in commands()}
    assert named == set(COMMANDS)
    for page, words in commands():
        for word in words[1:]:
            if word.startswith("--"):
                assert word in options[words[0]], f"{page}: {words[0]} has no {word}"


def test_every_option_is_on_the_page_of_settings(options):
    """Those of the configuration, which have a dot, are made from its source."""
    sections = re.split(r"^### pahm ", SETTINGS, flags=re.MULTILINE)[1:]
    for section in sections:
        command = section.split("\n")[0]
        section = section.split("\n## ")[0]
        first = " ".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE))
        listed = {name for name in re.findall(r"`(--[\w.-]+)", first) if "." not in name}
        assert listed == {name for name in options[command] if "." not in name}, command


def test_every_command_is_on_the_page_of_settings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert set(COMMANDS) == set(re.search(r"\{([a-z,]+)\}", text)[1].split(","))


def test_every_environment_variable_is_on_the_page_of_settings():
    read = set()
    for folder in ("pahm", "pahm_ops", "csrc", "build_tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                text = path.read_text(encoding="utf-8")
                read |= set(re.findall(r"""(?:environ\w*(?:\.get)?[\[(]|getenv\()\s*"(\w+)""", text))
    read -= {"TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "PATH"}  # set by torchrun and the shell
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)(?:=[^`]*)?`", SETTINGS))
    assert read <= listed, read - listed
    ours = {name for name in listed if name.startswith("PAHM_")}
    assert ours <= {name for name in read if name.startswith("PAHM_")} | {"PAHM_CUDA_ARCHS", "PAHM_CUDA_HOME"}
