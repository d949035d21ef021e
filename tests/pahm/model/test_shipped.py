"""The checkpoint in the package: its size, its configuration, and hands it has not seen."""

import pytest

from pahm.config import preset
from pahm.model import load_checkpoint, read_metadata, shipped_checkpoint
from pahm.score.evaluation import evaluate
from pahm.synth.generate import generate


def test_it_is_small_and_of_preset_tiny():
    assert shipped_checkpoint().stat().st_size <= 12 * 2**20
    config, scores = read_metadata(shipped_checkpoint())
    assert config.model == preset("tiny").model
    assert scores["images"] == 1000 and scores["pa_mpjpe"] <= 10 < scores["mean_hand_pa_mpjpe"]


def test_new_hands_are_reconstructed_about_as_well_as_recorded(tmp_path):
    generate(tmp_path, 0, 48, seed=77, workers=1, progress=False)
    result = evaluate(load_checkpoint(), tmp_path, device="cpu", workers=0, progress=False)
    _, recorded = read_metadata(shipped_checkpoint())
    assert result.scores["pa_mpjpe"] == pytest.approx(recorded["pa_mpjpe"], rel=0.2)
    assert result.scores["pa_mpjpe"] < result.mean_hand_scores["pa_mpjpe"]
