"""One typed configuration for the network, its losses, its training and its augmentation.

The defaults are the paper's. `preset(name)` reads a file of `pahm/configs`, `from_file` one of your own;
`Config.override` changes single values by dotted name, and `to_json` / `from_json` carry a configuration into
a checkpoint and back.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pahm.text_files import parse_json, parse_yaml, read_yaml, shown


@dataclass(frozen=True)
class ModelConfig:
    """The network of section 3. Tuples over levels run as the decoder does, from M4 (98) to M1 (778)."""

    backbone: str = "resnet18"
    """A timm model with features at strides 4, 8, 16 and 32."""
    pretrained: bool = False
    """Start from timm's ImageNet weights (downloaded by timm)."""
    backbone_weights: str | None = None
    """A local `.safetensors` or `.pth` file of the timm model's weights, for machines that are offline."""
    image_size: int = 224
    """Side of the square input in pixels, a multiple of 32."""
    crop: float = 1.0
    """What the input shows: the square about the image's centre with this fraction of its longer side. Below
    1 it leaves out the margin that hands in FreiHAND's images have.
    """
    feature_channels: tuple[int, int, int, int] = (256, 256, 128, 64)
    """Channels of Q_s at strides 32, 16, 8, 4."""
    stacks: Literal[1, 2] = 1
    """Hourglasses of the extractor; the second one sees the first one's 2D cues (CMR's, Table 4)."""
    cues: bool = True
    """Predict 2D pose and silhouette, which the auxiliary supervision of section 3.4 needs. Without them the
    first mesh is regressed from the image features alone.
    """
    mapping: Literal["pixel_aligned", "mlp", "repeat"] = "pixel_aligned"
    """How image features reach the vertices (Table 1): sampled at their projections, or the global feature
    through an MLP, or the global feature repeated.
    """
    skips: tuple[bool, bool, bool, bool] = (True, True, True, True)
    """Whether M4, M3, M2, M1 receive features of their image feature map (Table 2)."""
    refinements: Literal[0, 1, 3] = 0
    """Refinements of the full mesh after a decoder that sees the image at M4 only (Table 3); 0 is the
    paper's own coarse-to-fine decoder.
    """
    decoder: Literal["gcn", "metro"] = "gcn"
    """Graph convolutions, or METRO's transformer (Table 4)."""
    decoder_channels: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Vertex channels at M4, M3, M2, M1."""
    spiral_length: int = 9
    """Vertices of a spiral, the centre included."""
    attention_heads: tuple[int, int, int, int] = (4, 4, 4, 4)
    """Heads of the self-attention in the mesh-conv layers of M4, M3, M2, M1; 0 leaves it out."""
    transformer_channels: tuple[int, int, int] = (1024, 256, 128)
    """Widths of METRO's three encoder blocks."""
    transformer_layers: int = 4
    """Layers of each of METRO's blocks."""
    transformer_heads: int = 4
    """Heads of METRO's self-attention."""
    root_joint: int = 9
    """The joint (FreiHAND's order) that predicted meshes are relative to."""

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"model.image_size: expected a multiple of 32, got {self.image_size}")
        if not 0 < self.crop <= 10:
            raise ValueError(f"model.crop: expected a fraction above 0, at most 10, got {self.crop:g}")
        _within("model", self, image_size=(32, 1024), spiral_length=(1, 98), root_joint=(0, 20))
        _within(
            "model", self, feature_channels=(1, 4096), decoder_channels=(1, 4096), attention_heads=(0, 64)
        )
        _within("model", self, transformer_channels=(1, 8192))
        _within("model", self, transformer_layers=(1, 100), transformer_heads=(1, 64))


@dataclass(frozen=True)
class LossConfig:
    """Weights of equations 5 and 6, and of what the paper leaves open."""

    mesh: tuple[float, float, float, float] = (0.25, 0.5, 0.75, 1.0)
    """The paper's lambda_m for M4, M3, M2, M1 (values not given there)."""
    edge: float = 1.0
    """Weight of the edge lengths; the paper gives none."""
    normal: float = 0.1
    """The paper's lambda_n."""
    silhouette: float = 2.5
    """The paper's lambda_s."""
    pose: float = 10.0
    """The paper's lambda_p, of the 2D pose heatmaps."""
    projection: float = 1.0
    """Weight of the camera's supervision, see `pahm.train.losses.projection_loss`."""
    position: float = 1.0
    """Weight of the 2D positions that the first mesh is lifted from, see
    `pahm.train.losses.position_loss`.
    """
    joints: float = 1.0
    """Weight of the joints that METRO's joint queries predict, see `pahm.train.losses.joint_loss`."""
    heatmap_sigma: float = 3.5
    """Standard deviation of a pose heatmap's Gaussian, in pixels of a 224-pixel image (CMR)."""

    def __post_init__(self) -> None:
        weights = ("mesh", "edge", "normal", "silhouette", "pose", "projection", "position", "joints")
        _within("loss", self, **dict.fromkeys(weights, (0, 10**6)))
        _within("loss", self, heatmap_sigma=(1e-3, 1000))


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 64
    """Images a step, over all devices together."""
    learning_rate: float = 1e-4
    """The highest one of the schedule."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """`adamw` decays matrices and filters alone."""
    weight_decay: float = 0.0
    """Of the optimiser."""
    schedule: Literal["step", "cosine"] = "step"
    """`step`: times `decay` at each epoch of `milestones`. `cosine`: 5 % of the steps of warm-up, then a
    cosine to 0.
    """
    milestones: tuple[int, ...] = (35,)
    """Epochs at which the schedule `step` lowers the learning rate."""
    decay: float = 0.1
    """Factor of the learning rate at each of `milestones`."""
    gradient_clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Type of the computation. Weights stay in float32."""
    export: Literal["float32", "float16"] = "float32"
    """Type of the weights in `model.safetensors`."""
    channels_last: bool = True
    """Memory format of the feature maps: channels innermost, which convolutions on GPUs and CPUs prefer."""
    sync_batchnorm: bool = True
    """Normalise over the images of all GPUs, so that several train what one would. CPU processes normalise
    over their own images, and keep the first process's statistics.
    """
    ema: float = 0.0
    """Decay of the moving average of the weights, e.g. 0.999. The average is what is scored and exported.
    Early steps decay faster. 0 keeps no average.
    """
    shuffle_buffer: int = 4000
    """Images of tar shards among which the next one is drawn; a folder's are all shuffled."""
    workers: int = 2
    """Processes that load images, for each training process; they have no part in the result."""
    save_minutes: float = 10.0
    """A resumable checkpoint is saved as often within an epoch, besides at its end; 0 does not."""
    save_every: int = 0
    """The same in steps; 0 does not."""
    seed: int = 0
    """Of the weights, the order of the images and their augmentation."""

    def __post_init__(self) -> None:
        _within("train", self, epochs=(1, 10**6), batch_size=(1, 10**6), shuffle_buffer=(1, 10**9))
        _within(
            "train",
            self,
            learning_rate=(0, 1000),
            weight_decay=(0, 1000),
            decay=(0, 1),
            milestones=(0, 10**6),
            ema=(0, 0.999999),
        )
        _within("train", self, gradient_clip=(0, 10**9), save_minutes=(0, 10**6), save_every=(0, 10**9))
        _within("train", self, workers=(0, 1024), seed=(0, 2**32 - 1))


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random changes; each is uniform in plus or minus its value about "no change".

    The defaults are those of CMR and METRO but for the rotation, which is kept to what cameras see. Raises
    ValueError for a negative or not finite range, or one that would allow a factor of zero.
    """

    rotation: float = 60.0
    """Degrees in the image plane."""
    translation: float = 0.08
    """Fraction of the crop's side, each axis apart."""
    scale: float = 0.2
    """Relative size of the hand: a factor in [1 - scale, 1 + scale]."""
    brightness: float = 0.25
    """A factor in [1 - brightness, 1 + brightness]."""
    contrast: float = 0.4
    """A factor in [1 - contrast, 1 + contrast]."""
    saturation: float = 0.4
    """A factor in [1 - saturation, 1 + saturation]."""
    hue: float = 18.0
    """Degrees of rotation of the hue circle."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            limit = math.inf if name in ("rotation", "hue") else 1.0
            if not (math.isfinite(value) and 0 <= value < limit):
                bound = "" if math.isinf(limit) else " and below 1"
                raise ValueError(f"{name}: expected a finite number >= 0{bound}, got {value!r}")


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training run computes."""

    name: str = "resnet18"
    """What the run calls itself. The default is the name of the preset or the file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def override(self, values: Mapping[str, Any]) -> Config:
        """A copy with single values changed, e.g. `{"train.epochs": 3, "model.backbone": "resnet50"}`.

        Raises ValueError for a name that does not exist or a value of another type.
        """
        tree = asdict(self)
        for name, value in values.items():
            *parents, leaf = name.split(".")
            node: Any = tree
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
                raise ValueError(_unknown(name, _leaves(tree)))
            node[leaf] = value
        return from_dict(tree)

    def to_json(self) -> str:
        """The configuration as one JSON object."""
        return json.dumps(asdict(self))


def _within(part: str, values: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError for the first value, or entry of a tuple, outside its range, ends included; NaN is."""
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        for entry in value if isinstance(value, tuple) else (value,):
            if not low <= entry <= high:
                raise ValueError(f"{part}.{name}: expected a number from {low} to {high}, got {shown(entry)}")


def from_dict(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested dictionaries, checking every name and type (ValueError names the first
    wrong one).
    """
    return _build(Config, values, "")


def from_json(text: str) -> Config:
    """The inverse of `Config.to_json`."""
    values = parse_json(text, "configuration")
    if not isinstance(values, dict):
        raise ValueError(f"configuration: expected a JSON object, got {type(values).__name__}")
    return from_dict(values)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return names


def _unknown(name: str, names: Sequence[str]) -> str:
    """What to say of a name that is not one of `names`: the nearest ones, also where a part was left out."""
    ends: dict[str, list[str]] = {}
    for known in names:
        ends.setdefault(known.rpartition(".")[2], []).append(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if not near:
        found = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.75)
        near = [known for end in found for known in ends[end]]
    hint = f"did you mean {' or '.join(near)}?" if near else "pahm/config.py lists them all"
    return f"configuration has no value named {name!r}; {hint}"


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(_unknown(f"{prefix}{min(map(str, unknown))}", [f"{prefix}{name}" for name in hints]))
    arguments = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name}: expected an object, got {value!r}")
            arguments[name] = _build(kind, value, f"{prefix}{name}.")
        else:
            arguments[name] = _convert(value, kind, f"{prefix}{name}")
    return cls(**arguments)


def _convert(value: Any, kind: Any, name: str) -> Any:
    """The value of a file or a checkpoint as the field takes it, e.g. a list as a tuple.

    tyro does this for options. It reads nothing but text, and prints what is wrong with it instead of raising
    an error that can name the file.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in options:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and (options[-1] is Ellipsis or len(value) == len(options)):
            return tuple(_convert(entry, options[0], name) for entry in value)
    elif origin is not None:  # X | None
        given = next(option for option in options if option is not type(None))
        return None if value is None else _convert(value, given, name)
    elif kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML takes 1e-4 for text. No float holds a whole number of 400 digits.
        with suppress(OverflowError, ValueError):
            return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"{name}: expected {_describe(kind)}, got {shown(value)}")


def _describe(kind: Any) -> str:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(o) for o in options)
    if origin is tuple:
        count = "a list" if options[-1] is Ellipsis else f"{len(options)} values"
        return f"{count} of type {options[0].__name__}"
    return getattr(kind, "__name__", str(kind))


_FOLDER = resources.files("pahm") / "configs"

PRESETS = tuple(sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir()))
"""Names of the configuration files in the package."""


def preset(name: str) -> Config:
    """One of `PRESETS` by name; ValueError lists them."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    file = f"{name}.yaml"
    return _from_values(parse_yaml((_FOLDER / file).read_text(encoding="utf-8"), file), name, file)


def from_file(path: str | os.PathLike[str]) -> Config:
    """The configuration in a YAML file (or JSON, such as a run's `config.json`); what it leaves out is the
    default, and its `name` the file's.

    Raises FileNotFoundError, or ValueError naming the file and the value that is wrong.
    """
    try:
        return _from_values(read_yaml(path), Path(path).stem, os.fspath(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"configuration: {error}") from None


def _from_values(values: Any, name: str, where: str) -> Config:
    try:
        if not isinstance(values, dict):
            raise ValueError(f"expected values by name, got {shown(values)}")
        return from_dict({"name": name} | values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
