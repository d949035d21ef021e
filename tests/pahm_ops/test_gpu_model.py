"""The paper's decoder on a GPU, its ops served by kernels and by the reference."""

import pytest
import torch
from gpu_cases import DEVICE, close

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.gpu

SIZE = 224


def test_the_decoder_gives_the_same_on_the_reference(path, monkeypatch):
    from pahm.config import preset
    from pahm.model import HandNet

    torch.manual_seed(0)
    config = preset("resnet18").override({"model.pretrained": False})
    decoder = HandNet(config.model).decoder.to(DEVICE).eval()
    maps = [
        torch.randn(4, channels, SIZE // stride, SIZE // stride, device=DEVICE)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for channels, stride in zip(config.model.feature_channels, (32, 16, 8, 4), strict=True)
    ]
    joints = 2 * torch.rand(4, 21, 2, device=DEVICE) - 1
    inputs = [*maps, *(p for p in decoder.parameters() if p.requires_grad)]

    def step() -> list[torch.Tensor]:
        meshes = decoder(maps, joints)[0]
        loss = torch.stack([(1e3 * mesh).square().mean() for mesh in meshes]).sum()
        return [
            *meshes,
            *(g for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None),
        ]

    found = step()
    monkeypatch.setenv("PAHM_GPU_PATH", "reference")
    for i, (a, b) in enumerate(zip(found, step(), strict=True)):
        scale = b.detach().abs().max().clamp(min=1e-6)
        close(f"result {i}", a / scale, (b / scale).double(), 2e-3)
