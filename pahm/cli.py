"""The command `pahm`: makes data, trains, scores, predicts, exports, and runs the demo."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pahm.arguments import (
    Ablate,
    Command,
    Demo,
    Eval,
    Export,
    Predict,
    Report,
    Shards,
    Synth,
    Train,
    base_of,
    parse,
)
from pahm.config import Config

_RESUMABLE = (Synth, Train, Shards, Ablate)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Stopped(BaseException):
    """Raised when a signal (the argument) asks the command to end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 on success, 2 with one sentence on standard error if the input is at fault,
    and 128 plus the signal's number if Ctrl-C, SIGTERM or SIGHUP ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        # Print characters outside the terminal's encoding with escapes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options, debug = parse(arguments)
    except (OSError, ValueError) as error:
        print(f"pahm: {sentence(error)}", file=sys.stderr)
        return 2
    name = f"pahm {type(options).__name__.lower()}"
    try:
        with _stopped_by_signals():
            if isinstance(options, Predict):
                return _predict(options, debug)
            _COMMANDS[type(options)](options)
            return 0
    except input_errors() as error:
        if debug:
            raise
        print(f"{name}: {sentence(error, options)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped, SystemExit) as error:
        number = _signal_behind(error)
        if number is None:
            raise
        more = "; the same command goes on from here" if isinstance(options, _RESUMABLE) else ""
        print(f"{name}: stopped{more}", file=sys.stderr)
        return 128 + number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Stopped`, unless they are ignored (nohup) or already have a handler."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_behind(error: BaseException) -> int | None:
    """The signal that ended the command, or None for any other exit."""
    if isinstance(error, SystemExit) and error.code == 1:
        error = error.__context__ or error  # Lightning turns a KeyboardInterrupt into SystemExit(1)
    if isinstance(error, Stopped):
        return int(error.args[0])
    return int(signal.SIGINT) if isinstance(error, KeyboardInterrupt) else None


def input_errors() -> tuple[type[Exception], ...]:
    """The exceptions raised if the input is at fault."""
    errors = (ValueError, TypeError, IndexError, OSError, FloatingPointError)
    # Lightning is slow to import. If it has not been imported, it has raised nothing.
    lightning = sys.modules.get("lightning_fabric.utilities.exceptions")
    return errors if lightning is None else (*errors, lightning.MisconfigurationException)


def sentence(error: Exception, options: Command | None = None) -> str:
    """The error's message on one line, without the error number of operating system errors."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        place = getattr(options, "out", None) or getattr(options, "run_folder", None)
        more = " to go on" if isinstance(options, _RESUMABLE) else ""
        return (
            f"the disk that holds {place} is full; what is finished stays, make room and run the same "
            f"command again{more}"
        )
    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename  # for a move, name the destination
        text = f"{path}: {error.strerror}" if path else error.strerror
    return printable(" ".join(text.split()))


def printable(text: object) -> str:
    """Escape characters that would move the cursor, change colours or end a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _demo(options: Demo) -> None:
    from pahm.demo import demo

    demo(options.out, count=options.count, seed=options.seed, checkpoint=options.checkpoint)


def _synth(options: Synth) -> None:
    from pahm.synth.generate import generate

    generate(
        options.out,
        options.train,
        options.eval,
        options.seed,
        backgrounds=options.backgrounds,
        workers=options.workers,
    )


def _train(options: Train) -> None:
    from pytorch_lightning.utilities import rank_zero_only

    from pahm.hand import HandModel
    from pahm.hand.topology import HandTopology
    from pahm.train.trainer import train

    devices, nodes = options.devices, options.nodes
    for name, count in (("--devices", devices), ("--nodes", nodes)):
        if isinstance(count, int) and count < 1:
            raise ValueError(f"{name}: expected a number of at least 1, got {count}")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # use torchrun's numbers unless others are given
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices = devices or local
        nodes = nodes or int(os.environ["WORLD_SIZE"]) // local
    train(
        options.values,
        options.data,
        options.out,
        topology=HandTopology.from_hand(HandModel.from_mano(options.mano)) if options.mano else None,
        initial=options.init,
        accelerator=options.accelerator,
        devices=devices or 1,
        strategy=options.strategy,
        nodes=nodes or 1,
        eval_data=options.eval_data,
        strict=options.strict,
    )
    if getattr(rank_zero_only, "rank", 0) > 0:
        return  # only one process prints
    print(f"{options.out / 'model.safetensors'} is ready for pahm eval and pahm predict")


def _shards(options: Shards) -> None:
    from pahm.data.shards import write_shards

    count = write_shards(options.data, options.out, options.size)
    print(f"{options.out}: {count} shards are ready for pahm train --data")


def _ablate(options: Ablate) -> None:
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
        only=options.only,
        changes=_changes(base_of(options), options.values),
        topology=topology,
        accelerator=options.accelerator,
    )
    print(f"{path} is ready")


def _changes(before: Config, after: Config) -> dict[str, Any]:
    """The values that differ, by dotted name."""
    return {
        f"{part}.{name}": value
        for part in ("model", "loss", "train", "augment")
        for name, value in vars(getattr(after, part)).items()
        if value != getattr(getattr(before, part), name)
    }


def _eval(options: Eval) -> None:
    if (options.data is None) == (options.freihand is None):
        given = "neither" if options.data is None else "both"
        raise ValueError(f"--data: expected a folder either there or with --freihand, got {given}")
    alone = ("checkpoint", "left", "strict", "no_scale") if options.submission else ()
    for name in (*alone, *(() if options.freihand else ("submission", "no_scale", "joints_only"))):
        if getattr(options, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: goes with --freihand and a network, see pahm eval --help")
    if not options.submission:
        _check_out(options.out)
    if options.freihand:
        _eval_freihand(options, options.freihand)
        return
    assert options.data is not None
    from pahm.model import load_checkpoint
    from pahm.score.evaluation import evaluate, print_scores
    from pahm.score.metrics import write_submission

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
    """Reject an --out that cannot become a file, before doing the work."""
    if path.is_dir():
        raise ValueError(f"--out: expected a file, {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {path.parent} cannot be made a folder ({error.strerror})") from error
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out: expected a folder that can be written to, got {path.parent}")


def _eval_freihand(options: Eval, folder: Path) -> None:
    from pahm.score import protocol as scoring

    submission = options.submission or options.out
    if not options.submission:
        from pahm.model import load_checkpoint
        from pahm.score.evaluation import reconstruct_folder
        from pahm.score.metrics import write_submission

        network = load_checkpoint(options.checkpoint)
        if not options.joints_only:
            scoring.check_mesh(network.topology, folder)
        hands = reconstruct_folder(
            network,
            folder,
            use_scale=not options.no_scale,
            left=options.left,
            strict=options.strict,
            device=options.device,
            batch_size=options.batch_size,
        )
        write_submission(submission, hands.joints, hands.vertices)
        print(f"{submission}: joints and vertices of {len(hands.joints)} images, FreiHAND's submission")
        for path in scoring.truth_paths(folder, joints_only=options.joints_only):
            if not path.exists():
                print(f"{path} is missing: nothing to score against")
                return
    scores = scoring.score_submission(submission, folder, joints_only=options.joints_only, progress=True)
    scoring.print_submission_scores(scores)
    print(f"{scoring.write_scores(submission, scores)}: these scores")


def _predict(options: Predict, debug: bool) -> int:
    from pahm.data.camera import read_intrinsics
    from pahm.infer.predictor import Predictor
    from pahm.infer.writers import predict_files
    from pahm.model import load_checkpoint

    if not options.images:
        raise ValueError("expected image files or folders, got none")
    results = predict_files(
        Predictor(load_checkpoint(options.checkpoint), options.device, options.engine),
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
            print(*map(printable, result), sep="\n")
            continue
        status = 2
        if debug:
            traceback.print_exception(result)
        print(f"pahm predict: {sentence(result, options)}", file=sys.stderr)
    return status


def _report(options: Report) -> None:
    from pahm.report import make_report

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


def _export(options: Export) -> None:
    from pahm.infer.export import INPUT, OUTPUTS, export_onnx
    from pahm.model import load_checkpoint

    _check_out(options.out)
    network = load_checkpoint(options.checkpoint)
    export_onnx(network, options.out)
    size, crop = network.config.image_size, network.config.crop
    shape = f"{size} x {size} pixels, crop {crop:g}"
    print(f"{options.out}: takes {INPUT} ({shape}), gives {', '.join(OUTPUTS)}")


_COMMANDS: dict[type, Callable[[Any], None]] = {
    Demo: _demo,
    Synth: _synth,
    Train: _train,
    Shards: _shards,
    Eval: _eval,
    Report: _report,
    Ablate: _ablate,
    Export: _export,
}


if __name__ == "__main__":
    sys.exit(main())
