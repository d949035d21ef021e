"""Checkpoints as safetensors: weights, the hand's topology, and the configuration as metadata. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pahm.config import Config, from_json
from pahm.hand.topology import HandTopology
from pahm.model.build import build_network
from pahm.model.network import HandNet
from pahm.text_files import parse_json
from pahm.whole_file import whole_file

FORMAT = "pahm-1"


def save_checkpoint(
    path: str | os.PathLike[str],
    network: HandNet,
    config: Config,
    *,
    scores: dict[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    provenance: Mapping[str, str | None] | None = None,
) -> None:
    """Write `network` to a `.safetensors` file, which is all that `load_checkpoint` needs.

    Args:
        config: the run's configuration; its `model` part must be the network's. The path of the backbone's
            first weights is not recorded.
        scores: the scores to record beside the weights, such as `HandMetrics` gives.
        dtype: floating-point weights are stored in this type (float16 halves the file).
        provenance: versions, machine and revision to record, as `pahm.train.provenance` gives them.
    """
    tensors = {
        f"network.{name}": value.to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in network.state_dict().items()
    }
    for name, value in network.topology.to_arrays().items():
        tensors[f"topology.{name}"] = torch.from_numpy(value.copy())
    recorded = config.override({"model.backbone_weights": None}).to_json()
    metadata = {"format": FORMAT, "config": recorded, "scores": json.dumps(scores or {})}
    metadata["provenance"] = json.dumps(dict(provenance or {}))
    metadata["sha256"] = _digest(tensors, metadata)
    with whole_file(path) as partial:
        partial.write_bytes(save(tensors, metadata))


def read_metadata(path: str | os.PathLike[str]) -> tuple[Config, dict[str, float]]:
    """The configuration and the recorded scores of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this package.
    """
    metadata = _metadata(path)
    try:
        return from_json(metadata["config"]), parse_json(metadata["scores"], "scores")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"checkpoint: {os.fspath(path)} does not describe a network of this version ({error})"
        ) from error


def read_provenance(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """What made a checkpoint, as `pahm.train.provenance` gives it; empty if the file does not say.

    Raises FileNotFoundError, ValueError as `read_metadata`.
    """
    found: dict[str, str | None] = parse_json(_metadata(path).get("provenance", "{}"), "provenance")
    return found


def _metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: no file at {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {os.fspath(path)} is not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: {os.fspath(path)} has format {metadata.get('format')!r}, expected {FORMAT!r}"
        )
    return metadata


def shipped_checkpoint() -> Path:
    """The checkpoint that comes with the package: preset `tiny`, trained on the package's own data set."""
    return Path(str(resources.files("pahm") / "assets" / "tiny.safetensors"))


def load_checkpoint(path: str | os.PathLike[str] | None = None, expect: Config | None = None) -> HandNet:
    """The network of a checkpoint in evaluation mode, float32, on the CPU.

    Args:
        path: a file of `save_checkpoint`; None is the shipped one.
        expect: a configuration whose network must have the same weights; what it sees of an image
            (`image_size`, `crop`) may differ.

    Raises:
        FileNotFoundError, ValueError: as `read_metadata`.
        ValueError: `expect` describes another network (the first value that differs is named); the weights do
            not fit the recorded configuration; or the file is damaged. Damage shows by the digest in the
            file, or, in older files without one, by impossible weights or an impossible hand.
    """
    path = shipped_checkpoint() if path is None else path
    config, _ = read_metadata(path)
    if expect is not None:
        check_same_network(config, expect, os.fspath(path), but=("image_size", "crop"))
    weights, arrays = {}, {}
    for name, value in _read_tensors(path).items():
        kind, _, rest = name.partition(".")
        if kind == "topology":
            arrays[rest] = value.numpy()
        else:
            weights[rest] = value.float() if value.is_floating_point() else value
    try:
        topology = HandTopology.from_arrays(arrays)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"checkpoint: {os.fspath(path)} has no whole hand ({error})") from error
    with _float32(), torch.device("meta"):  # a configuration can ask for more memory than there is
        shapes = {
            name: value.shape for name, value in build_network(config, topology, False).state_dict().items()
        }
    found = {name: value.shape for name, value in weights.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            have, wanted = (tuple(s[name]) if name in s else "nothing" for s in (found, shapes))
            raise ValueError(
                f"checkpoint: the weights in {os.fspath(path)} do not fit its configuration: "
                f"expected {wanted} for {name}, got {have}"
            )
    with _float32(), torch.device("cpu"):
        network = build_network(config, topology, load_backbone=False)
    network.load_state_dict(weights)
    return network.eval()


@contextmanager
def _float32() -> Iterator[None]:
    """Parameters are made in float32, whatever the default dtype is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as stored. Raises ValueError, naming the file, if they are damaged."""
    metadata = _metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    recorded = metadata.pop("sha256", None)
    if recorded is not None and recorded != _digest(tensors, metadata):
        raise ValueError(f"checkpoint: {os.fspath(path)} is damaged: its content is not what was written")
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(
                f"checkpoint: {os.fspath(path)} is damaged: {name} has values that are not finite"
            )
        # Without a digest, a part overwritten by zeros shows here: no trained layer is all zeros.
        if name.endswith(".weight") and value.dim() > 1 and not value.any():
            raise ValueError(f"checkpoint: {os.fspath(path)} is damaged: {name} has nothing but zeros")
    return tensors


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all tensors and metadata of a checkpoint, in hexadecimal."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.flatten().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_same_network(found: Config, expected: Config, where: str, but: Sequence[str] = ()) -> None:
    """Raise ValueError naming the first value of `model` that differs.

    Values in `but` may differ, and where pretrained weights came from.
    """
    free = ("pretrained", "backbone_weights", *but)
    for name, value in vars(expected.model).items():
        if name not in free and getattr(found.model, name) != value:
            raise ValueError(
                f"checkpoint: {where} has model.{name} = {getattr(found.model, name)!r}, expected {value!r}"
            )
