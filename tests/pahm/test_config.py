"""The configuration: presets, overrides, the way to JSON and back."""

import json
from dataclasses import replace
from importlib import resources

import pytest

from pahm.ablation.tables import configuration
from pahm.config import PRESETS, Config, from_dict, from_file, from_json, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_keeps_every_value(name):
    config = preset(name)
    assert from_json(config.to_json()) == config


def test_paper_presets_have_the_papers_training():
    for name, backbone in [("resnet18", "resnet18"), ("resnet50", "resnet50"), ("hrnet_w64", "hrnet_w64")]:
        config = preset(name)
        train, loss = config.train, config.loss
        assert (config.model.backbone, config.model.image_size) == (backbone, 224)
        assert train.precision == "bf16-mixed"
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


@pytest.mark.parametrize(
    ("name", "variant"), [("table4_gcn", "gcn-stacked"), ("table4_metro", "metro-aligned")]
)
def test_presets_of_table_4_are_its_rows(name, variant):
    row = configuration(preset("hrnet_w64"), variant)
    assert replace(preset(name), name=variant) == row and row.train.precision == "bf16-mixed"


def test_override_changes_a_copy():
    changed = Config().override(
        {
            "train.epochs": 3,
            "train.learning_rate": 1,
            "model.backbone": "resnet50",
            "model.pretrained": True,
            "model.backbone_weights": None,
            "loss.mesh": [1, 2, 3, 4],
        }
    )
    assert changed.train.epochs == 3 and type(changed.train.learning_rate) is float
    assert changed.model.backbone == "resnet50" and changed.model.pretrained is True
    assert changed.model.backbone_weights is None
    assert changed.loss.mesh == (1.0, 2.0, 3.0, 4.0)
    assert Config().train.epochs == 50, "override returns a copy"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train.epoch": 3}, r"no value named 'train\.epoch'.*train\.epochs"),
        ({"epoch": 3}, r"no value named 'epoch'; did you mean train\.epochs\?"),
        (
            {"model.weight_decay": 3},
            r"no value named 'model\.weight_decay'; did you mean train\.weight_decay\?",
        ),
        ({"train": 3}, r"no value named 'train'; pahm/config\.py lists them all"),
        ({"train.epochs.x": 3}, r"no value named 'train\.epochs\.x'"),
        ({"train.epochs": "3"}, r"train\.epochs: expected int, got '3'"),
        ({"train.decay": "much"}, r"train\.decay: expected float, got 'much'"),
        ({"train.epochs": 2.5}, r"train\.epochs: expected int, got 2\.5"),
        ({"train.schedule": "linear"}, r"train\.schedule: expected one of 'step', 'cosine', got 'linear'"),
        ({"loss.mesh": [1, 2]}, r"loss\.mesh: expected 4 values of type float, got \[1, 2\]"),
    ],
)
def test_wrong_overrides_are_named(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config().override(values)


def test_unknown_names_and_presets_are_refused():
    with pytest.raises(ValueError, match=r"no value named 'model\.depth'"):
        from_dict({"model": {"depth": 3}})
    with pytest.raises(
        ValueError,
        match="one of hrnet_w64, resnet18, resnet50, table4_gcn, table4_metro, tiny, got 'resnet101'",
    ):
        preset("resnet101")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        from_json("[]")


def test_a_preset_is_a_file_and_a_copy_of_it_is_the_same_configuration(tmp_path):
    for name in PRESETS:
        text = (resources.files("pahm") / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(text)
        assert from_file(tmp_path / f"{name}.yaml") == preset(name)
        assert preset(name).model.backbone in text and preset(name).name == name
    tiny = preset("tiny")
    assert (
        tiny.model.image_size,
        tiny.model.crop,
        tiny.model.attention_heads,
        tiny.train.schedule,
        tiny.loss.heatmap_sigma,
    ) == (96, 0.8, (4, 4, 0, 0), "cosine", 9.3)


def test_a_file_gives_what_it_says_and_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# a comment\ntrain: {learning_rate: 1e-4, milestones: [3, 5]}\nmodel: {backbone: resnet50}\n"
    )
    expected = {"name": "mine", "train.learning_rate": 1e-4, "train.milestones": [3, 5]}
    assert from_file(path) == Config().override({**expected, "model.backbone": "resnet50"})
    # What a run leaves in its folder is such a file.
    other = preset("tiny").override({"train.epochs": 2})
    (tmp_path / "config.json").write_text(json.dumps(json.loads(other.to_json()), indent=2))
    assert from_file(tmp_path / "config.json") == other


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  epochs: many\n", r"train\.epochs: expected int, got 'many'"),
        ("train: {epoch: 3}", r"no value named 'train\.epoch'; did you mean train\.epochs\?"),
        ("train: 3", r"train: expected an object, got 3"),
        ("train: [1", r"while parsing a flow sequence"),
        ("- 1", r"expected values by name, got \[1\]"),
        ("train:\n  epochs: 3\n  epochs: 4\n", r"epochs is given twice"),
        ("model: {image_size: 100}", r"model\.image_size: expected a multiple of 32, got 100"),
        ("model: {crop: 0.0}", r"model\.crop: expected a fraction above 0, at most 10, got 0"),
        ("model: {transformer_heads: 0}", r"model\.transformer_heads: expected a number from 1 to 64, got 0"),
        ("train: {batch_size: 0}", r"train\.batch_size: expected a number from 1 to 1000000, got 0"),
        ("model: {image_size: 4096}", r"model\.image_size: expected a number from 32 to 1024, got 4096"),
        ("model: {feature_channels: [64, -1, 64, 64]}", r"feature_channels: expected .* from 1 .*, got -1"),
        ("model: {decoder_channels: [64, 0, 64, 64]}", r"decoder_channels: expected .* from 1 .*, got 0"),
        ("train: {learning_rate: .nan}", r"train\.learning_rate: expected a number from 0 to 1000, got nan"),
        (
            "train: {learning_rate: -0.1}",
            r"train\.learning_rate: expected a number .*, got -0\.1",
        ),
        ("loss: {pose: .inf}", r"loss\.pose: expected a number from 0 to 1000000, got inf"),
        ("train: {learning_rate: " + "9" * 400 + "}", r"train\.learning_rate: expected float, got 999"),
        ("train: {seed: 4294967296}", r"train\.seed: expected a number from 0 to 4294967295"),
        ("train: {epochs: " + "9" * 5000 + "}", r"Exceeds the limit"),
        ("train: &a {epochs: 3}\nmodel: *a\n", r"aliases such as \*a are not supported"),
        ("[" * 3000 + "]" * 3000, r"nested too deeply"),
        ("augment: {scale: 2}", r"scale: expected a finite number >= 0 and below 1, got 2"),
        ("a: !!python/object/apply:os.getcwd []", r"could not determine a constructor"),
    ],
)
def test_wrong_files_are_named_with_the_value(tmp_path, text, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{sentence}") as caught:
        from_file(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        from_file(tmp_path / "none.yaml")
