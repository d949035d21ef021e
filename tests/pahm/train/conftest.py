"""A few rendered hands, and a run on them that others only read."""

import pytest
from small_run import CONFIG

from pahm.synth.generate import generate
from pahm.train.trainer import train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 8, 6, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    scores = train(CONFIG, data, out, accelerator="cpu", progress=False)
    return out, scores
