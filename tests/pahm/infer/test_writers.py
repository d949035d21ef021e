import json
import os
import threading
import time

import numpy as np
import pytest
import torch
import trimesh
from known_hand import KnownNetwork, enclosed, known_hand, picture
from PIL import Image, ImageOps

import pahm.infer.writers
from pahm.cli import main
from pahm.infer.predictor import Predictor
from pahm.infer.writers import FACES, FORMATS, predict_files, write_many


@pytest.fixture
def predictor():
    return Predictor(KnownNetwork(known_hand(), [8.0, 0.01, -0.02], look=0.5), "cpu")


def test_written_files_hold_the_prediction(tmp_path):
    picture().save(tmp_path / "hand.png")
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu")
    hand = predictor.predict(tmp_path / "hand.png", left=True)
    paths = hand.save(tmp_path / "out", formats=FORMATS)
    names = ["hand.glb", "hand.json", "hand.obj", "hand.ply", "hand_overlay.png"]
    assert sorted(path.name for path in paths) == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["faces.json", *names]

    for name in ("hand.ply", "hand.obj"):
        mesh = trimesh.load(tmp_path / "out" / name, process=False)
        np.testing.assert_allclose(mesh.vertices, hand.vertices, atol=1e-6)
        np.testing.assert_array_equal(mesh.faces, hand.faces)
    scene = trimesh.load(tmp_path / "out" / "hand.glb", process=False)
    (shape,) = scene.geometry.values()
    np.testing.assert_allclose(shape.vertices, hand.vertices * [1, -1, -1], atol=1e-6)
    np.testing.assert_array_equal(shape.faces, hand.faces)

    with Image.open(tmp_path / "out" / "hand_overlay.png") as drawn:
        changed = np.abs(np.asarray(drawn, int) - np.asarray(hand.image, int)).max(2) > 8
    on_hand = hand.vertices_2d.round().astype(int)
    inside = (on_hand >= 0).all(1) & (on_hand < (90, 70)).all(1)
    hit = changed[on_hand[inside, 1], on_hand[inside, 0]]
    assert changed.shape == (70, 90) and hit.mean() > 0.6 and changed.mean() < 0.9

    record = json.loads((tmp_path / "out" / "hand.json").read_text())
    shapes = {"vertices": (778, 3), "joints": (21, 3), "vertices_2d": (778, 2), "joints_2d": (21, 2)}
    shapes |= {"K": (3, 3), "weak_perspective": (3,), "crop_box": (4,)}
    assert set(record) == {*shapes, "image", "image_size", "left", "intrinsics_assumed", "confidence"}
    for key, shape in shapes.items():
        assert np.shape(record[key]) == shape
    np.testing.assert_allclose(record["vertices"], hand.vertices, atol=1e-7)
    assert record["intrinsics_assumed"] is True and record["left"] is True and record["confidence"] is None
    assert record["image"] == str(tmp_path / "hand.png") and record["image_size"] == [90, 70]


def test_images_of_the_same_name_do_not_overwrite_each_other(tmp_path):
    predictor = Predictor(KnownNetwork(known_hand(), [8.0, 0, 0]), "cpu")
    out = tmp_path / "out"
    written = []
    for _ in range(2):  # the second time over, every image finds its own files again
        for name in ("a/hand.png", "b/hand.png", "a/hand.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            picture().save(tmp_path / name)
            written.append(
                [path.name for path in predictor.predict(tmp_path / name).save(out, "hand", FORMATS)]
            )
    assert written[:3] == written[3:]
    assert len({name for names in written for name in names}) == 15
    records = [json.loads((out / names[-1]).read_text())["image"] for names in written[:3]]
    assert records == [str(tmp_path / name) for name in ("a/hand.png", "b/hand.png", "a/hand.jpg")]
    (out / "other.json").write_text("not ours")
    assert predictor.predict(picture()).save(out, "other", ["json"])[-1].name == "other-2.json"
    assert (out / "other.json").read_text() == "not ours"


def test_a_json_that_cannot_be_read_is_another_predictions(predictor, tmp_path):
    hand = predictor.predict(picture())
    (tmp_path / "hand.json").mkdir()
    (tmp_path / "hand-2.json").write_text("[" * 100_000)
    assert [path.name for path in hand.save(tmp_path, "hand", FORMATS)][-1] == "hand-3.json"
    error, paths = write_many([("a" * 300, hand), ("b", hand)], tmp_path, ["json"])
    assert isinstance(error, OSError) and paths == [tmp_path / "b.json"]


@pytest.mark.parametrize("form", FORMATS)
def test_what_ends_in_the_middle_leaves_the_file_as_it_was(form, predictor, tmp_path, monkeypatch):
    hand = predictor.predict(picture())
    (path,) = hand.save(tmp_path, "hand", [form])
    before = path.read_bytes()

    def stopped(partial, name):
        assert partial.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        hand.save(tmp_path, "hand", [form])
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, FACES} and path.read_bytes() == before


def read_back(folder, stem):
    """(vertices, faces) in camera space of the GLB, the PLY and the JSON of a hand."""
    scene = trimesh.load(folder / f"{stem}.glb", process=False)
    (shape,) = scene.geometry.values()
    ply = trimesh.load(folder / f"{stem}.ply", process=False)
    record = json.loads((folder / f"{stem}.json").read_text())
    yield np.asarray(shape.vertices) * [1, -1, -1], np.asarray(shape.faces)
    yield np.asarray(ply.vertices), np.asarray(ply.faces)
    faces = json.loads((folder / FACES).read_text())["left" if record["left"] else "right"]
    yield np.asarray(record["vertices"]), np.asarray(faces)


@pytest.mark.parametrize("width", [90, 91])
def test_files_of_a_left_hand_hold_the_mirrored_mesh_with_normals_outward(predictor, tmp_path, width):
    image = picture(size=(width, 70))
    K = np.array([[120.0, 0, 27.3], [0, 118.0, 41.9], [0, 0, 1]])
    mirrored_K = np.array([[120.0, 0, width - 1 - 27.3], [0, 118.0, 41.9], [0, 0, 1]])
    right = predictor.predict(image, bbox=(52, 7.5, 30, 25), intrinsics=K)
    left = predictor.predict(
        ImageOps.mirror(image), bbox=(width - 82, 7.5, 30, 25), intrinsics=mirrored_K, left=True
    )
    right.save(tmp_path, "right", FORMATS)
    left.save(tmp_path, "left", FORMATS)
    mirror = np.array([-1.0, 1.0, 1.0])
    for (theirs, their_faces), (ours, faces) in zip(
        read_back(tmp_path, "right"), read_back(tmp_path, "left"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs * mirror, atol=1e-4)
        meshes = [trimesh.Trimesh(*each, process=False) for each in ((theirs, their_faces), (ours, faces))]
        np.testing.assert_allclose(meshes[1].face_normals, meshes[0].face_normals * mirror, atol=2e-3)
        assert enclosed(ours, faces) > 5e-5 and enclosed(theirs, their_faces) > 5e-5


def test_only_what_is_asked_for_is_written(predictor, tmp_path):
    hand = predictor.predict(picture())
    paths = hand.save(tmp_path, "hand", ["json", "png"])
    assert [path.name for path in paths] == ["hand_overlay.png", "hand.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FACES, "hand.json", "hand_overlay.png"]
    with pytest.raises(ValueError, match="formats: expected some of png, glb, ply, obj, json, got 'stl'"):
        hand.save(tmp_path, "hand", ["ply", "stl"])
    with pytest.raises(ValueError, match=r"formats: expected some of .*, got 'none'"):
        hand.save(tmp_path, "hand", [])
    for name in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="name: expected a plain file name"):
            hand.save(tmp_path, name)


def test_an_overlay_keeps_every_bit_of_what_was_drawn(predictor, tmp_path):
    hand = predictor.predict(picture())
    hand.save(tmp_path, "hand")
    with Image.open(tmp_path / "hand_overlay.png") as written:
        assert np.array_equal(written, hand.overlay())


def test_faces_are_written_once_a_folder(predictor, tmp_path):
    picture().save(tmp_path / "faces.png")
    right, left = (predictor.predict(tmp_path / "faces.png", left=left) for left in (False, True))
    assert right.save(tmp_path / "out", formats=["json"]) == [tmp_path / "out" / "faces-2.json"]
    path = tmp_path / "out" / FACES
    before = path.stat().st_mtime_ns
    left.save(tmp_path / "out", formats=["json"])
    assert path.stat().st_mtime_ns == before
    faces = json.loads(path.read_text())
    np.testing.assert_array_equal(faces["right"], right.faces)
    np.testing.assert_array_equal(faces["left"], left.faces)
    path.write_text("damaged")
    left.save(tmp_path / "out", formats=["json"])
    assert json.loads(path.read_text()) == faces


def test_names_of_one_run_differ_without_json_and_the_order_stays(predictor, tmp_path, monkeypatch):
    original = pahm.infer.writers._write

    busy = []

    def slower_at_first(hand, folder, name, formats):
        assert name not in busy, "two threads write the same file"
        busy.append(name)
        time.sleep(0.5 if name == "hand" else 0)
        paths = original(hand, folder, name, formats)
        busy.remove(name)
        return paths

    monkeypatch.setattr(pahm.infer.writers, "_write", slower_at_first)
    sources = []
    for name in ("a/hand.png", "b/hand.png", "a/hand.png", "c/hand-2.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        picture().save(path)
        sources.append(path)
    results = [(path.stem, predictor.predict(path)) for path in sources]
    written = [[path.name for path in paths] for paths in write_many(results, tmp_path / "out", ["ply"])]
    assert written == [["hand.ply"], ["hand-2.ply"], ["hand.ply"], ["hand-2-2.ply"]]


def test_the_next_hand_is_made_while_one_is_written(predictor, tmp_path, monkeypatch):
    hand, made = predictor.predict(picture()), threading.Event()
    original = pahm.infer.writers._write

    def waits(*arguments):
        assert made.wait(30), "nothing was made meanwhile"
        return original(*arguments)

    def results():
        yield "a", hand
        made.set()
        yield "b", hand

    monkeypatch.setattr(pahm.infer.writers, "_write", waits)
    written = list(write_many(results(), tmp_path, ["ply"]))
    assert [[path.name for path in paths] for paths in written] == [["a.ply"], ["b.ply"]]


def test_what_cannot_be_written_stops_no_other(predictor, tmp_path):
    (tmp_path / "out" / "b.ply").mkdir(parents=True)
    error = ValueError("no hand")
    hand = predictor.predict(picture())
    results = [("a", hand), ("b", hand), ("c", error), ("d", hand)]
    formats = ["png", "ply"]
    written = list(write_many(results, tmp_path / "out", formats))
    assert [path.name for path in written[0]] == ["a_overlay.png", "a.ply"]
    assert isinstance(written[1], OSError) and "b.ply" in str(written[1]) and written[2] is error
    assert all(path.is_file() for path in written[3])
    with pytest.raises(IsADirectoryError):
        hand.save(tmp_path / "out", "b", formats)


def test_a_folder_stands_for_its_images(predictor, tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner.png").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", ".hidden.png", "inner.png/deep.png"):
        picture().save(folder / name)
    (folder / "notes.txt").write_text("no image")
    picture().save(tmp_path / "first.bmp")
    (tmp_path / "empty").mkdir()
    threads = torch.get_num_threads()
    images = [tmp_path / "first.bmp", str(folder), tmp_path / "empty"]
    results = list(predict_files(predictor, images, tmp_path / "out", kinds=["json"], batch_size=2))
    assert str(results[0]).startswith(f"{tmp_path / 'empty'}: no image in this folder, expected .jpg")
    assert [paths[0].name for paths in results[1:]] == ["first.json", "a.json", "b.json"]
    assert torch.get_num_threads() == threads


def test_the_network_leaves_a_core_to_the_writers(predictor, tmp_path):
    used = []
    forward = predictor.network.forward

    def spy(images):
        used.append(torch.get_num_threads())
        return forward(images)

    predictor.network.forward = spy
    picture().save(tmp_path / "a.png")
    threads = torch.get_num_threads()
    try:
        for given, expected in ((3, 2), (1, 1)):
            torch.set_num_threads(given)
            list(predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out", kinds=["json"]))
            assert used.pop() == expected and torch.get_num_threads() == given
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, tmp_path):
    network = KnownNetwork(known_hand(), [8.0, 0.01, -0.02], look=0.5)
    monkeypatch.setattr("pahm.model.load_checkpoint", lambda path: network)
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("not an image")
    os.remove(tmp_path / "4.png")

    def run(*arguments):
        files = [str(tmp_path / f"{i}.png") for i in range(5)]
        return main(["predict", *files, "--device", "cpu", "--out", str(tmp_path / "out"), *arguments])

    return run, network


def test_bad_images_among_many_are_named_and_the_others_written(command, tmp_path, capsys):
    run, network = command
    assert run("--batch-size", "3") == 2
    assert [len(batch) for batch in network.seen] == [2, 1]
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert len(errors) == 2 and all(line.startswith("pahm predict: ") for line in errors)
    assert "2.png is not a readable image" in errors[0] and "4.png does not exist" in errors[1]
    names = [f"{i}{suffix}" for i in (0, 1, 3) for form, suffix in FORMATS.items() if form != "obj"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, FACES])
    assert printed.out.splitlines() == [str(tmp_path / "out" / name) for name in names]


def test_the_command_writes_what_is_asked_for(command, tmp_path, capsys):
    run, network = command
    run("--write", "ply,json", "--left")
    assert len(network.seen) == 1
    suffixes = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert suffixes == {".ply", ".json"}
    assert json.loads((tmp_path / "out" / "3.json").read_text())["left"] is True
    capsys.readouterr()
    assert run("--write", "stl") == 2
    assert "expected some of png, glb, ply, obj, json, got 'stl'" in capsys.readouterr().err
    assert run("--batch-size", "0") == 2
    assert "batch_size: expected a whole number of at least 1, got 0" in capsys.readouterr().err
