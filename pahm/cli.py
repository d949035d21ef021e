"""The command `pahm`: make data, train, score, predict, export, and the demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pahm.config import PRESETS, Config, preset


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pahm", description="Pixel-aligned hand mesh reconstruction.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="reconstruct a dozen new hands and make a contact sheet")
    demo.add_argument(
        "--out", type=Path, default=Path("pahm-demo"), help="folder for the results (%(default)s)"
    )
    demo.add_argument("--count", type=int, default=12, help="number of hands (%(default)s)")
    demo.add_argument("--seed", type=int, default=2026, help="seed of the hands (%(default)s)")
    demo.add_argument("--checkpoint", type=Path, help="another checkpoint than the shipped one")
    demo.set_defaults(run=_demo)

    synth = commands.add_parser("synth", help="render a data set of hands in FreiHAND's layout")
    synth.add_argument("--out", type=Path, required=True, help="folder of the data set")
    synth.add_argument("--train", type=int, default=20000, help="training images (%(default)s)")
    synth.add_argument("--eval", type=int, default=1000, help="evaluation images (%(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="same seed, same annotations (%(default)s)")
    synth.add_argument("--backgrounds", type=Path, help="folder of images to put behind the hands")
    synth.add_argument("--workers", type=int, help="processes (all cores)")
    synth.set_defaults(run=_synth)

    train = commands.add_parser("train", help="train a network; goes on where a stopped run ended")
    train.add_argument("--data", type=Path, required=True, help="folder in FreiHAND's layout")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument(
        "--preset", default="resnet18", choices=list(PRESETS), help="configuration (%(default)s)"
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
    train.add_argument("--devices", default="1", help="number of devices, or auto (%(default)s)")
    train.add_argument("--strategy", default="auto", help="a Lightning strategy, e.g. ddp (%(default)s)")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="score a network on the evaluation images, as FreiHAND does")
    evaluate.add_argument("--data", type=Path, required=True, help="folder in FreiHAND's layout")
    evaluate.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    evaluate.add_argument(
        "--out", type=Path, default=Path("pred.json"), help="FreiHAND submission (%(default)s)"
    )
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=64, help="images at once (%(default)s)")
    evaluate.set_defaults(run=_eval)

    predict = commands.add_parser("predict", help="reconstruct the hand in images of your own")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    predict.add_argument("--out", type=Path, default=Path("pahm-predictions"), help="folder (%(default)s)")
    predict.add_argument(
        "--bbox", nargs=4, type=float, metavar=("X", "Y", "W", "H"), help="the hand, in pixels"
    )
    predict.add_argument("--intrinsics", type=Path, metavar="K.json", help="camera matrix, 3 x 3, in pixels")
    predict.add_argument("--left", action="store_true", help="the hands are left hands")
    predict.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    predict.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    predict.set_defaults(run=_predict)

    export = commands.add_parser("export", help="write a network as an ONNX file")
    export.add_argument("--out", type=Path, default=Path("pahm.onnx"), help="the file (%(default)s)")
    export.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    export.set_defaults(run=_export)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one sentence on standard error where the input is at fault."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, IndexError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"pahm {options.command}: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pahm {options.command}: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _sentence(error: Exception) -> str:
    """The error's message on one line, without the number that the operating system's errors start with."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split())


def _configuration(name: str, changes: Sequence[str]) -> Config:
    values = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {change!r}")
        values[key] = value
    return preset(name).override(values)


def _demo(options: argparse.Namespace) -> None:
    from pahm.demo import demo

    demo(options.out, count=options.count, seed=options.seed, checkpoint=options.checkpoint)


def _synth(options: argparse.Namespace) -> None:
    from pahm.data.synth import generate

    generate(
        options.out,
        options.train,
        options.eval,
        options.seed,
        backgrounds=options.backgrounds,
        workers=options.workers,
    )


def _train(options: argparse.Namespace) -> None:
    from pahm.hand import HandModel
    from pahm.hand.topology import HandTopology
    from pahm.training import train

    config = _configuration(options.preset, options.set)
    topology = HandTopology.from_hand(HandModel.from_mano(options.mano)) if options.mano else None
    devices = options.devices if options.devices == "auto" else _count("--devices", options.devices)
    scores = train(
        config,
        options.data,
        options.out,
        topology=topology,
        initial=options.init,
        accelerator=options.accelerator,
        devices=devices,
        strategy=options.strategy,
    )
    print(f"{options.out / 'model.safetensors'} is ready for pahm eval and pahm predict")
    if scores:
        print(", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}: expected a number of at least 1, got {text!r}")
    return int(text)


def _eval(options: argparse.Namespace) -> None:
    from pahm.evaluation import evaluate, print_scores
    from pahm.metrics import write_submission
    from pahm.model import load_checkpoint

    network = load_checkpoint(options.checkpoint)
    result = evaluate(network, options.data, device=options.device, batch_size=options.batch_size)
    write_submission(options.out, result.joints, result.vertices)
    print(
        f"{options.out}: joints and vertices of {len(result.joints)} images, in FreiHAND's submission format"
    )
    if result.scores is None:
        print(f"{options.data} has no evaluation annotations: nothing to score against")
    else:
        print_scores(result)


def _predict(options: argparse.Namespace) -> None:
    from pahm.model import load_checkpoint
    from pahm.predict import Predictor, read_intrinsics, write

    predictor = Predictor(load_checkpoint(options.checkpoint), options.device)
    intrinsics = read_intrinsics(options.intrinsics) if options.intrinsics else None
    for path in options.images:
        prediction = predictor.predict(path, bbox=options.bbox, intrinsics=intrinsics, left=options.left)
        for written in write(prediction, options.out, path.stem):
            print(written)


def _export(options: argparse.Namespace) -> None:
    from pahm.export import INPUT, OUTPUTS, export_onnx
    from pahm.model import load_checkpoint

    export_onnx(load_checkpoint(options.checkpoint), options.out)
    print(f"{options.out}: takes {INPUT}, gives {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    sys.exit(main())
