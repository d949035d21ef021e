"""The paper's tables as runs: rows, budgets, resuming, and what is written."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file

from pahm.ablation import TABLES, ablate
from pahm.ablation.tables import SCORES, VARIANTS, Row, Table, configuration
from pahm.ablation.write import _label, as_csv, load_results, markdown, pairs_that_hold
from pahm.cli import main
from pahm.config import preset
from pahm.hand.topology import HandTopology
from pahm.model import load_checkpoint
from pahm.model.backbone import create_backbone
from pahm.synth.generate import generate

COMMITTED = ROOT / "docs" / "results"
CHANGES = {"model.backbone": "test_resnet", "train.batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 8, 4, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.manual_seed(0)
    torch.save(create_backbone("test_resnet").state_dict(), path)
    return str(path)


@pytest.fixture
def run(data, weights, tmp_path):
    said = []

    def run(table="table3", **options):
        said.clear()
        changes = {**CHANGES, "model.backbone_weights": weights, **options.pop("changes", {})}
        options = {"data": data, "seeds": [0], "accelerator": "cpu", **options}
        return ablate(table, tmp_path / "out", changes=changes, report=said.append, **options), said

    return run


def test_a_table_is_run_once_and_written_beside_the_papers_numbers(run, monkeypatch):
    path, said = run()
    assert [line.split(":")[0] for line in said] == [
        f"{name}, seed 0" for name in ("refine-once", "refine-three-times", "aligned")
    ]
    text = path.read_text()
    assert "| refine once | 8.31 |" in text and "| 8.42 |" in text and " of 2 pairs as in the paper" in text
    assert "Ours: 8 images of 64 pixels a side, epochs: 1, batch size: 4; seed 0." in text
    with (path.parent / "table3.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == ["refine-once", "refine-three-times", "aligned"]
    for row in rows:
        record = json.loads((path.parent / "results" / f"{row['variant']}-seed0.json").read_text())
        assert float(row["pa_mpjpe"]) == pytest.approx(record["scores"]["pa_mpjpe"], rel=1e-5)
        assert record["scores"]["images"] == 4 and record["config"]["train"]["epochs"] == 1
        assert record["config"]["model"]["backbone_weights"] is None
    assert Image.open(path.parent / "table3.png").size[0] > 400

    # The finished rows are not run again, not even as rows of another table; a lost one is.
    (path.parent / "results" / "refine-once-seed0.json").unlink()
    shutil.rmtree(path.parent / "runs" / "refine-once-seed0")
    _, said = run()
    assert [line.endswith("done before") for line in said] == [True, True, False]
    trained = []

    def train(config, data, out, **options):
        trained.append(config.name)
        return {"pa_mpjpe": 9.0, "pa_mpvpe": 9.5, "f5": 0.5, "f15": 0.9}

    monkeypatch.setattr("pahm.train.trainer.train", train)
    run("table2")
    assert trained == ["skips-m4", "skips-m4-m3", "skips-m4-m2"]


def test_results_of_another_budget_are_not_mixed(run, monkeypatch):
    scores = dict.fromkeys(SCORES, 9.0)
    monkeypatch.setattr("pahm.train.trainer.train", lambda *a, **k: scores)
    path, _ = run()
    with pytest.raises(ValueError, match=r"refine-once-seed0\.json was made with train\.epochs = 1, now 2"):
        run(changes={"train.epochs": 2})
    run(changes={"model.transformer_layers": 3})  # of which these networks have none
    run(changes={"train.save_minutes": 2.0})
    run("table4")
    with pytest.raises(
        ValueError, match=r"metro-seed0\.json was made with model\.transformer_layers = 2, now 3"
    ):
        run("table4", changes={"model.transformer_layers": 3})
    (path.parent / "results" / "aligned-seed0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"aligned-seed0\.json is not a result of pahm ablate"):
        run()


def test_a_stopped_table_keeps_its_finished_rows(run, monkeypatch):
    def train(config, *arguments, **options):
        if config.name == "aligned":
            raise KeyboardInterrupt
        return {"pa_mpjpe": 9.0, "pa_mpvpe": 9.0}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pahm.train.trainer.train", train)
        run()
    monkeypatch.setattr("pahm.train.trainer.train", lambda *a, **k: {"pa_mpjpe": 8.0, "pa_mpvpe": 8.0})
    path, said = run()
    assert [line.endswith("done before") for line in said] == [True, True, False]
    # The finished rows keep their 9, which the last one's 8 improves on.
    assert "1 of 2 pairs as in the paper" in path.read_text() and "| 9.00 |" in path.read_text()


def test_a_resumed_run_has_no_time(run, monkeypatch):
    def stop(config, data, folder, **options):
        folder.mkdir(parents=True)
        (folder / "last.ckpt").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pahm.train.trainer.train", stop)
        run()
    monkeypatch.setattr("pahm.train.trainer.train", lambda *a, **k: {"pa_mpjpe": 8.0, "pa_mpvpe": 8.0})
    path, _ = run()
    rows = path.read_text().splitlines()
    assert next(row for row in rows if row.startswith("| refine once")).endswith("| - |")
    assert next(row for row in rows if row.startswith("| coarse to fine")).endswith("| 0.0 |")


def test_other_images_hands_or_weights_are_refused(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr("pahm.train.trainer.train", lambda *a, **k: {"pa_mpjpe": 8.0, "pa_mpvpe": 8.0})
    path, _ = run()
    (path.parent / "results" / "aligned-seed0.json").unlink()
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    run(data=moved)  # the same images, wherever they lie
    spoilt = json.loads((moved / "training_K.json").read_text())
    spoilt[0][0][0] += 2
    whole = (moved / "training_K.json").read_text()
    (moved / "training_K.json").write_text(json.dumps(spoilt))
    with pytest.raises(ValueError, match="were made with other images"):
        run(data=moved)  # though nothing is left to run
    (moved / "training_K.json").write_text(whole)
    (path.parent / "results" / "aligned-seed0.json").unlink()
    cameras = json.loads((moved / "training_K.json").read_text())
    cameras[0][0][0] += 1
    (moved / "training_K.json").write_text(json.dumps(cameras))
    with pytest.raises(
        ValueError, match=r"were made with other images \(--data\); use another output folder"
    ):
        run(data=moved)
    other = tmp_path / "other.pth"
    torch.save(create_backbone("test_resnet").state_dict(), other)
    with pytest.raises(ValueError, match=r"were made with other first weights; use another output folder"):
        run(changes={"model.backbone_weights": str(other)})
    topology = HandTopology.load()
    topology = topology._replace(joint_regressor=topology.joint_regressor * 1.001)
    with pytest.raises(ValueError, match=r"were made with other hands \(--mano\)"):
        run(topology=topology)


def test_data_that_rows_cannot_be_scored_on_is_refused_and_leaves_no_trace(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr("pahm.train.trainer.train", lambda *a, **k: {"pa_mpjpe": 8.0, "pa_mpvpe": 8.0})
    with pytest.raises(FileNotFoundError, match="misspelt"):
        run(data=tmp_path / "misspelt")
    unknown = tmp_path / "unknown"
    shutil.copytree(data, unknown)
    for name in ("xyz", "verts"):
        (unknown / f"evaluation_{name}.json").unlink()
    with pytest.raises(ValueError, match=r"unknown has no evaluation annotations, which the rows are"):
        run(data=unknown)
    topology = HandTopology.load()
    topology = topology._replace(joint_regressor=topology.joint_regressor[::-1].copy())
    with pytest.raises(ValueError, match="the joints lie"):
        run(topology=topology)

    def refuse(*arguments, **options):
        raise ValueError("no such device")

    # A record of what no run was made from binds nobody.
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no such device"):
        patch.setattr("pahm.train.trainer.train", refuse)
        run(topology=topology._replace(joint_regressor=HandTopology.load().joint_regressor * 1.001))
    run()


def test_what_rows_differ_in_cannot_be_set_for_all(run):
    with pytest.raises(ValueError, match=r"model\.cues is what the rows differ in"):
        run("table1", changes={"model.cues": False})


def test_the_command_names_one_scale_and_its_first_weights(tmp_path, monkeypatch):
    seen, rendered = [], []

    def train(config, data, out, **options):
        seen.append((config, str(data), options["accelerator"]))
        return dict.fromkeys(SCORES, 8.0)

    def render(folder, *counts, seed):
        rendered.append((*counts, seed))
        generate(folder, 1, 1, seed=3, workers=1, progress=False)

    monkeypatch.setattr("pahm.train.trainer.train", train)
    monkeypatch.setattr("pahm.ablation.run.generate", render)
    out = tmp_path / "out"
    options = ["--out", str(out), "--seeds", "5", "--accelerator", "cpu", "--train.learning-rate", "0.5"]
    assert main(["ablate", "table3", *options]) == 0
    assert rendered == [(10000, 1000, 1)] and (out / "table3.md").exists()
    weights = load_file(out / "backbone.safetensors")
    expected = load_checkpoint().extractor.backbone.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in weights)
    assert [config.name for config, *_ in seen] == ["refine-once", "refine-three-times", "aligned"]
    for config, data, accelerator in seen:
        assert (data, accelerator) == (str(out / "data"), "cpu")
        assert (config.train.seed, config.train.learning_rate, config.model.image_size) == (5, 0.5, 64)
        assert config.model.backbone_weights == str(out / "backbone.safetensors")
    seen.clear()
    paper = ["--preset", "paper", "--data", str(out / "data"), "--out", str(tmp_path / "paper")]
    assert main(["ablate", "table2", *paper, "--seeds", "0"]) == 0
    assert {(c.model.backbone, c.model.image_size, c.train.epochs) for c, *_ in seen} == {
        ("resnet18", 224, 50)
    }
    seen.clear()
    assert main(["ablate", "table4", *paper[:-1], str(tmp_path / "four"), "--seeds", "0"]) == 0
    assert {config.model.backbone for config, *_ in seen} == {"hrnet_w64"}


def test_a_job_runs_the_rows_and_seeds_that_it_names(run, monkeypatch):
    trained = []

    def train(config, *arguments, **options):
        trained.append((config.name, config.train.seed))
        return {"pa_mpjpe": 9.0, "pa_mpvpe": 9.0}

    monkeypatch.setattr("pahm.train.trainer.train", train)
    run(only=["aligned"], seeds=[3])
    path, _ = run(only=["refine-once", "aligned"], seeds=[4])
    assert trained == [("aligned", 3), ("refine-once", 4), ("aligned", 4)]
    trained.clear()
    run(seeds=[3, 4])
    assert trained == [("refine-once", 3), ("refine-three-times", 3), ("refine-three-times", 4)]
    assert "mean and standard deviation of seeds 3, 4." in path.read_text()
    with pytest.raises(ValueError, match=r"only: expected rows of table3, refine-once, .*, got 'metro'"):
        run(only=["metro"])


def test_what_cannot_be_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="expected one of table1, table2, table3, table4, got 'table5'"):
        run("table5")
    with pytest.raises(ValueError, match="expected one of tiny, paper, got 'huge'"):
        run(scale="huge")
    with pytest.raises(ValueError, match=r"expected different numbers, got \[1, 1\]"):
        run(seeds=[1, 1])
    with pytest.raises(ValueError, match="preset 'paper' needs a folder in FreiHAND's layout"):
        ablate("table1", tmp_path, scale="paper")


def test_every_row_is_the_papers():
    counts = {name: len([r for r in t.rows if r.variant]) for name, t in TABLES.items()}
    assert counts == {"table1": 6, "table2": 4, "table3": 3, "table4": 3}
    named = {row.variant for table in TABLES.values() for row in table.rows} - {None}
    assert named == set(VARIANTS)
    for table in TABLES.values():
        for row in table.rows:
            assert len(row.cells) == len(table.columns) and len(row.paper) == len(table.scores)
    # "Our final model improves the baseline with the global feature by 26 %."
    first, last = (TABLES["table1"].rows[i].paper[0] for i in (0, -1))
    assert 1 - last / first == pytest.approx(0.26, abs=0.005)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_in_the_documentation_are_those_of_their_records(name):
    table = TABLES[name]
    results = load_results(COMMITTED, table, (0, 1))
    assert [len(results[row.variant]) for row in table.rows if row.variant] == [2] * len(results)
    assert (COMMITTED / f"{name}.md").read_text(encoding="utf-8") == markdown(table, name, results)
    assert (COMMITTED / f"{name}.csv").read_text(encoding="utf-8") == as_csv(table, results)


def test_the_documentation_counts_the_pairs_that_hold():
    pairs = {"pa_mpjpe": 0, "pa_mpvpe": 0}
    for name in ("table1", "table2", "table3"):
        results = load_results(COMMITTED, TABLES[name], (0, 1))
        for score in pairs:
            pairs[score] += sum(holds for *_, holds in pairs_that_hold(TABLES[name], results, score))
    text = (COMMITTED / "README.md").read_text(encoding="utf-8")
    counts = f"{pairs['pa_mpjpe']} are as in the paper by PA-MPJPE and {pairs['pa_mpvpe']} by PA-MPVPE"
    assert f"Of the 10 adjacent pairs of Tables 1 to 3, {counts}" in " ".join(text.split())


def test_a_plot_names_the_column_of_what_says_only_yes_or_no():
    labels = [_label(TABLES["table1"], TABLES["table1"].rows[i]) for i in (2, 4)]
    assert labels == [
        "maps, without 2D, pixel-aligned, self-attention: no",
        "global, MLP, self-attention: yes",
    ]


def test_rows_differ_from_the_base_in_their_variant_only():
    base = preset("resnet18")
    for variant in VARIANTS:
        config = configuration(base, variant)
        assert (config.train, config.augment) == (base.train, base.augment)
        assert config.loss in (base.loss, replace(base.loss, silhouette=0.0, pose=0.0, position=0.0))
    assert configuration(base, "aligned-attention").model == base.model
    assert configuration(base, "aligned").model.attention_heads == (0, 0, 0, 0)


def test_pairs_are_compared_with_the_papers_order():
    table = Table(
        "t",
        ("row",),
        ("pa_mpjpe",),
        tuple(Row((n,), (s,), n) for n, s in zip("abc", (9, 8, 8.5), strict=True)),
    )

    def results(**values):
        def record(score, seed):
            config = {"model": {"image_size": 64}, "train": {"epochs": 1, "batch_size": 8, "seed": seed}}
            scores = {"pa_mpjpe": score, "mean_hand_pa_mpjpe": 14.5}
            return {"scores": scores, "seconds": 60, "training_images": 9000, "config": config}

        return {n: [record(x, seed) for seed, x in enumerate(v)] for n, v in values.items()}

    measured = results(a=[10.0, 12.0], b=[9.0, 11.0], c=[9.5, 9.7])
    assert [holds for *_, holds in pairs_that_hold(table, measured)] == [True, False]
    assert [holds for *_, holds in pairs_that_hold(table, results(a=[1.0], b=[], c=[2.0]))] == []
    # What the paper quotes of others stands between METRO and ours, and is no row of this comparison.
    last = pairs_that_hold(TABLES["table4"], results(**{"metro": [9.0], "metro-aligned": [8.0]}))
    assert [(a.variant, b.variant, holds) for a, b, holds in last] == [("metro", "metro-aligned", True)]
    text = markdown(table, "table1", measured)
    assert "| a | 9 | 11.00 ± 1.41 | 1.0 ± 0.0 |" in text
    assert "batch size: 8; mean and standard deviation of seeds 0, 1." in text
    assert "1 of 2 pairs" in text and "The mean hand, predicted for every image: PA-MPJPE mm 14.50." in text
    assert "- a / b: holds, 1.00 apart, 1.41 between seeds\n" in text
    assert "- b / c: does not hold, 0.40 apart, 1.00 between seeds\n" in text
    assert "- a / b: holds, 1.00 apart\n" in markdown(table, "table1", results(a=[2.0], b=[1.0], c=[]))
