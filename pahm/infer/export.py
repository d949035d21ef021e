"""The network as an ONNX file, for runtimes without PyTorch."""

from __future__ import annotations

import importlib.util
import json
import os

import torch
from torch import Tensor, nn

from pahm.data.augment import IMAGENET_MEAN, IMAGENET_STD
from pahm.model.network import HandNet
from pahm.whole_file import whole_file

INPUT = "images"
OUTPUTS = ("vertices", "joints", "camera")


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
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"PyTorch's ONNX exporter needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    size = network.config.image_size
    module = _Reconstruction(network).to("cpu", torch.float32).eval()
    program = torch.onnx.export(
        module,
        (torch.zeros(2, 3, size, size),),
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    config = network.config
    metadata = {
        "image_size": size,
        "crop": config.crop,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "root_joint": config.root_joint,
    }
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    with whole_file(path) as partial:
        program.save(partial, external_data=False)
