"""Tar shards: the folder's images, read where they lie; whole shards, cut ones, stopped writers."""

import errno
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pahm.cli import main
from pahm.config import AugmentConfig, preset
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.data.loading import Batches, FolderImages, TrainingKeys, loader
from pahm.data.shards import ShardImages, find_shards, write_shards
from pahm.model import read_metadata
from pahm.synth.generate import generate
from pahm.train.trainer import HandTraining, train

wds = pytest.importorskip("webdataset")
_BLOCK = 512


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 11, 3, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture
def shards(data, tmp_path):
    folder = tmp_path / "shards"
    assert write_shards(data, folder, 4) == 3
    return folder


def test_webdataset_reads_what_was_written(data, shards):
    dataset = FreiHand(data, "training")
    paths = [str(path) for path in find_shards(shards)]
    assert [Path(path).name for path in paths] == [f"train-00000{i}.tar" for i in range(3)]
    found = list(wds.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert sorted(sample["__key__"] for sample in found) == [f"{i:08d}" for i in range(11)]
    for sample in found:
        truth = dataset[sample["json"]["index"]]
        assert sample["json"]["name"] == truth["name"]
        assert np.array_equal(sample["jpg"], truth["image"])
        assert np.array_equal(sample["mask.jpg"].convert("L"), truth["mask"])
        for key in ("joints", "vertices"):
            assert np.array_equal(sample[f"{key}.npy"], truth[key])
        assert np.array_equal(np.float32(sample["json"]["K"]), truth["K"])


def test_what_webdataset_writes_is_read(shards, tmp_path):
    with wds.TarWriter(str(tmp_path / "copy.tar")) as writer:
        for sample in wds.WebDataset([str(path) for path in find_shards(shards)], shardshuffle=False):
            writer.write(
                {key: value for key, value in sample.items() if key in ("__key__", "jpg") or "." in key}
                | {"json": sample["json"]}
            )
    images = ShardImages([tmp_path / "copy.tar"], 4)
    assert sorted(images[i]["index"] for i in range(len(images))) == list(range(11))


def test_shards_give_the_folders_samples(data, shards):
    folder = FreiHand(data, "training")
    images = ShardImages(find_shards(shards), 5)
    assert len(images) == 11
    transform = CropTransform(32, AugmentConfig(), seed=2)
    for i in range(11):
        index = images[i]["index"]
        one = Batches(images, transform)[7, [i]]
        two = Batches(FolderImages(folder), transform)[7, [index]]
        assert one["name"][0].endswith(f".tar/{two['name'][0]}")
        assert one.keys() == two.keys()
        assert all(torch.equal(v, two[k]) for k, v in one.items() if isinstance(v, torch.Tensor))
    assert sorted(map(tuple, images.vertices(99)[:, 0])) == sorted(
        map(tuple, folder.tables["vertices"].rows[:, 0])
    )
    assert images.vertices(3).shape == (3, 778, 3)


def test_an_epochs_order_shuffles_shards_and_a_buffer(tmp_path):
    images = ShardImages.__new__(ShardImages)
    images.paths = [tmp_path] * 50
    images._places = np.stack([np.repeat(np.arange(50), 20), *np.zeros((2, 1000), int)], axis=1)
    images.buffer = 100
    order = images.order(0, 0)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, images.order(0, 0))
    for other in (images.order(0, 1), images.order(1, 0)):
        assert (other != order).mean() > 0.9
    # A read is near the ones before it: of the shards in use at a time there are a few, not all.
    spread = [len(set(order[at : at + 20] // 20)) for at in range(0, 1000, 20)]
    assert 5 < np.mean(spread) < 16
    assert len(set(order[:200] // 20)) < 20
    images.buffer = 1  # the shards one after the other, each epoch in another order
    visits = [images.order(0, epoch)[::20] // 20 for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(visit), np.arange(50)) for visit in visits)
    assert (visits[0] != np.arange(50)).mean() > 0.8 and (visits[0] != visits[1]).mean() > 0.8
    images.buffer = 5000
    assert np.array_equal(np.sort(images.order(0, 0)), np.arange(1000))


def test_workers_and_processes_share_an_epoch(shards):
    images = ShardImages(find_shards(shards), 5)
    transform = CropTransform(32, AugmentConfig())

    def names(workers, processes=1, rank=0, start=(1, 0)):
        keys = TrainingKeys(images, 0, 4, processes, lambda: rank, start)
        return [batch["name"] for batch in loader(Batches(images, transform), keys, workers, pin=False)]

    whole = names(0)
    assert len(whole) == 2 and len({name for batch in whole for name in batch}) == 8
    assert names(2) == whole and names(0, start=(1, 1)) == whole[1:]
    halves = [names(1, 2, rank) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@pytest.mark.parametrize("cut", [5000, 20000, "between", "end"])
def test_a_cut_shard_is_named_and_the_rest_is_used(shards, caplog, cut):
    path = shards / "train-000001.tar"
    content = path.read_bytes()
    whole = ShardImages([path], 1)._places
    # Inside the first image; inside another; exactly between two images; the last zeros of the file.
    length = {"between": int(whole[1, 2]), "end": int(whole[3, 2])}.get(cut, cut)
    path.write_bytes(content[:length])
    images = ShardImages(find_shards(shards), 5)
    kept = int((whole[:, 2] <= length).sum())
    assert len(images) == 7 + kept
    [line] = [record.message for record in caplog.records if record.name == "pahm"]
    assert line == f"data: {path} ends early or is damaged: {kept} whole images are used"
    assert len({images[i]["index"] for i in range(len(images))}) == len(images)
    with pytest.raises(ValueError, match=r"train-000001\.tar ends early"):
        ShardImages(find_shards(shards), 5, strict=True)


@pytest.mark.parametrize("length", [1, _BLOCK, None])  # all the rest is zero, as after a lost write
def test_a_damaged_header_in_the_middle_is_a_shards_damage(shards, caplog, length):
    path = shards / "train-000001.tar"
    with tarfile.open(path) as tar:
        header = tar.getmembers()[7].offset  # inside the second of four images
    content = bytearray(path.read_bytes())
    end = len(content) if length is None else header + length
    content[header:end] = bytes(end - header)
    path.write_bytes(content)
    assert len(ShardImages(find_shards(shards), 5)) == 4 + 1 + 3
    assert f"data: {path} ends early or is damaged: 1 whole images are used" in caplog.messages
    with pytest.raises(ValueError, match=r"train-000001\.tar ends early or is damaged"):
        ShardImages(find_shards(shards), 5, strict=True)


def test_whole_shards_of_every_length_are_whole(shards, tmp_path):
    with tarfile.open(find_shards(shards)[0]) as tar:
        sample = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()[:5]]
    for blocks in range(1, 21):  # a tar file is filled up to 20 blocks
        with tarfile.open(tmp_path / "one.tar", "w") as tar:
            for name, content in [*sample, ("x.bin", bytes(blocks * _BLOCK))]:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        assert len(ShardImages([tmp_path / "one.tar"], 1, strict=True)) == 1


def test_what_is_not_a_tar_file_is_named(tmp_path, caplog):
    (tmp_path / "train-000000.tar").write_bytes(b"no tar file " * 100)
    with pytest.raises(ValueError, match=r"no whole image in 1 shards, the first is .*train-000000\.tar"):
        ShardImages(find_shards(tmp_path), 5)
    assert "train-000000.tar ends early or is damaged: 0 whole images" in caplog.text


@pytest.mark.parametrize("members", [0, 2])
def test_a_shard_that_changes_during_training_costs_its_images_only(shards, members):
    images = ShardImages(find_shards(shards), 5)
    with tarfile.open(shards / "train-000002.tar") as tar:
        length = tar.getmembers()[members].offset + 100 * (members == 0)
    os.truncate(shards / "train-000002.tar", length)
    batch = Batches(images, CropTransform(32))[0, list(range(11))]
    assert len(batch["name"]) == 11 and not any("train-000002" in name for name in batch["name"])
    assert all("train-000002.tar cannot be read: the shard has changed" in s for s in batch["unreadable"])


def _npy(array):
    np.save(stream := io.BytesIO(), array)
    return stream.getvalue()


_VALUES = {"index": 3, "name": "training/rgb/00000003.jpg", "K": np.eye(3).tolist(), "scale": 0.03}
_JOINTS = _npy(np.zeros((21, 3), np.float32))


def without_checksum(name: str, content: bytes) -> bytes:
    """A shard's file as other programs write it."""
    if not name.endswith(".json"):
        return content
    return json.dumps({key: value for key, value in json.loads(content).items() if key != "crc32"}).encode()


def test_damage_that_still_reads_is_noticed(shards, caplog):
    path, *_ = find_shards(shards)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()[:5]
    for member in members:
        content = bytearray(whole)
        content[member.offset_data + member.size // 2] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"content is not what was written|json "):
            ShardImages([path], 1)[0]
        assert len(ShardImages([path], 1).vertices(9)) == 3
    for length in (len(whole), 2048):  # what a disk leaves of a file that it had not written yet
        path.write_bytes(bytes(length))
        caplog.clear()
        ShardImages(find_shards(shards), 1)
        assert f"data: {path} ends early or is damaged: 0 whole images are used" in caplog.messages


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        ("json", b"\0", "json is not JSON that can be read: Expecting value"),
        ("json", b"[" * 99999, "json is not JSON .* nested too deeply"),
        ("json", b'{"index": 3, "name": "", "scale": 1}', "json does not give .*'K'"),
        ("json", json.dumps(_VALUES | {"index": -3}).encode(), "json: expected an index of at least 0"),
        ("json", json.dumps(_VALUES | {"K": [1, 2]}).encode(), r"json: expected .* finite K \(3, 3\)"),
        (
            "json",
            json.dumps(_VALUES | {"scale": np.nan}).encode(),
            "json is not JSON .*: NaN is not",
        ),
        ("joints.npy", b"", "joints.npy is not an array .EOF: reading magic string"),
        ("joints.npy", b"\0" + _JOINTS[1:], "joints.npy is not an array .the magic string is not correct"),
        ("joints.npy", _JOINTS[:8] + b"\x36" + _JOINTS[9:], "joints.npy is not an array .*multi-line"),
        ("joints.npy", _npy(np.zeros((20, 3))), r"joints.npy: expected .*\(21, 3\), got float64 \(20, 3\)"),
        ("vertices.npy", _npy(np.full((778, 3), np.nan)), "vertices.npy: expected finite floats"),
        ("mask.jpg", b"", "mask.jpg is not a readable image"),
    ],
)
def test_damage_inside_an_image_is_named_and_the_image_replaced(shards, part, content, reason):
    path = shards / "train-000001.tar"
    with tarfile.open(path) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    damaged = f"{files[5][0].split('.')[0]}.{part}"
    with tarfile.open(path, "w") as tar:
        for name, whole in files:
            used = content if name == damaged else without_checksum(name, whole)
            entry = tarfile.TarInfo(name)
            entry.size = len(used)
            tar.addfile(entry, io.BytesIO(used))
    images = ShardImages(find_shards(shards), 5, strict=True)
    sentence = rf"^image: {damaged[:8]} of {path} cannot be read: {reason}"
    with pytest.raises(ValueError, match=sentence):
        images[5]
    batch = Batches(images, CropTransform(32))[0, list(range(11))]
    assert len(batch["unreadable"]) == 1 and batch["index"][5] == batch["index"][6]
    assert len(images.vertices(99)) == 11 - (part in ("json", "vertices.npy"))


@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_shard_that_cannot_be_read_costs_its_images_only(shards, monkeypatch, call):
    images = ShardImages(find_shards(shards), 5)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            ValueError, match=r"^image: \d{8} of .*train-000001\.tar cannot .* \(Input/output"
        ):
            images[5]
        with pytest.raises(ValueError, match="data: the first 20 images cannot be read"):
            images.vertices(20)
    assert images[5]["name"].startswith("train-000001.tar/")


def test_a_stopped_writer_goes_on(data, shards):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in find_shards(shards)}
    (shards / "train-000001.tar").rename(shards / "train-000001.tar.partial")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards, train-000001\.tar is missing; run `pahm"):
        find_shards(shards)
    assert write_shards(data, shards, 4) == 3
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in find_shards(shards)}
    assert {name: content for name, (content, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert after["train-000000.tar"] == before["train-000000.tar"], "written once"
    assert not list(shards.glob("*.partial"))
    with pytest.raises(ValueError, match=r"was begun with .*'size': 4.*'size': 5.*another folder"):
        write_shards(data, shards, 5)
    with pytest.raises(ValueError, match="size: expected at least 1 image a shard, got 0"):
        write_shards(data, shards, 0)


def test_a_writer_does_not_go_on_with_other_annotations(data, shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    assert write_shards(other, shards, 4) == 3, "the same data in another place"
    scales = json.loads((other / "training_scale.json").read_text())
    (other / "training_scale.json").write_text(json.dumps([2 * scales[0], *scales[1:]]))
    with pytest.raises(ValueError, match=r"was begun with .*'sha256': .*'sha256': .*another folder"):
        write_shards(other, shards, 4)
    begun = json.loads((shards / "shards.json").read_text())
    del begun["sha256"]
    (shards / "shards.json").write_text(json.dumps(begun))
    assert len(find_shards(shards)) == 3
    with pytest.raises(
        ValueError, match=r"shards\.json lacks the annotations' sha256; choose another folder"
    ):
        write_shards(data, shards, 4)


def test_a_folder_without_all_its_shards_is_refused(shards):
    for number in (1, 0, 2):
        (shards / f"train-00000{number}.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"0 of 3 shards, train-000000\.tar is missing; run `pahm"):
        find_shards(shards)
    for content in (
        "",
        "[]",
        '{"images": 1000000000000, "size": 1}',
        '{"images": 11}',
        '{"images": 11, "size": 0}',
        '{"images": "11", "size": 4}',
    ):
        (shards / "shards.json").write_text(content)
        with pytest.raises(ValueError, match=r"shards\.json is not a manifest of `pahm shards`, which has"):
            find_shards(shards)


def test_ranges_of_shards(shards):
    pattern = shards / "train-{000000..000002}.tar"
    assert find_shards(pattern) == find_shards(shards)
    assert find_shards(shards / "train-000001.tar") == [shards / "train-000001.tar"]
    with pytest.raises(FileNotFoundError, match=r"train-000003\.tar does not exist"):
        find_shards(shards / "train-{000001..000003}.tar")


def test_training_on_shards_by_the_command_line(data, tmp_path, capsys, monkeypatch):
    seen = []

    def step(self, batch, index, step=HandTraining.training_step):
        seen.extend(batch["name"])
        return step(self, batch, index)

    monkeypatch.setattr(HandTraining, "training_step", step)
    out = tmp_path / "shards"
    assert main(["shards", "--data", str(data), "--out", str(out), "--size", "6"]) == 0
    assert "2 shards are ready" in capsys.readouterr().out
    second = tmp_path / "another disk"
    second.mkdir()
    (out / "train-000001.tar").rename(second / "train-000001.tar")
    changes = ["--model.backbone=test_resnet", "--model.pretrained=False", "--model.image-size=64"]
    changes += ["--train.batch-size=4", "--train.epochs=1", "--train.workers=0"]
    command = ["train", "--eval-data", str(data), "--out", str(tmp_path / "run"), "--preset", "tiny"]
    command += ["--accelerator", "cpu", *changes]
    places = [f"{out}/train-{{000000..000000}}.tar", str(second)]
    assert main([*command, "--data", *places]) == 0
    assert len(set(seen)) == 8 and all(name.startswith("train-00000") for name in seen)
    assert read_metadata(tmp_path / "run" / "model.safetensors")[1]["images"] == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == places
    assert main([*command, "--data", *places, str(data)]) == 2
    assert f"data: {data} holds no tar shards, expected them in each of several" in capsys.readouterr().err


def test_shards_alone_train_without_scores(shards, tmp_path):
    config = preset("tiny").override(
        {
            "model.backbone": "test_resnet",
            "model.pretrained": False,
            "model.image_size": 64,
            "train.epochs": 1,
            "train.batch_size": 4,
            "train.workers": 0,
        }
    )
    assert train(config, shards, tmp_path / "run", accelerator="cpu", progress=False) == {}
