"""The configuration of a training run that takes seconds."""

from pahm.config import preset

CONFIG = preset("tiny").override(
    {
        "model.backbone": "test_resnet",
        "model.pretrained": False,
        "model.image_size": 64,
        "train.epochs": 2,
        "train.batch_size": 4,
        "train.workers": 0,
    }
)
