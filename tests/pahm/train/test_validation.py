"""The evaluation within training, step by step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pahm.config import preset
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.data.loading import Batches, FolderImages
from pahm.synth.generate import generate
from pahm.train.module import HandTraining

CONFIG = preset("tiny").override(
    {"model.backbone": "test_resnet", "model.pretrained": False, "model.image_size": 64}
)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 0, 2, seed=4, workers=1, progress=False)
    (folder / "evaluation" / "rgb" / "00000001.jpg").write_bytes(b"no image")
    images = FolderImages(FreiHand(folder, "evaluation"))
    return Batches(images, CropTransform(64, share=0.8), instead=images.black)[0, [0, 1]]


class Watched(TorchDispatchMode):
    """Keeps the names of the operators, and of those whose result is float64."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.names.add(func.name())
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.doubles.add(func.name())
        return result


def test_a_step_waits_for_no_number_and_needs_no_float64(batch):
    module = HandTraining(CONFIG).eval()
    with torch.no_grad(), Watched() as watched:
        module.validation_step(batch, 0)
    # What `.item()`, `bool()` and `.tolist()` of a tensor call.
    assert "aten::convolution" in watched.names and "aten::_local_scalar_dense" not in watched.names
    assert not watched.doubles


def test_the_mean_hand_stands_for_an_unreadable_image(batch):
    module = HandTraining(CONFIG).eval()
    module.network.mean_hand += 0.01
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module.validation_step(batch, 0)
    ((names, (joints, true_joints, vertices, _)),) = module._evaluated
    mean = module.network.mean_hand
    assert batch["replaced"] == [False, True] and len(names) == len(true_joints) == 2
    assert torch.equal(vertices[1], mean) and not torch.equal(vertices[0], mean)
    torch.testing.assert_close(joints[1], module.network.joint_regressor @ mean, atol=1e-7, rtol=0)
