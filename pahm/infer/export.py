"""The network in other runtimes: written with PyTorch's own operators, and as an ONNX file."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pahm.data.augment import IMAGENET_MEAN, IMAGENET_STD
from pahm.model.network import Cues, FeatureMapping, HandNet, PixelAligned, Prediction
from pahm.whole_file import whole_file
from pahm_ops import MeshPool, SpiralConv
from pahm_ops.reference.spiral_conv import spiral_conv
from pahm_ops.reference.vertex_sample import vertex_sample

INPUT = "images"
OUTPUTS = ("vertices", "joints", "camera")


# The operators of `pahm_ops` for exporters, which know none of them


class _Conv(nn.Module):
    """A `SpiralConv` as gather and linear."""

    indices: Tensor

    def __init__(self, conv: SpiralConv) -> None:
        super().__init__()
        self.layer, self.activation = conv.layer, conv.activation
        self.register_buffer("indices", conv.indices)

    def forward(self, x: Tensor) -> Tensor:
        return spiral_conv(x, self.indices, self.layer.weight, self.layer.bias, self.activation)


class _Pool(nn.Module):
    """A `MeshPool` as a gather of as many entries in each row, most often 3, and their weighted sum.

    OpenVINO's converter does not know `index_add`, which the reference has.
    """

    columns: Tensor
    weights: Tensor

    def __init__(self, pool: MeshPool) -> None:
        super().__init__()
        matrix = pool(torch.eye(pool.shape[1]))
        self.entries = max(1, int((matrix != 0).sum(1).max()))
        columns = matrix.abs().topk(self.entries, dim=1).indices
        self.register_buffer("columns", columns.flatten())
        self.register_buffer("weights", matrix.gather(1, columns)[..., None])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.index_select(1, self.columns).unflatten(1, (-1, self.entries))
        return (rows * self.weights).sum(2)


class _Sample(FeatureMapping):
    """A `PixelAligned` as PyTorch's `grid_sample`."""

    def __init__(self, mapping: PixelAligned) -> None:
        super().__init__(mapping.channels)
        self.places = mapping.places

    def forward(self, maps: Sequence[Tensor], vertices: Tensor, camera: Tensor) -> Tensor:
        seen = [maps[place] for place in self.places]
        return vertex_sample(seen, vertices, camera, None, align_corners=False, padding_mode="border")


_PORTABLE = {SpiralConv: _Conv, MeshPool: _Pool, PixelAligned: _Sample}


def portable(network: HandNet) -> HandNet:
    """A float32 copy of `network` on the CPU, in evaluation mode, of PyTorch's own operators alone."""
    network = copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _PORTABLE:
                setattr(parent, name, _PORTABLE[type(child)](child))
    return network


# What runtimes take and give: tensors, not named tuples


class Flat(nn.Module):
    """A network that gives the tensors of its `Prediction` one after another."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return flatten(self.network(images))


def flatten(prediction: Prediction) -> tuple[Tensor, ...]:
    """The tensors of a prediction, in the order of its fields."""
    cues = [logits for cue in prediction.cues for logits in cue]
    return (*prediction.meshes, prediction.camera, *cues, *prediction.joints)


def unflatten(values: Sequence[Tensor], like: Prediction) -> Prediction:
    """The prediction that `flatten` made `values` of; it has as many meshes, cues and joints as `like`."""
    rest = iter(values)
    meshes = [next(rest) for _ in like.meshes]
    camera = next(rest)
    cues = [Cues(next(rest), next(rest)) for _ in like.cues]
    return Prediction(meshes, camera, cues, list(rest))


class _Reconstruction(nn.Module):
    def __init__(self, network: HandNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prediction = self.network(images)
        vertices = prediction.meshes[-1]
        return vertices, self.network.joints(vertices), prediction.camera


def export_onnx(network: HandNet, path: str | os.PathLike[str]) -> None:
    """Write `network` as one ONNX file of standard operators, for any batch size.

    Its input is `images` (B, 3, S, S) float32, RGB normalised with ImageNet's mean and deviation (as
    `CropTransform` gives them with the network's `config.crop`). Its outputs are `vertices` (B, 778, 3) and
    `joints` (B, 21, 3), metres relative to the root joint, and `camera` (B, 3), weak perspective (see
    `Prediction`). Its metadata says so in JSON values: `image_size` S, `crop`, `mean` and `std` of the
    channels between 0 and 1, and `root_joint`.

    Raises:
        ValueError: the packages onnx and onnxscript, which PyTorch's exporter needs, are not installed.
    """
    config = network.config
    metadata = {
        "image_size": config.image_size,
        "crop": config.crop,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "root_joint": config.root_joint,
    }
    write_onnx(_Reconstruction(portable(network)).eval(), config.image_size, path, OUTPUTS, metadata)


def write_onnx(
    module: nn.Module,
    size: int,
    path: str | os.PathLike[str],
    outputs: Sequence[str] | None = None,
    metadata: dict[str, object] | None = None,
) -> None:
    """Write a module of PyTorch's own operators, from images (B, 3, size, size) to tensors, as an ONNX file.

    outputs: names of the tensors. metadata: JSON values. Raises ValueError as `export_onnx`.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"PyTorch's ONNX exporter needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    program = torch.onnx.export(
        module,
        (torch.zeros(2, 3, size, size),),
        input_names=[INPUT],
        output_names=outputs and list(outputs),
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in (metadata or {}).items()})
    with whole_file(path) as partial:
        program.save(partial, external_data=False)
