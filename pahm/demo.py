"""The demo: renders new hands, reconstructs, scores and shows them, using only files in the package."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pahm.data.freihand import FreiHand
from pahm.infer.predictor import Predictor
from pahm.model import load_checkpoint, read_metadata, shipped_checkpoint
from pahm.report.pictures import SheetRow, contact_sheet
from pahm.score.evaluation import evaluate, print_scores
from pahm.score.metrics import procrustes_errors
from pahm.synth.generate import generate

SHEET_ROWS = 12


def demo(
    out: str | os.PathLike[str],
    *,
    count: int = 12,
    seed: int = 2026,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Path:
    """Render `count` hands that are in no training set, reconstruct them, and show and score the result.

    `out` receives `data/` (the images, in FreiHAND's layout), the files of `pahm.infer.hand.Hand.save`
    for each of the first dozen hands, and `contact_sheet.png`, whose path is returned. The scores are printed
    next to those of the constant mean hand and those recorded with the checkpoint.

    Raises ValueError for a count below 1, and as `generate` and `load_checkpoint`.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 hand, got {count}")
    start = time.monotonic()
    out, console = Path(out), Console()
    checkpoint = shipped_checkpoint() if checkpoint is None else Path(checkpoint)
    network = load_checkpoint(checkpoint)
    data = out / "data"
    generate(data, 0, count, seed)
    result = evaluate(network, data)
    predictor = Predictor(network)
    samples = FreiHand(data, "evaluation")
    rows = []
    for i in range(min(count, SHEET_ROWS)):
        sample = samples[i]
        hand = predictor.predict(sample["image"], intrinsics=sample["K"])
        hand.save(out, Path(sample["name"]).stem, ("png", "glb", "ply", "json"))
        truth = np.asarray(sample["vertices"], np.float64)
        joints = (
            torch.from_numpy(hand.joints)[None],
            torch.from_numpy(sample["joints"])[None].double(),
        )
        rows.append(SheetRow(hand, truth, f"{1000 * procrustes_errors(*joints).mean():.1f} mm"))
    sheet = out / "contact_sheet.png"
    contact_sheet(rows).save(sheet)
    print_scores(result, console)
    _, recorded = read_metadata(checkpoint)
    if recorded:
        console.print(
            f"recorded with the checkpoint, {recorded['images']:.0f} held-out images: PA-MPJPE "
            f"{recorded['pa_mpjpe']:.2f} mm, mean hand {recorded['mean_hand_pa_mpjpe']:.2f} mm"
        )
    console.print(f"contact sheet: {sheet}   ({time.monotonic() - start:.0f} s)", soft_wrap=True)
    return sheet
