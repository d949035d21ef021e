"""The command `pahm`: make data, train, score, predict, export, and the demo."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pahm.config import PRESETS, from_file, preset

_RESUMABLE = ("synth", "train", "shards", "ablate")


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
    train.add_argument(
        "--data", type=Path, required=True, help="folder in FreiHAND's layout, or tar shards of one"
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
    train.set_defaults(run=_train)

    shards = commands.add_parser("shards", help="pack training images into tar files; goes on where stopped")
    shards.add_argument("--data", type=Path, required=True, help="folder in FreiHAND's layout")
    shards.add_argument("--out", type=Path, required=True, help="folder of the shards")
    shards.add_argument("--size", type=int, default=1000, help="images a shard (%(default)s)")
    shards.set_defaults(run=_shards)

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
    evaluate.set_defaults(run=_eval)

    predict = commands.add_parser("predict", help="reconstruct the hand in images of your own")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of images")
    predict.add_argument("--out", type=Path, default=Path("pahm-predictions"), help="folder (%(default)s)")
    predict.add_argument(
        "--bbox", nargs=4, type=float, metavar=("X", "Y", "W", "H"), help="the hand, in pixels"
    )
    predict.add_argument("--intrinsics", type=Path, metavar="K.json", help="camera matrix, 3 x 3, in pixels")
    predict.add_argument("--left", action="store_true", help="the hands are left hands")
    predict.add_argument(
        "--write", default="overlay,glb,ply,json", metavar="KINDS", help="what to write (%(default)s)"
    )
    predict.add_argument("--batch-size", type=int, default=8, help="images at once (%(default)s)")
    predict.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    predict.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    predict.set_defaults(run=_predict)

    report = commands.add_parser("report", help="make one HTML page about a run: curves, scores, failures")
    report.add_argument("run_folder", type=Path, metavar="DIR", help="run folder of pahm train")
    report.add_argument("--data", type=Path, help="folder in FreiHAND's layout (the run's own)")
    report.add_argument("--baseline", type=Path, help="run folder or model.safetensors to compare with")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (DIR/report.html)")
    report.add_argument("--count", type=int, default=8, help="hands in the grid (%(default)s)")
    report.add_argument("--failures", type=int, default=6, help="worst hands shown (%(default)s)")
    report.add_argument("--images", type=int, help="evaluation images to score (all, up to 1000)")
    report.add_argument("--device", default="auto", help="cpu, cuda, ... (%(default)s)")
    report.set_defaults(run=_report)

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
    ablate.set_defaults(run=_ablate)

    export = commands.add_parser("export", help="write a network as an ONNX file")
    export.add_argument("--out", type=Path, default=Path("pahm.onnx"), help="the file (%(default)s)")
    export.add_argument("--checkpoint", type=Path, help="a model.safetensors (the shipped one)")
    export.set_defaults(run=_export)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one sentence on standard error where the input is at fault."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except _input_errors() as error:
        if options.debug:
            raise
        print(f"pahm {options.command}: {_sentence(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning makes SystemExit(1) of a KeyboardInterrupt.
        lightning = error.__context__ if isinstance(error, SystemExit) and error.code == 1 else error
        if not isinstance(lightning, KeyboardInterrupt):
            raise
        more = "; the same command goes on from here" if options.command in _RESUMABLE else ""
        print(f"pahm {options.command}: stopped{more}", file=sys.stderr)
        return 130


def _input_errors() -> tuple[type[Exception], ...]:
    """What is raised where the input is at fault."""
    errors = (ValueError, TypeError, IndexError, OSError, FloatingPointError)
    # Lightning is slow to import, and where it was not, it has raised nothing.
    lightning = sys.modules.get("lightning_fabric.utilities.exceptions")
    return errors if lightning is None else (*errors, lightning.MisconfigurationException)


def _sentence(error: Exception) -> str:
    """The error's message on one line, without the number that the operating system's errors start with."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename  # of a file moved, the place that it was to go to
        text = f"{path}: {error.strerror}" if path else error.strerror
    return " ".join(text.split())


def _changes(texts: Sequence[str]) -> dict[str, str]:
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        values[key] = value
    return values


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
    from pytorch_lightning.utilities import rank_zero_only

    from pahm.hand import HandModel
    from pahm.hand.topology import HandTopology
    from pahm.training import train

    config = from_file(options.config) if options.config else preset(options.preset)
    devices, nodes = options.devices or "1", options.nodes or "1"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's numbers, unless others are given
        local = os.environ["LOCAL_WORLD_SIZE"]
        devices = options.devices or local
        nodes = options.nodes or str(int(os.environ["WORLD_SIZE"]) // int(local))
    scores = train(
        config.override(_changes(options.set)),
        options.data,
        options.out,
        topology=HandTopology.from_hand(HandModel.from_mano(options.mano)) if options.mano else None,
        initial=options.init,
        accelerator=options.accelerator,
        devices=devices if devices == "auto" else _count("--devices", devices),
        strategy=options.strategy,
        nodes=_count("--nodes", nodes),
        eval_data=options.eval_data,
        strict=options.strict,
    )
    if getattr(rank_zero_only, "rank", 0) > 0:
        return  # one process speaks for all
    print(f"{options.out / 'model.safetensors'} is ready for pahm eval and pahm predict")
    if scores:
        print(", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def _shards(options: argparse.Namespace) -> None:
    from pahm.data.shards import write_shards

    count = write_shards(options.data, options.out, options.size)
    print(f"{options.out}: {count} shards are ready for pahm train --data")


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}: expected a number of at least 1, got {text!r}")
    return int(text)


def _ablate(options: argparse.Namespace) -> None:
    from pahm.ablation import ablate
    from pahm.hand import HandModel
    from pahm.hand.topology import HandTopology

    topology = HandTopology.from_hand(HandModel.from_mano(options.mano)) if options.mano else None
    path = ablate(
        options.table,
        options.out,
        scale=options.preset,
        data=options.data,
        seeds=options.seeds,
        changes=_changes(options.set),
        jobs=_count("--jobs", str(options.jobs)),
        topology=topology,
        accelerator=options.accelerator,
    )
    print(f"{path} is ready")


def _eval(options: argparse.Namespace) -> None:
    alone = ("checkpoint", "left", "strict", "no_scale") if options.submission else ()
    for name in (*alone, *(() if options.freihand else ("submission", "no_scale", "joints_only"))):
        if getattr(options, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: goes with --freihand and a network, see pahm eval --help")
    if not options.submission:
        _check_out(options.out)
    if options.freihand:
        _eval_freihand(options)
        return
    from pahm.evaluation import evaluate, print_scores
    from pahm.metrics import write_submission
    from pahm.model import load_checkpoint

    network = load_checkpoint(options.checkpoint)
    result = evaluate(
        network,
        options.data,
        left=options.left,
        strict=options.strict,
        device=options.device,
        batch_size=options.batch_size,
    )
    if result.scores is None:
        print(f"{options.data} has no evaluation annotations: nothing to score against")
    else:
        print_scores(result)
    write_submission(options.out, result.joints, result.vertices)
    print(
        f"{options.out}: joints and vertices of {len(result.joints)} images, in FreiHAND's submission format"
    )


def _check_out(path: Path) -> None:
    """Refuse an --out that cannot become a file, before the work whose result it is to hold."""
    if path.is_dir():
        raise ValueError(f"--out: expected a file, {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {path.parent} cannot be made a folder ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out: expected a folder that can be written to, got {path.parent}")


def _eval_freihand(options: argparse.Namespace) -> None:
    from pahm import scoring

    submission = options.submission or options.out
    if not options.submission:
        from pahm.evaluation import reconstruct
        from pahm.metrics import write_submission
        from pahm.model import load_checkpoint

        network = load_checkpoint(options.checkpoint)
        if not options.joints_only:
            scoring.check_mesh(network.topology, options.freihand)
        hands = reconstruct(
            network,
            options.freihand,
            use_scale=not options.no_scale,
            left=options.left,
            strict=options.strict,
            device=options.device,
            batch_size=options.batch_size,
        )
        write_submission(submission, hands.joints, hands.vertices)
        print(f"{submission}: joints and vertices of {len(hands.joints)} images, FreiHAND's submission")
        for path in scoring.truth_paths(options.freihand, joints_only=options.joints_only):
            if not path.exists():
                print(f"{path} is missing: nothing to score against")
                return
    scores = scoring.score_submission(
        submission, options.freihand, joints_only=options.joints_only, progress=True
    )
    scoring.print_submission_scores(scores)
    print(f"{scoring.write_scores(submission, scores)}: these scores")


def _predict(options: argparse.Namespace) -> int:
    from pahm.camera import read_intrinsics
    from pahm.model import load_checkpoint
    from pahm.predict import Predictor
    from pahm.predict_files import predict_files

    results = predict_files(
        Predictor(load_checkpoint(options.checkpoint), options.device),
        options.images,
        options.out,
        kinds=options.write.split(","),
        bbox=options.bbox,
        intrinsics=read_intrinsics(options.intrinsics) if options.intrinsics else None,
        left=options.left,
        batch_size=options.batch_size,
    )
    status = 0
    for result in results:
        if not isinstance(result, Exception):
            print(*result, sep="\n")
            continue
        status = 2
        if options.debug:
            traceback.print_exception(result)
        print(f"pahm predict: {_sentence(result)}", file=sys.stderr)
    return status


def _report(options: argparse.Namespace) -> None:
    from pahm.run_report import make_report

    page = make_report(
        options.run_folder,
        options.data,
        baseline=options.baseline,
        out=options.out,
        count=options.count,
        failures=options.failures,
        images=options.images,
        device=options.device,
    )
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, open it in a browser")


def _export(options: argparse.Namespace) -> None:
    from pahm.export import INPUT, OUTPUTS, export_onnx
    from pahm.model import load_checkpoint

    _check_out(options.out)
    network = load_checkpoint(options.checkpoint)
    export_onnx(network, options.out)
    size, crop = network.config.image_size, network.config.crop
    shape = f"{size} x {size} pixels, crop {crop:g}"
    print(f"{options.out}: takes {INPUT} ({shape}), gives {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    sys.exit(main())
