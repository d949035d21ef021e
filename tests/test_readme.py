"""The README's code runs as it stands, and continuous integration finds its test line."""

import torch
from documents import PAGES, blocks

README = PAGES["README.md"]


def test_the_operators_block_runs():
    torch.manual_seed(0)
    names: dict[str, object] = {}
    (runnable,) = (block for block in blocks("README.md", "python") if "photo.jpg" not in block)
    exec(runnable, names)
    shapes = {name: tuple(names[name].shape) for name in ("features", "coarse", "seen")}
    assert shapes == {"features": (8, 642, 32), "coarse": (8, 320, 32), "seen": (8, 320, 192)}


def test_the_test_line_is_marked_for_continuous_integration():
    block = README.split("<!-- the test line -->")[1].split("```")[1]
    assert block.startswith("bash\npython3 -m venv") and block.count("\n") == 2


def test_the_readme_fits_two_screens():
    assert len(README.splitlines()) <= 110
