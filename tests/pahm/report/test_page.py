"""What the page of a run says."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from report_page import CONFIG, FAILURES, IMAGES, body, payload, table

from pahm.cli import main
from pahm.model import load_checkpoint, read_metadata
from pahm.report import make_report
from pahm.report.per_image import reasons_of, score
from pahm.score.evaluation import evaluate


def test_scores_are_those_of_pahm_eval(page, data, trained):
    rows = table(page)
    assert list(rows) == [f"{IMAGES} images", "ours", "baseline", "mean hand"]
    ours = evaluate(load_checkpoint(), data, workers=0, progress=False)
    theirs = evaluate(load_checkpoint(trained / "model.safetensors"), data, workers=0, progress=False)
    expected = {"ours": ours.scores, "baseline": theirs.scores, "mean hand": ours.mean_hand_scores}
    names = ["pa_mpjpe", "pa_mpvpe", "f5", "f15", "auc_joints", "auc_vertices"]
    for label, scores in expected.items():
        np.testing.assert_allclose([float(x) for x in rows[label]], [scores[n] for n in names], atol=0.006)


def test_curves_are_those_that_training_logged(page, trained):
    found = {chart["id"]: {t["name"]: t for t in chart["traces"]} for chart in payload(page)["charts"]}
    assert {"total, weighted", "mesh_1", "mesh_4", "edge", "normal", "silhouette"} <= set(found["losses"])
    assert len(found["losses"]["mesh_1"]["x"]) >= 2 and list(found["rate"]) == ["learning rate"]
    recorded = read_metadata(trained / "model.safetensors")[1]
    for name, key in (("PA-MPJPE", "pa_mpjpe"), ("PA-MPVPE", "pa_mpvpe")):
        curve = found["evaluation"][name]
        assert curve["x"] == list(range(1, CONFIG.train.epochs + 1))
        assert curve["y"][-1] == pytest.approx(recorded[key], rel=0.01)
    assert list(found["distribution"]) == ["ours", "baseline", "mean hand"]


def test_hands_of_the_page(page, data):
    ours = evaluate(load_checkpoint(), data, workers=0, progress=False)
    hands = payload(page)["hands"]
    grid, failed = ([h for h in hands if h["kind"] == kind] for kind in ("grid", "failure"))
    assert [h["index"] for h in grid] == [0, 2, 3, 5]
    errors = [h["meshes"][0]["mean"] for h in failed]
    assert errors == sorted(errors, reverse=True) and len(errors) == FAILURES
    for hand in hands:
        by_key = {mesh["key"]: mesh for mesh in hand["meshes"]}
        assert [m["count"] for m in hand["meshes"] if m["key"].startswith("ours")] == [778, 389, 195, 98]
        assert by_key["truth"]["mean"] is None
        means = [m["mean"] for m in hand["meshes"] if m["key"].startswith("ours")]
        assert max(means) < 2 * min(means), "coarse vertices are compared with their own true ones"
    # The mean over the images of the worst and the rest is the score.
    every = payload(page)["charts"][-1]["traces"][0]["x"]
    assert np.mean(every) == pytest.approx(ours.scores["pa_mpvpe"], abs=0.01)
    np.testing.assert_allclose(errors, sorted(every, reverse=True)[:FAILURES], atol=0.01)


def test_names_are_escaped_and_the_page_is_small(page):
    assert "<run>" not in body(page) and "a &lt;run&gt; &amp; more" in body(page)
    assert page.stat().st_size < 12e6
    assert not list(page.parent.glob("*.partial"))
    assert all(alt for alt in re.findall(r'<img [^>]*alt="(.*?)"', body(page)))
    assert body(page).count("<img ") == len(
        re.findall(r'<img src="data:image/(?:png|jpeg);base64,', body(page))
    )


def test_without_baseline_curves_and_masks_the_page_says_so(run, data, tmp_path):
    bare = tmp_path / "run"
    bare.mkdir()
    shutil.copy(run / "model.safetensors", bare)
    folder = tmp_path / "data"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "rgb").symlink_to(data / "evaluation" / "rgb")
    for path in data.glob("evaluation_*.json"):
        shutil.copy(path, folder)
    out = tmp_path / "new" / "page.html"
    options = {"count": 2, "failures": 2, "images": 3, "device": "cpu", "progress": False}
    assert make_report(bare, folder, out=out, **options) == out
    text = body(out)
    assert "No baseline was given" in text and "baseline, mm" not in text
    assert list(table(out)) == ["3 images", "ours", "mean hand"] and "3 of 6 evaluation images" in text
    assert "no event files" in text and "occlusion is unknown" in text
    assert text.count("occlusion unknown") == 2
    titles = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert "baseline" not in titles and "M4 (98)" in titles
    assert table(out, ' id="by-reason"')["occlusion"] == ["unknown", "\N{EN DASH}"]
    assert text.count("so occlusion is unknown") == 2, "beside the table and the failures"


def test_known_reasons_are_counted(page):
    rows = table(page, ' id="by-reason"')
    assert list(rows)[1:] == ["occlusion", "out of frame", "self-occlusion", "none stands out"]
    assert sum(int(count) for count, *_ in list(rows.values())[1:]) == IMAGES
    assert "so occlusion is unknown" not in body(page)


@pytest.fixture(scope="module")
def cropped(trained, data, tmp_path_factory):
    """The page of a network that sees a part of each image."""
    out = tmp_path_factory.mktemp("cropped") / "page.html"
    options = {"count": 1, "failures": IMAGES, "device": "cpu", "progress": False}
    return make_report(trained, data, out=out, **options)


def test_out_of_frame_is_what_the_network_does_not_see(page, cropped, data):
    faces = load_checkpoint().faces
    reasons = reasons_of(str(data), range(IMAGES), faces, CONFIG.model.crop, progress=False)
    expected = sorted(100 * found.out_of_frame for found in reasons)
    shown = sorted(float(share) for share in re.findall(r"out of frame ([\d.]+) %", body(cropped)))
    np.testing.assert_allclose(shown, expected, atol=0.051)
    assert min(shown) > 5, "the whole images have all of these hands"
    assert "with 50 % of its longer side, outlined in the input." in body(cropped)
    assert "with 80 % of its longer side, outlined in the input." in body(page)


def test_what_the_network_sees_is_outlined_in_the_input(page, cropped):
    def steps(path):
        """How much brighter the square's outermost columns, 48 and 143 of 192, are than those beside."""
        uri = re.search(r'<img src="data:image/jpeg;base64,(.*?)" alt="evaluation image 0[",]', body(path))[1]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("L"), int)
        return picture[60:130, [48, 143]] - picture[60:130, [47, 144]]

    assert steps(cropped).min() > 120, "white inside of black"
    assert np.abs(steps(page)).max() < 120


@pytest.fixture
def damaged(data, tmp_path):
    """The data with an image that is cut short, one that links to nothing, and one without a mask."""
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    files = [
        folder / "evaluation" / kind / f"{i:08d}.jpg" for kind, i in (("rgb", 0), ("rgb", 2), ("mask", 4))
    ]
    files[0].write_bytes(files[0].read_bytes()[:600])
    files[1].unlink()
    files[1].symlink_to("nowhere.jpg")
    files[2].write_bytes(b"")
    return folder, files


def test_images_that_cannot_be_read_are_left_out(run, trained, data, damaged, tmp_path, capsys):
    folder, files = damaged
    options = {"baseline": trained, "count": 2, "failures": 2, "device": "cpu", "progress": False}
    page = make_report(run, folder, out=tmp_path / "page.html", **options)
    *sentences, summary = capsys.readouterr().err.splitlines()
    assert [str(file) in sentence for file, sentence in zip(files, sentences, strict=True)] == [True] * 3
    assert summary == f"3 of {IMAGES} images cannot be read and are left out"
    assert "3 images were left out" in body(page) and f"3 of {IMAGES} evaluation images" in body(page)
    assert all(f"<code>evaluation/rgb/{i:08d}.jpg</code>" in body(page) for i in (0, 2, 4))
    readable = [1, 3, 5]
    (ours, _), (theirs, _) = (
        score(network, str(data), readable, device="cpu", progress=False)
        for network in (load_checkpoint(), load_checkpoint(trained / "model.safetensors"))
    )
    rows = table(page)
    assert next(iter(rows)) == "3 images"
    assert float(rows["ours"][1]) == pytest.approx(ours.vertices.mean(), abs=0.006)
    worst = [readable[i] for i in np.argsort(-ours.vertices)[:2]]
    assert [hand["index"] for hand in payload(page)["hands"]] == [1, 5, *worst]
    for index, *shown in re.findall(
        r'<th scope="row"><b>(\d)</b><br>([\d.]+) mm<br><small>baseline ([\d.]+)</small></th>', body(page)
    ):
        at = readable.index(int(index))
        assert [f"{scored.vertices[at]:.1f}" for scored in (ours, theirs)] == shown


def test_many_and_no_images(run, damaged, tmp_path, capsys):
    folder, _ = damaged
    (folder / "evaluation" / "rgb" / "00000001.jpg").write_bytes(b"")
    options = {"count": 1, "failures": 1, "device": "cpu", "progress": False, "out": tmp_path / "page.html"}
    text = body(make_report(run, folder, **options))
    assert "4 images were left out" in text and "and 1 more." in text
    assert "<code>evaluation/rgb/00000004.jpg</code>" not in text
    capsys.readouterr()
    with pytest.raises(
        ValueError, match=r"^--data: none of the 3 evaluation images of .*damaged can"
    ) as found:
        make_report(run, folder, **options | {"images": 3})
    assert re.search(r"image: .*00000000\.jpg is not a readable image [^\n]*$", str(found.value))
    assert capsys.readouterr().err == ""


def test_networks_that_find_no_hand_leave_their_pictures_out(run, trained, data, tmp_path, monkeypatch):
    def refuse(self, image, **options):
        raise FloatingPointError("the network found no hand")

    monkeypatch.setattr("pahm.infer.predictor.Predictor.predict", refuse)
    options = {"count": 1, "failures": 1, "images": 1, "device": "cpu", "progress": False}
    out = make_report(run, data, baseline=trained, out=tmp_path / "page.html", **options)
    assert body(out).count("no hand that fits in front of the camera") == 4
    assert [[mesh["key"] for mesh in hand["meshes"]] for hand in payload(out)["hands"]] == [["truth"]] * 2


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no model", "DIR: {tmp} has no model.safetensors, expected a finished run folder of pahm train"),
        ("no truth", "--data: {tmp}/bare has no evaluation_xyz.json and evaluation_verts.json"),
        ("other network", "has model.backbone = 'tf_efficientnet_lite0', expected 'test_resnet'"),
        ("broken configuration", "config.json is not a configuration"),
        ("other hand", "expected meshes of that hand"),
        ("no baseline", "--baseline: {tmp}/nothing does not exist, expected a run folder or a checkpoint"),
        ("count", "--count: expected a number of at least 1, got 0"),
        ("out", "--out: {tmp} is a folder, expected the name of a file"),
        ("no plotly", "pahm report: the page needs plotly: pip install plotly"),
    ],
)
def test_bad_input_is_one_sentence(case, sentence, run, trained, data, tmp_path, capsys, monkeypatch):
    folder, source, more = tmp_path / "copy", data, []
    shutil.copytree(run, folder)
    if case == "no model":
        folder = tmp_path
    elif case in ("no truth", "other hand"):
        source = tmp_path / "bare"
        (source / "evaluation").mkdir(parents=True)
        (source / "evaluation" / "rgb").symlink_to(data / "evaluation" / "rgb")
        for name in ("K", "scale") if case == "no truth" else ("K", "scale", "xyz", "verts"):
            shutil.copy(data / f"evaluation_{name}.json", source)
        if case == "other hand":
            hands = json.loads((source / "evaluation_verts.json").read_text())
            (source / "evaluation_verts.json").write_text(json.dumps([hand[::-1] for hand in hands]))
    elif case == "other network":
        shutil.copy(trained / "config.json", folder)
    elif case == "broken configuration":
        (folder / "config.json").write_text("{")
    elif case == "no baseline":
        more = ["--baseline", str(tmp_path / "nothing")]
    elif case == "count":
        more = ["--count", "0"]
    elif case == "out":
        more = ["--out", str(tmp_path)]
    elif case == "no plotly":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "plotly" else object())
    assert main(["report", str(folder), "--data", str(source), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pahm report: ") and error.count("\n") == 1
    assert sentence.format(tmp=tmp_path) in error


def test_the_data_are_those_of_the_run_where_none_are_named(run, trained, data, tmp_path):
    options = {"count": 1, "failures": 0, "images": 2, "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match=r"--data: .*run\.json does not exist to name the run's data"):
        make_report(run, out=tmp_path / "page.html", **options)
    page = make_report(trained, out=tmp_path / "page.html", **options)
    assert str(data.resolve()) in body(page)
    assert f"torch {torch.__version__}" in body(page)
    shutil.copytree(trained, tmp_path / "broken")
    (tmp_path / "broken" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"broken/run\.json is not a record of pahm train"):
        make_report(tmp_path / "broken", out=tmp_path / "page.html", **options)
