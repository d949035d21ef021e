"""What the command `pahm` takes on its command line: one dataclass a command, which tyro fills."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import tyro
from tyro import MISSING_NONPROP
from tyro.conf import FlagConversionOff, FlagCreatePairsOff, OmitSubcommandPrefixes, Positional, subcommand

from pahm import __version__
from pahm.config import PRESETS, Config, from_file, preset

if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[PRESETS]

Values = Annotated[Config, tyro.conf.arg(name=""), FlagConversionOff]
"""A configuration whose single values are options, such as `--train.epochs 3`."""


@dataclass(frozen=True)
class Demo:
    """Reconstruct a dozen new hands and make a contact sheet."""

    out: Path = Path("pahm-demo")
    """Folder for the results."""
    count: int = 12
    """Number of hands."""
    seed: int = 2026
    """Seed of the hands."""
    checkpoint: Path | None = None
    """Another checkpoint than the shipped one."""


@dataclass(frozen=True)
class Synth:
    """Render a data set of hands in FreiHAND's layout. The same command resumes an interrupted one."""

    out: Path
    """Folder of the data set."""
    train: int = 20000
    """Training images."""
    eval: int = 1000
    """Evaluation images."""
    seed: int = 0
    """The same seed gives the same annotations."""
    backgrounds: Path | None = None
    """Folder of images to put behind the hands."""
    workers: int | None = None
    """Processes. The default is one for each core."""


@dataclass(frozen=True)
class Train:
    """Train a network. The same command resumes an interrupted run."""

    data: tuple[Path, ...]
    """Folder in FreiHAND's layout, or tar shards of one, in one place or several."""
    out: Path
    """Folder of the run."""
    values: Values
    preset: Preset | None = None
    """A configuration of the package. The default is resnet18."""
    config: Path | None = None
    """A configuration file of your own, YAML or JSON, instead of a preset."""
    eval_data: Path | None = None
    """Folder whose evaluation images are scored. The default is --data."""
    mano: Path | None = None
    """MANO_RIGHT.pkl, for data with MANO's mesh such as FreiHAND."""
    init: Path | None = None
    """A model.safetensors whose weights a new run starts from."""
    accelerator: str = "auto"
    """cpu, gpu, ..."""
    devices: int | Literal["auto"] | None = None
    """Number of devices. The default is 1, and under torchrun its processes."""
    nodes: int | None = None
    """Number of machines. The default is 1, and under torchrun its nodes."""
    strategy: str = "auto"
    """A Lightning strategy, e.g. ddp."""
    strict: bool = False
    """End at an image that cannot be read, instead of taking the next one."""


@dataclass(frozen=True)
class Shards:
    """Pack training images into tar files. The same command resumes an interrupted one."""

    data: Path
    """Folder in FreiHAND's layout."""
    out: Path
    """Folder of the shards."""
    size: int = 1000
    """Images a shard."""


@dataclass(frozen=True)
class Eval:
    """Score a network on the evaluation images, as FreiHAND does."""

    data: Path | None = None
    """Folder in FreiHAND's layout, with the network's mesh."""
    freihand: Path | None = None
    """Such a folder instead of --data, scored by FreiHAND's protocol."""
    checkpoint: Path | None = None
    """A model.safetensors. The default is the shipped one."""
    out: Path = Path("pred.json")
    """FreiHAND submission to write."""
    device: str = "auto"
    """cpu, cuda, ..."""
    batch_size: int = 64
    """Images at once."""
    left: bool = False
    """The images show left hands."""
    strict: bool = False
    """End at an image that cannot be read, instead of taking the mean hand for it."""
    submission: Path | None = None
    """With --freihand: score this submission, without a network."""
    no_scale: bool = False
    """With --freihand: keep the network's size instead of evaluation_scale.json's."""
    joints_only: bool = False
    """With --freihand: score no vertices, for another mesh."""


@dataclass(frozen=True)
class Predict:
    """Reconstruct the hand in images of your own."""

    images: Positional[tuple[Path, ...]]
    """Files, or folders of images."""
    out: Path = Path("pahm-predictions")
    """Folder for the results."""
    bbox: Annotated[tuple[float, float, float, float] | None, tyro.conf.arg(metavar="X Y W H")] = None
    """A tight box around the hand, in pixels, for all images."""
    intrinsics: Path | None = None
    """JSON file with the camera matrix, 3 x 3, in pixels."""
    left: bool = False
    """The hands are left hands."""
    write: str = "png,glb,ply,json"
    """What to write."""
    batch_size: int = 8
    """Images at once."""
    checkpoint: Path | None = None
    """A model.safetensors. The default is the shipped one."""
    device: str = "auto"
    """cpu, cuda, ..."""
    engine: Literal["auto", "torch", "compile", "openvino", "onnxruntime"] = "auto"
    """What runs the network. The default is torch."""


@dataclass(frozen=True)
class Report:
    """Make one HTML page about a run: curves, scores, failures."""

    run_folder: Positional[Path]
    """Run folder of pahm train."""
    data: Path | None = None
    """Folder in FreiHAND's layout. The default is the run's own."""
    baseline: Path | None = None
    """Run folder or model.safetensors to compare with."""
    out: Path | None = None
    """The page. The default is report.html in the run's folder."""
    count: int = 8
    """Hands in the grid."""
    failures: int = 6
    """Worst hands shown."""
    images: int | None = None
    """Evaluation images to score. The default is all, up to 1000."""
    device: str = "auto"
    """cpu, cuda, ..."""


@dataclass(frozen=True)
class Ablate:
    """Train and score the rows of one of the paper's tables."""

    table: Positional[Literal["table1", "table2", "table3", "table4"]]
    out: Path
    """Folder of the runs and the table."""
    values: Values
    preset: Literal["tiny", "paper"] = "tiny"
    """Scale of the runs."""
    data: Path | None = None
    """Folder in FreiHAND's layout. Without it, tiny renders its own."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds that each row runs with."""
    only: tuple[str, ...] = ()
    """Rows to run, such as aligned-attention. The default is all of the table."""
    mano: Path | None = None
    """MANO_RIGHT.pkl, for data with MANO's mesh such as FreiHAND."""
    accelerator: str = "auto"
    """cpu, gpu, ..."""


@dataclass(frozen=True)
class Export:
    """Write a network as an ONNX file."""

    out: Path = Path("pahm.onnx")
    """The file."""
    checkpoint: Path | None = None
    """A model.safetensors. The default is the shipped one."""


Command = Demo | Synth | Train | Shards | Eval | Predict | Report | Ablate | Export


def parse(arguments: Sequence[str] | None = None) -> tuple[Command, bool]:
    """The command that `arguments` (`sys.argv`'s by default) name, and whether `--debug` stands before it.

    Ends with SystemExit, as tyro does, after `--help`, `--version`, and an explanation of wrong arguments.
    Raises FileNotFoundError or ValueError for a `--config` file that cannot be used.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"pahm {__version__}")
        raise SystemExit(0)
    command, debug = _parse(arguments, Config())
    if isinstance(command, Train | Ablate):
        # Only now is it known what the single values change.
        command, debug = _parse(arguments, base_of(command))
    return command, debug


def base_of(command: Train | Ablate) -> Config:
    """The configuration whose single values the command's options change."""
    if isinstance(command, Ablate):
        from pahm.ablation import SCALES

        return SCALES[command.preset].base(command.table)
    if command.config is None:
        return preset(command.preset or "resnet18")
    if command.preset is not None:
        raise ValueError("--config: expected either a file or a --preset, got both")
    return from_file(command.config)


def _parse(arguments: Sequence[str], base: Config) -> tuple[Command, bool]:
    defaults: dict[Any, Any] = {
        Train: Train(data=tyro.MISSING, out=tyro.MISSING, values=base),
        Ablate: Ablate(table=tyro.MISSING, out=tyro.MISSING, values=base),
    }
    commands: Any = tuple(
        Annotated[kind, subcommand(kind.__name__.lower(), default=defaults.get(kind, MISSING_NONPROP))]
        for kind in get_args(Command)
    )
    command: Any = Annotated[Union[commands], tyro.conf.arg(name="")]  # noqa: UP007
    debug: Any = Annotated[bool, tyro.conf.arg(help="Show the traceback of an error.")]
    found: Any = tyro.cli(
        make_dataclass("Pahm", [("command", command), ("debug", debug, field(default=False))]),
        prog="pahm",
        description="Pixel-aligned hand mesh reconstruction. pahm --version prints the version.",
        args=arguments,
        config=(FlagCreatePairsOff, OmitSubcommandPrefixes),
    )
    return found.command, found.debug
