"""A run of training, its data and its page, made once for all tests of the report."""

import shutil

import pytest
from report_page import CONFIG, FAILURES, GRID, IMAGES

from pahm.cli import main
from pahm.model import read_metadata, shipped_checkpoint
from pahm.synth.generate import generate
from pahm.train.trainer import train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 16, IMAGES, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train(CONFIG, data, out, accelerator="cpu", progress=False)
    return out


@pytest.fixture(scope="session")
def run(trained, tmp_path_factory):
    """A run folder with the curves of a short training and the weights of a long one."""
    out = tmp_path_factory.mktemp("run") / "a <run> & more"
    shutil.copytree(trained / "tensorboard", out / "tensorboard")
    shutil.copy(shipped_checkpoint(), out / "model.safetensors")
    (out / "config.json").write_text(read_metadata(shipped_checkpoint())[0].to_json())
    return out


@pytest.fixture(scope="session")
def page(run, data, trained):
    options = ["--count", str(GRID), "--failures", str(FAILURES), "--device", "cpu"]
    assert main(["report", str(run), "--data", str(data), "--baseline", str(trained), *options]) == 0
    return run / "report.html"
