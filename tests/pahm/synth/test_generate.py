from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pahm.data.freihand import FreiHand
from pahm.synth import folder as synth_folder
from pahm.synth import generate as synth
from pahm.synth.generate import generate
from pahm.synth.picture import draw
from pahm.synth.sampling import sample_annotation

SIZE, TRAIN, EVAL, SEED = 64, 40, 6, 5
OPTIONS = {"train": TRAIN, "eval": EVAL, "seed": SEED, "image_size": SIZE, "workers": 1, "progress": False}


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".npy"
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth") / "set"
    generate(root, **OPTIONS)
    return root


@pytest.fixture
def made(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "set", ignore=shutil.ignore_patterns("*.npy")))


# What is written


def test_the_layout_is_freihands(original):
    names = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    expected = {
        f"{split}_{field}.json"
        for split in ("training", "evaluation")
        for field in ("K", "xyz", "verts", "scale")
    }
    expected |= {"training_mano.json", "synth.json"}
    for split, count in (("training", TRAIN), ("evaluation", EVAL)):
        expected |= {f"{split}/{kind}/{i:08d}.jpg" for i in range(count) for kind in ("rgb", "mask")}
    assert {name for name in names if not name.endswith(".npy")} == expected


def test_it_reads_back_through_the_reader_of_freihand(made):
    for split, count in (("training", TRAIN), ("evaluation", EVAL)):
        data = FreiHand(made, split)
        assert len(data) == count
        for index in (0, count - 1):
            annotation, item = sample_annotation(SEED, split, index, SIZE), data[index]
            assert np.allclose(item["vertices"], annotation.vertices, atol=1e-6)
            assert np.allclose(item["joints"], annotation.joints, atol=1e-6)
            assert np.allclose(item["K"], annotation.K, atol=1e-4)
            assert float(item["scale"]) == pytest.approx(annotation.scale, abs=1e-6)
            picture = draw(SEED, split, index, SIZE)
            difference = np.asarray(item["image"], float) - np.asarray(picture.image, float)
            assert item["image"].size == (SIZE, SIZE) and np.abs(difference).mean() < 15
            assert ((np.asarray(item["mask"]) > 127) != (np.asarray(picture.mask) > 127)).mean() < 0.01


def test_the_number_of_workers_changes_nothing(original, tmp_path):
    generate(tmp_path / "set", **{**OPTIONS, "workers": 2})
    assert contents(tmp_path / "set") == contents(original)


def test_a_larger_run_extends_a_smaller_one(original, tmp_path):
    generate(tmp_path / "set", **{**OPTIONS, "train": 20, "eval": 0})
    assert json.loads((tmp_path / "set/evaluation_xyz.json").read_text()) == []
    before = contents(tmp_path / "set")
    generate(tmp_path / "set", **OPTIONS)
    after = contents(tmp_path / "set")
    assert after == contents(original)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".jpg"))


def test_user_backgrounds_change_the_pictures_only(original, tmp_path):
    (tmp_path / "pictures/deep").mkdir(parents=True)
    Image.new("RGB", (90, 50), (0, 255, 0)).save(tmp_path / "pictures/deep/green.png")
    generate(tmp_path / "set", **{**OPTIONS, "train": 4, "eval": 2, "backgrounds": tmp_path / "pictures"})
    for index in range(4):
        pixels = np.asarray(Image.open(tmp_path / f"set/training/rgb/{index:08d}.jpg"), float)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (np.median(corners, axis=0) @ (-1, 1, -1)) > 60
    mine, other = (
        json.loads((root / "training_verts.json").read_text()) for root in (tmp_path / "set", original)
    )
    assert mine == other[:4]


# What is stopped goes on


def test_missing_images_are_made_again_and_others_left_alone(made, original):
    for name in ("training/rgb/00000003.jpg", "training/mask/00000017.jpg", "evaluation/rgb/00000005.jpg"):
        (made / name).unlink()
    (made / "training_xyz.json").unlink()
    (made / "training/rgb/00000007.jpg").write_bytes(b"")
    (made / "training/rgb/00000003.jpg.partial").write_bytes(b"half an image")
    kept = (made / "training/rgb/00000001.jpg").stat().st_mtime_ns
    generate(made, **OPTIONS)
    assert contents(made) == contents(original)
    assert (made / "training/rgb/00000001.jpg").stat().st_mtime_ns == kept


def test_a_finished_set_is_left_alone(made, monkeypatch):
    def refuse(*_):
        raise AssertionError("drew or sampled")

    monkeypatch.setattr(synth, "make_samples", refuse)
    generate(made, **OPTIONS)


def run_in_background(out: Path, workers: int) -> subprocess.Popen[str]:
    options = {**OPTIONS, "workers": workers}
    # Slowed down, or a busy machine might let it finish before it is stopped.
    code = (
        "import sys, time; from pahm.cli import main; from pahm.synth import generate as synth; "
        "save = synth.save_image; "
        "synth.save_image = lambda *given: (time.sleep(0.1), save(*given)); "
        "generate = synth.generate; "
        f"synth.generate = lambda *_, **__: generate({str(out)!r}, **{options!r}); "
        f"sys.exit(main(['synth', '--out', {str(out)!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    deadline = time.monotonic() + 300
    while len(list(out.glob("training/rgb/*.jpg"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_process_and_goes_on(original, tmp_path):
    process = run_in_background(tmp_path / "set", 2)
    children = [
        int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.kill()
    process.communicate()
    assert len(children) >= 2
    deadline = time.monotonic() + 30
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "set/training_xyz.json").exists()
    generate(tmp_path / "set", **OPTIONS)
    left = contents(tmp_path / "set")
    assert {name: data for name, data in left.items() if not name.endswith(".partial")} == contents(original)


def test_a_worker_that_dies_is_told(tmp_path):
    def kill():
        while not list(tmp_path.glob("set/training/rgb/*.jpg")):
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(ChildProcessError, match="a process that renders ended by itself"):
        generate(tmp_path / "set", **{**OPTIONS, "train": 2000, "workers": 2})
    killer.join()
    assert not multiprocessing.active_children()


def test_a_stopped_run_says_how_to_go_on(original, tmp_path):
    process = run_in_background(tmp_path / "set", 2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said == "pahm synth: stopped; the same command goes on from here\n"
    generate(tmp_path / "set", **OPTIONS)
    assert contents(tmp_path / "set") == contents(original)


@pytest.mark.parametrize("when", ["image", "annotation"])
def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(original, tmp_path, monkeypatch, when):
    count = 0

    def fail(*arguments, **options):
        nonlocal count
        count += 1
        if when == "annotation" or count > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*arguments, **options)

    save = Image.Image.save
    with monkeypatch.context() as patch:
        if when == "image":
            patch.setattr(Image.Image, "save", fail)
        else:
            patch.setattr(synth_folder.os, "fsync", fail)
        with pytest.raises(OSError) as caught:
            generate(tmp_path / "set", **OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "set").rglob("*.partial"))
    assert not (tmp_path / "set/training_verts.json").exists()
    assert len(list((tmp_path / "set/training/rgb").iterdir())) == (15 if when == "image" else TRAIN)
    generate(tmp_path / "set", **OPTIONS)
    assert contents(tmp_path / "set") == contents(original)


# What is refused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": SEED + 1}, f"^seed: .* begun with seed {SEED}, got {SEED + 1}"),
        ({"image_size": 96}, f"^image_size: .* begun with image_size {SIZE}, got 96"),
        ({"train": TRAIN - 5}, f"^train: .* expected at least {TRAIN}, got {TRAIN - 5}"),
        ({"eval": 2}, f"^eval: .* expected at least {EVAL}, got 2"),
        ({"train": -1}, "^train: expected an integer of at least 0, got -1"),
        ({"eval": -3}, "^eval: expected"),
        ({"seed": -1}, "^seed: expected"),
        ({"seed": 1.5}, "^seed: expected"),
        ({"image_size": 8}, "^image_size: expected"),
        ({"workers": 0}, "^workers: expected"),
    ],
)
def test_other_options_in_the_same_folder_and_bad_ones_are_refused(original, change, sentence):
    before = contents(original)
    with pytest.raises(ValueError, match=sentence):
        generate(original, **{**OPTIONS, **change})
    assert contents(original) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "training_K.json").write_text("[]")
    with pytest.raises(ValueError, match=r"^out: .* is not empty"):
        generate(tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["training_K.json"]
    (tmp_path / "synth.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"^out: .*synth.json is not a manifest"):
        generate(tmp_path, **OPTIONS)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^out: .* is a file"):
        generate(tmp_path / "file", **OPTIONS)


def test_backgrounds_must_be_a_folder_of_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^backgrounds: .* is not a folder"):
        generate(tmp_path / "set", **OPTIONS, backgrounds=tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"^backgrounds: .* has no image"):
        generate(tmp_path / "set", **OPTIONS, backgrounds=tmp_path)
    assert not (tmp_path / "set").exists()
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"none of 1 can be read: .*broken\.jpg is not a readable image"):
        generate(tmp_path / "set", **OPTIONS, backgrounds=tmp_path)


def test_a_background_that_cannot_be_read_is_named_once_and_replaced(tmp_path, caplog):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_text("no image")
    Image.new("RGB", (40, 40), (9, 200, 30)).save(folder / "b.png")
    generate(tmp_path / "set", **{**OPTIONS, "train": 8, "eval": 0, "backgrounds": folder})
    (sentence,) = caplog.messages
    assert sentence.endswith("; the next background takes its place") and str(folder / "a.jpg") in sentence
    assert len(FreiHand(tmp_path / "set")) == 8
