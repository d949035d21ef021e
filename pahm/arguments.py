"""What the command `pahm` takes on its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from pahm import __version__
from pahm.config import PRESETS


def make_parser() -> argparse.ArgumentParser:
    """The parser of `pahm`; its result names the command as `command`."""
    parser = argparse.ArgumentParser(prog="pahm", description="Pixel-aligned hand mesh reconstruction.")
    parser.add_argument("--version", action="version", version=f"pahm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="reconstruct a dozen new hands and make a contact sheet")
    demo.add_argument(
        "--out", type=Path, default=Path("pahm-demo"), help="folder for the results (%(default)s)"
    )
    demo.add_argument("--count", type=int, default=12, help="number of hands (%(default)s)")
    demo.add_argument("--seed", type=int, default=2026, help="seed of the hands (%(default)s)")
    demo.add_argument("--checkpoint", type=Path, help="another checkpoint than the shipped one")

    synth = commands.add_parser("synth", help="render a data set of hands in FreiHAND's layout")
    synth.add_argument("--out", type=Path, required=True, help="folder of the data set")
    synth.add_argument("--train", type=int, default=20000, help="training images (%(default)s)")
    synth.add_argument("--eval", type=int, default=1000, help="evaluation images (%(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="same seed, same annotations (%(default)s)")
    synth.add_argument("--backgrounds", type=Path, help="folder of images to put behind the hands")
    synth.add_argument("--workers", type=int, help="processes (all cores)")

    train = commands.add_parser("train", help="train a network; goes on where a stopped run ended")
    train.add_argument(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        help="folder in FreiHAND's layout, or tar shards of one, in one place or several",
    )
    train.add_argument("--eval-data", type=Path, help="folder whose evaluation images are scored (--data)")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    configuration = train.add_mutually_exclusive_group()
    configuration.add_argument(
        "--preset", default="resnet18", choices=PRESETS, help="a configuration of the package (%(default)s)"
    )
    configuration.add_argument(
        "--config", type=Path, metavar="FILE", help="a configuration of your own, YAML"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one value, e.g. train.epochs=3",
    )
    train.add_argument("--mano", type=Path, help="MANO_RIGHT.pkl, for data with MANO's mesh such as FreiHAND")
    train.add_argument("--init", type=Path, help="a model.safetensors whose weights a new run starts from")
    train.add_argument("--accelerator", default="auto", help="cpu, gpu, ... (%(default)s)")
    train.add_argument("--devices", help="number of devices, or auto (1; under torchrun, its processes)")
    train.add_argument("--nodes", help="number of machines (1; under torchrun, its nodes)")
    train.add_argument("--strategy", default="auto", help="a Lightning strategy, e.g. ddp (%(default)s)")
    train.add_argument(
        "--strict", action="store_true", help="end at an image that cannot be read (else: take the next one)"
    )

    shards = commands.add_parser("shards", help="pack training images into tar files; goes on where stopped")
    shards.add_argument("--data", type=Path, required=True, help="folder in FreiHAND's layout")
    shards.add_argument("--out", type=Path, required=True, help="folder of the shards")
    shards.add_argument("--size", type=int, default=1000, help="images a shard (%(default)s)")

    evaluate = commands.add_parser("eval", help="score a network on the evaluation images, as FreiHAND does")
    folder = evaluate.add_mutually_exclusive_group(required=True)
    folder.add_argument("--data", type=Path, help="folder in FreiHAND's layout, with the network's mesh")
    folder.add_argument("--freihand", type=Path, help="such a folder, scored by FreiHAND's protocol")
    evaluate.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    evaluate.add_argument(
        "--out", type=Path, default=Path("pred.json"), help="FreiHAND submission (%(default)s)"
    )
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=64, help="images at once (%(default)s)")
    evaluate.add_argument("--left", action="store_true", help="the images show left hands")
    evaluate.add_argument(
        "--strict", action="store_true", help="end at an image that cannot be read (else: the mean hand)"
    )
    evaluate.add_argument(
        "--submission", type=Path, metavar="PRED.json", help="with --freihand: score this file, no network"
    )
    evaluate.add_argument(
        "--no-scale",
        action="store_true",
        help="with --freihand: keep the network's size instead of evaluation_scale.json's",
    )
    evaluate.add_argument(
        "--joints-only", action="store_true", help="with --freihand: score no vertices, for another mesh"
    )

    predict = commands.add_parser("predict", help="reconstruct the hand in images of your own")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of images")
    predict.add_argument("--out", type=Path, default=Path("pahm-predictions"), help="folder (%(default)s)")
    predict.add_argument(
        "--bbox",
        nargs=4,
        type=float,
        metavar=("X", "Y", "W", "H"),
        help="a tight box around the hand, in pixels, for all images",
    )
    predict.add_argument("--intrinsics", type=Path, metavar="K.json", help="camera matrix, 3 x 3, in pixels")
    predict.add_argument("--left", action="store_true", help="the hands are left hands")
    predict.add_argument(
        "--write", default="png,glb,ply,json", metavar="KINDS", help="what to write (%(default)s)"
    )
    predict.add_argument("--batch-size", type=int, default=8, help="images at once (%(default)s)")
    predict.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    predict.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")

    report = commands.add_parser("report", help="make one HTML page about a run: curves, scores, failures")
    report.add_argument("run_folder", type=Path, metavar="DIR", help="run folder of pahm train")
    report.add_argument("--data", type=Path, help="folder in FreiHAND's layout (the run's own)")
    report.add_argument("--baseline", type=Path, help="run folder or model.safetensors to compare with")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (DIR/report.html)")
    report.add_argument("--count", type=int, default=8, help="hands in the grid (%(default)s)")
    report.add_argument("--failures", type=int, default=6, help="worst hands shown (%(default)s)")
    report.add_argument("--images", type=int, help="evaluation images to score (all, up to 1000)")
    report.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")

    ablate = commands.add_parser("ablate", help="train and score the rows of one of the paper's tables")
    ablate.add_argument("table", choices=["table1", "table2", "table3", "table4"])
    ablate.add_argument("--preset", default="tiny", choices=["tiny", "paper"], help="scale (%(default)s)")
    ablate.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    ablate.add_argument("--data", type=Path, help="folder in FreiHAND's layout (tiny renders its own)")
    ablate.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="(0 1)")
    ablate.add_argument("--jobs", type=int, default=1, help="runs at the same time (%(default)s)")
    ablate.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for all rows alike")
    ablate.add_argument(
        "--mano", type=Path, help="MANO_RIGHT.pkl, for data with MANO's mesh such as FreiHAND"
    )
    ablate.add_argument("--accelerator", default="auto", help="cpu, gpu, ... (%(default)s)")

    export = commands.add_parser("export", help="write a network as an ONNX file")
    export.add_argument("--out", type=Path, default=Path("pahm.onnx"), help="the file (%(default)s)")
    export.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    return parser
