import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pahm.data import annotations
from pahm.data.annotations import Table, iterate_array, parse_table
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand, read_image

POSES, BACKGROUNDS = 3, 2
AHEAD = np.array([0, 0, 0.6])


def write_split(root, split, rng, labels=True, masks=True, images=POSES * BACKGROUNDS):
    for kind, count in (("rgb", images), ("mask", POSES if masks else 0)):
        if count:
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            colour = (40 * index, 100, 50) if kind == "rgb" else 80 * index
            image = Image.new("RGB" if kind == "rgb" else "L", (32, 32), colour)
            image.save(root / split / kind / f"{index:08d}.jpg", quality=95)
    tables = {
        "K": np.tile([[50.0, 0, 15.5], [0, 50.0, 15.5], [0, 0, 1]], (POSES, 1, 1)),
        "scale": rng.uniform(0.02, 0.04, POSES),
    }
    if labels:
        tables["xyz"] = rng.normal(0, 0.05, (POSES, 21, 3)) + AHEAD
        tables["verts"] = rng.normal(0, 0.05, (POSES, 778, 3)) + AHEAD
    for name, values in tables.items():
        (root / f"{split}_{name}.json").write_text(json.dumps(values.round(7).tolist()))
    return tables


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    return (
        tmp_path,
        write_split(tmp_path, "training", rng),
        write_split(tmp_path, "evaluation", rng, images=3),
    )


def test_items_follow_the_annotations_of_their_pose(folder):
    root, tables, _ = folder
    dataset = FreiHand(root)
    assert len(dataset) == POSES * BACKGROUNDS
    for index in range(len(dataset)):
        item, row = dataset[index], index % POSES
        assert item["index"] == index and item["name"] == f"training/rgb/{index:08d}.jpg"
        assert abs(item["image"].getpixel((16, 16))[0] - 40 * index) < 6
        assert abs(item["mask"].getpixel((16, 16)) - 80 * row) < 6
        for key, name in (("K", "K"), ("joints", "xyz"), ("vertices", "verts"), ("scale", "scale")):
            assert item[key].dtype == np.float32
            np.testing.assert_allclose(item[key], tables[name][row], atol=1e-7)
    assert dataset[-1]["index"] == len(dataset) - 1
    with pytest.raises(IndexError, match="index: 6 is out of range for 6 images"):
        dataset[6]


def test_evaluation_without_labels_and_masks(tmp_path):
    tables = write_split(
        tmp_path, "evaluation", np.random.default_rng(1), labels=False, masks=False, images=POSES
    )
    dataset = FreiHand(tmp_path, "evaluation")
    assert not dataset.annotated
    assert set(dataset[1]) == {"image", "K", "scale", "index", "name"}
    assert dataset[1]["scale"] == pytest.approx(tables["scale"][1], abs=1e-7)


def test_evaluation_labels_are_used_when_there(folder):
    root, _, tables = folder
    dataset = FreiHand(root, "evaluation")
    item = dataset[2]
    assert dataset.annotated
    np.testing.assert_allclose(item["vertices"], tables["verts"][2], atol=1e-7)
    assert "mask" in item


def test_parsed_once_then_read_from_the_cache(folder, monkeypatch):
    root, tables, _ = folder
    FreiHand(root)
    monkeypatch.setattr(annotations, "parse_table", None)
    dataset = FreiHand(root)
    np.testing.assert_allclose(dataset[0]["vertices"], tables["verts"][0], atol=1e-7)


def test_a_changed_file_replaces_its_cache(folder):
    root, tables, _ = folder
    FreiHand(root)
    path = root / "training_xyz.json"
    before = path.stat()
    path.write_text(json.dumps((tables["xyz"] + 1).round(7).tolist()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a copy may keep the time
    np.testing.assert_allclose(FreiHand(root)[0]["joints"], tables["xyz"][0] + 1, atol=1e-6)
    assert len(list(root.glob("training_xyz.*.npy"))) == 1


def test_a_damaged_cache_is_made_anew(folder):
    root, tables, _ = folder
    FreiHand(root)
    (cache,) = root.glob("training_xyz.*.npy")
    content = cache.read_bytes()
    flipped = bytearray(content)
    flipped[-200] ^= 1
    for damaged in (b"", b"nonsense", content[:-5], content + b"x", content[:-32], bytes(flipped)):
        cache.write_bytes(damaged)
        np.testing.assert_allclose(FreiHand(root)[0]["joints"], tables["xyz"][0], atol=1e-7)
        assert cache.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder, monkeypatch):
    root, tables, _ = folder

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(annotations.np, "save", refuse)
    dataset = FreiHand(root)
    assert not list(root.glob("*.npy")) and not list(root.glob("*.partial"))
    np.testing.assert_allclose(dataset[4]["joints"], tables["xyz"][1], atol=1e-7)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(dataset))[4]["joints"], tables["xyz"][1], atol=1e-7)


def test_pickling_sends_no_annotations(folder):
    root, tables, _ = folder
    dataset = FreiHand(root)
    assert dataset[0]["vertices"].shape == (778, 3)
    data = pickle.dumps(dataset)
    assert len(data) < 5000
    np.testing.assert_allclose(pickle.loads(data)[1]["joints"], tables["xyz"][1], atol=1e-7)


def test_batches_through_workers(folder):
    root, tables, _ = folder
    loader = DataLoader(FreiHand(root, transform=CropTransform(24)), batch_size=6, num_workers=1)
    (batch,) = list(loader)
    assert batch["image"].shape == (6, 3, 24, 24) and batch["mask"].shape == (6, 1, 24, 24)
    assert batch["index"].tolist() == list(range(6))
    expected = torch.from_numpy(np.tile(tables["xyz"], (2, 1, 1))).float()
    torch.testing.assert_close(batch["joints"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "missing",
    ["training/rgb", "training_K.json", "training_xyz.json", "training_verts.json"],
)
def test_a_missing_part_is_named(folder, missing):
    root, _, _ = folder
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"not in FreiHAND's layout, {missing} is missing"):
        FreiHand(root)


def test_a_missing_folder_and_a_gap_are_named(folder):
    root, _, _ = folder
    with pytest.raises(FileNotFoundError, match=r"root: .*nowhere is not a folder"):
        FreiHand(root / "nowhere")
    (root / "training/rgb/00000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000003.jpg is missing"):
        FreiHand(root)


def test_counts_that_do_not_fit_are_listed(folder):
    root, tables, _ = folder
    (root / "training_xyz.json").write_text(json.dumps(tables["xyz"][:2].tolist()))
    with pytest.raises(ValueError, match=r"training_K.json has 3, .*training_xyz.json has 2"):
        FreiHand(root)


def test_images_that_do_not_fit_the_annotations(folder):
    root, _, _ = folder
    (root / "training/rgb/00000005.jpg").unlink()
    with pytest.raises(ValueError, match="training/rgb has 5 images for the 3 records"):
        FreiHand(root)
    for name in ("00000004", "00000003"):
        (root / f"training/rgb/{name}.jpg").unlink()
    (root / "training/mask/00000002.jpg").unlink()
    with pytest.raises(ValueError, match="training/mask has 2 masks for the 3 records"):
        FreiHand(root)


def test_a_folder_that_has_only_the_evaluation_archive(tmp_path):
    """As released: no training split, no masks, and files that are not read."""
    tables = write_split(tmp_path, "evaluation", np.random.default_rng(2), masks=False, images=POSES)
    for folder in ("anno", "segmap"):
        (tmp_path / "evaluation" / folder).mkdir()
    (tmp_path / "evaluation_mano.json").write_text("nonsense")
    dataset = FreiHand(tmp_path, "evaluation")
    assert dataset.annotated and not dataset.has_masks and len(dataset) == POSES
    np.testing.assert_allclose(dataset[1]["joints"], tables["xyz"][1], atol=1e-7)


def test_a_record_needs_no_image(folder):
    root, tables, _ = folder
    dataset = FreiHand(root)
    (root / "training/rgb/00000004.jpg").write_text("not an image")
    record = dataset.record(4)
    assert set(record) == {"K", "scale", "joints", "vertices", "index", "name"}
    assert (record["index"], record["name"]) == (4, "training/rgb/00000004.jpg")
    np.testing.assert_allclose(record["joints"], tables["xyz"][1], atol=1e-7)
    with pytest.raises(IndexError, match="index: -7 is out of range for 6 images"):
        dataset.record(-7)


def test_a_camera_without_focal_length_is_named(folder):
    root, tables, _ = folder
    tables["K"][1, 1, 1] = 0
    (root / "training_K.json").write_text(json.dumps(tables["K"].tolist()))
    with pytest.raises(ValueError, match=r"training_K.json: record 1 has focal lengths 50 and 0, expected"):
        FreiHand(root)


@pytest.mark.parametrize("name", ["training_xyz.json", "evaluation_xyz.json"])
def test_a_folder_in_place_of_a_file_is_named(folder, name):
    root, _, _ = folder
    (root / name).unlink()
    (root / name).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        FreiHand(root, name.split("_")[0])


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="split: expected one of training, evaluation, got 'test'"):
        FreiHand(tmp_path, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1, 2, 3], [4, 5", "ends inside element 1"),
        ("[[1, 2, 3], [4, 5, 6]", "found the end of the file"),
        ("[[1, 2, 3] [4, 5, 6]]", "expected ',' or ']' after element 0, found"),
        ("[[1, 2, 3], nonsense]", "element 1"),
        ('{"K": 1}', "is not a JSON array"),
        ("", "is not a JSON array: it is empty"),
        (" null ", "is not a JSON array: it starts with 'null '"),
        ("[[1, 2, 3]] [[4, 5, 6]]", r"expected nothing after the array's end, found '\['"),
        ("[] x", "expected nothing after the array's end, found 'x'"),
        ("[" * 100_000, "element 0 is nested too deeply"),
        ("[[1, 2, 1" + "0" * 400 + "]]", "record 0 is not an array of numbers"),
        ("[[1, 2, 1e300]]", "record 0 has a value that is not finite"),
        ("[[1, 2, 3], [4, 5]]", r"record 1 has shape \(2,\), expected \(3,\)"),
        ('[[1, 2, "x"]]', "record 0 is not an array of numbers"),
        ("[[1, 2, NaN]]", "record 0 has a value that is not finite"),
    ],
)
def test_broken_annotations_name_file_and_record(tmp_path, text, message):
    path = tmp_path / "training_test.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        Table(path, (3,))
    assert "training_test.json" in str(raised.value)


def test_annotations_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "training_test.json"
    path.write_bytes(b"[[1, 2, 3], " + bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"training_test.json is not a text file"):
        Table(path, (3,))


def test_a_table_in_double_precision(tmp_path):
    path = tmp_path / "values.json"
    path.write_text("[[0.1, 1e300], [0.2, 3]]")
    rows = parse_table(path, (2,), np.float64)
    assert rows.dtype == np.float64 and rows.tolist() == [[0.1, 1e300], [0.2, 3]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_arrays_are_the_same_for_any_chunk(tmp_path, monkeypatch, chunk):
    values = [1.25, -3e-5, [1, [2.5, 3]], [], 12345.678, 0]
    path = tmp_path / "values.json"
    path.write_text("  " + json.dumps(values, indent=1) + "\n")
    read = path.open

    class Slow:
        def __init__(self):
            self.stream = read(encoding="utf-8")

        def read(self, _):
            return self.stream.read(chunk)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

    monkeypatch.setattr(type(path), "open", lambda *_, **__: Slow())
    assert list(iterate_array(path)) == values


def test_empty_array(tmp_path):
    path = tmp_path / "none.json"
    path.write_text(" [ ] ")
    assert Table(path, (21, 3)).rows.shape == (0, 21, 3)


def test_an_image_that_is_not_one_is_named(folder):
    root, _, _ = folder
    path = root / "training/rgb/00000001.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00000001.jpg is not a readable image"):
        FreiHand(root)[1]
    path.write_text("not an image")
    with pytest.raises(ValueError, match=r"00000001.jpg is not a readable image"):
        FreiHand(root)[1]
    with pytest.raises(FileNotFoundError, match=r"none.jpg does not exist"):
        read_image(root / "none.jpg")
