"""The configuration: presets, overrides, the way to JSON and back."""

import pytest

from pahm.config import PRESETS, Config, from_dict, from_json, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_keeps_every_value(name):
    config = preset(name)
    assert from_json(config.to_json()) == config


def test_paper_presets_have_the_papers_training():
    for name, backbone in [("resnet18", "resnet18"), ("resnet50", "resnet50"), ("hrnet_w64", "hrnet_w64")]:
        config = preset(name)
        train, loss = config.train, config.loss
        assert (config.model.backbone, config.model.image_size) == (backbone, 224)
        assert (train.optimizer, train.learning_rate, train.batch_size, train.epochs) == (
            "adam",
            1e-4,
            64,
            50,
        )
        assert (train.schedule, train.milestones, train.decay) == ("step", (35,), 0.1)
        assert (loss.normal, loss.pose, loss.silhouette) == (0.1, 10.0, 2.5)
        augment = config.augment
        assert (
            augment.rotation > 0 and augment.translation > 0 and augment.scale > 0 and augment.brightness > 0
        )


def test_override_reads_text_by_the_fields_type():
    changed = Config().override(
        {
            "train.epochs": "3",
            "train.learning_rate": "1",
            "model.backbone": "resnet50",
            "model.pretrained": "true",
            "model.backbone_weights": "none",
            "loss.mesh": "[1, 2, 3, 4]",
        }
    )
    assert changed.train.epochs == 3 and changed.train.learning_rate == 1.0
    assert changed.model.backbone == "resnet50" and changed.model.pretrained is True
    assert changed.model.backbone_weights is None
    assert changed.loss.mesh == (1.0, 2.0, 3.0, 4.0)
    assert Config().train.epochs == 50, "override returns a copy"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train.epoch": 3}, r"no value named 'train\.epoch'.*train\.epochs"),
        ({"train": 3}, r"no value named 'train'"),
        ({"train.epochs.x": 3}, r"no value named 'train\.epochs\.x'"),
        ({"train.epochs": "many"}, r"train\.epochs: expected int, got 'many'"),
        ({"train.epochs": 2.5}, r"train\.epochs: expected int, got 2\.5"),
        ({"train.schedule": "linear"}, r"train\.schedule: expected one of 'step', 'cosine', got 'linear'"),
        ({"loss.mesh": [1, 2]}, r"loss\.mesh: expected 4 values of type float, got \[1, 2\]"),
    ],
)
def test_wrong_overrides_are_named(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config().override(values)


def test_unknown_names_and_presets_are_refused():
    with pytest.raises(ValueError, match=r"no value named model\.depth"):
        from_dict({"model": {"depth": 3}})
    with pytest.raises(ValueError, match="expected one of tiny, resnet18"):
        preset("resnet101")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        from_json("[]")
