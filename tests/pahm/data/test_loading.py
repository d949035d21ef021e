"""Which images a step sees: the same for any number of processes, workers and stops; unreadable ones."""

import logging
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from training_lives import logged

from pahm.cli import main
from pahm.config import AugmentConfig, preset
from pahm.data.augment import CropTransform
from pahm.data.freihand import FreiHand
from pahm.data.loading import Batches, EvaluationKeys, FolderImages, TrainingKeys, loader, seed_step
from pahm.synth.generate import generate
from pahm.train.trainer import HandTraining, train

CONFIG = preset("tiny").override(
    {
        "model.backbone": "test_resnet",
        "model.pretrained": False,
        "model.image_size": 64,
        "train.epochs": 1,
        "train.batch_size": 4,
        "train.workers": 0,
    }
)


@dataclass
class Numbers:
    """As many images as a test needs, without any picture."""

    count: int

    def __len__(self):
        return self.count

    def order(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(self.count)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate(folder, 9, 2, seed=3, workers=1, progress=False)
    return folder


@pytest.fixture
def damaged(data, tmp_path):
    """The same folder with two of its nine training images cut short."""
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    for index in (3, 4):
        path = folder / "training" / "rgb" / f"{index:08d}.jpg"
        path.write_bytes(path.read_bytes()[:500])
    return folder


def test_processes_share_every_global_batch():
    whole = list(TrainingKeys(Numbers(26), 5, 6))
    assert len(whole) == 4 and {epoch for epoch, _ in whole} == {0}
    assert len({index for _, indices in whole for index in indices}) == 24
    for processes in (2, 3):
        shares = [
            list(TrainingKeys(Numbers(26), 5, 6, processes, lambda rank=rank: rank))
            for rank in range(processes)
        ]
        for step, (_, indices) in enumerate(whole):
            assert [i for share in shares for i in share[step][1]] == indices


def test_the_order_is_of_seed_and_epoch_and_goes_on_inside_an_epoch():
    keys = TrainingKeys(Numbers(26), 5, 6)
    first = list(keys)
    assert list(keys) == first
    keys.set_epoch(2)
    third = list(keys)
    assert third != first and third != list(TrainingKeys(Numbers(26), 6, 6, start=(2, 0)))
    resumed = TrainingKeys(Numbers(26), 5, 6, start=(2, 3))
    assert list(resumed) == third[3:] and len(resumed) == len(third)
    resumed.set_epoch(2)  # as Lightning does, after it has asked for the first batches
    assert list(resumed) == third[3:]
    resumed.set_epoch(3)
    keys.set_epoch(3)
    assert list(resumed) == list(keys) and len(list(keys)) == 4


@pytest.mark.parametrize("count", [1, 4, 13, 16, 17])
def test_evaluation_batches_are_dealt_out_once_and_whole(count):
    whole = [indices for _, indices in EvaluationKeys(count, 4)]
    assert [i for indices in whole for i in indices] == list(range(count))
    shares = [[i for _, i in EvaluationKeys(count, 4, 3, lambda rank=rank: rank)] for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    dealt = [share[step] for step in range(len(shares[0])) for share in shares]
    assert dealt[: len(whole)] == whole and not any(dealt[len(whole) :])


def test_workers_and_order_of_calls_leave_the_images_as_they_are(data):
    images = FolderImages(FreiHand(data, "training"))
    transform = CropTransform(32, AugmentConfig(), seed=1)
    runs = []
    for workers in (0, 2):
        keys = TrainingKeys(images, 1, 4, start=(2, 0))
        runs.append(list(loader(Batches(images, transform), keys, workers, pin=False)))
        torch.rand(7)
    assert len(runs[0]) == 2
    for one, two in zip(*runs, strict=True):
        assert one["name"] == two["name"] and one["name"][0].startswith("training/rgb/0000000")
        for key, value in one.items():
            assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
    # One image of a batch, alone, is what it is among others.
    _, indices = next(iter(TrainingKeys(images, 1, 4, start=(2, 0))))
    alone = Batches(images, transform)[2, indices[2:3]]
    assert torch.equal(alone["image"][0], runs[0][0]["image"][2])
    assert not torch.equal(Batches(images, transform)[3, indices[2:3]]["image"], alone["image"])
    assert Batches(images, transform)[0, []] == {}


def test_a_step_draws_by_seed_step_and_process():
    def drawn(*place):
        seed_step(*place)
        return torch.rand(4)

    assert torch.equal(drawn(1, 2, 3), drawn(1, 2, 3))
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(drawn(1, 2, 3), drawn(*other))


def test_each_step_of_a_run_is_seeded_by_its_number(data, tmp_path, monkeypatch):
    drawn = []

    def step(self, batch, index, step=HandTraining.training_step):
        drawn.append(torch.rand(1).item())
        torch.rand(int(drawn[-1] * 100))
        return step(self, batch, index)

    monkeypatch.setattr(HandTraining, "training_step", step)
    train(CONFIG, data, tmp_path, accelerator="cpu", progress=False)
    expected = []
    for number in range(2):
        seed_step(CONFIG.train.seed, number, 0)
        expected.append(torch.rand(1).item())
    assert drawn == expected


def test_the_next_readable_image_stands_in_for_a_damaged_one(damaged):
    images = FolderImages(FreiHand(damaged, "training"))
    batches = Batches(images, CropTransform(32, AugmentConfig()))
    batch = batches[0, [2, 3, 8]]
    assert [name[-5] for name in batch["name"]] == ["2", "5", "8"]
    assert len(batch["unreadable"]) == 2 and sum(batch["replaced"]) == 1
    assert all(
        f"{n}.jpg is not a readable image" in text
        for n, text in zip((3, 4), batch["unreadable"], strict=True)
    )
    assert torch.equal(batch["image"][1], batches[0, [5]]["image"][0])


def test_an_image_that_is_gone_is_unreadable(damaged):
    path = damaged / "training" / "rgb" / "00000006.jpg"
    path.unlink()
    path.symlink_to(damaged / "gone.jpg")
    images = FolderImages(FreiHand(damaged, "training"))
    batch = Batches(images, CropTransform(32))[0, [6]]
    assert batch["name"] == ["training/rgb/00000007.jpg"]
    assert batch["unreadable"] == [f"image: {path} does not exist"]


def test_a_folder_of_damaged_images_is_refused(damaged):
    for path in (damaged / "training" / "rgb").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"100 images in a row cannot be read, the last: .*\d\.jpg"):
        Batches(FolderImages(FreiHand(damaged, "training")), CropTransform(32))[0, [0]]


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_named_once_counted_and_do_not_end_a_run(damaged, tmp_path, caplog, workers):
    caplog.set_level(logging.WARNING, logger="pahm")
    config = CONFIG.override({"train.epochs": 2, "train.batch_size": 3, "train.workers": workers})
    train(config, damaged, tmp_path / "run", accelerator="cpu", progress=False)
    lines = [record.message for record in caplog.records if record.name == "pahm"]
    for name in ("00000003.jpg", "00000004.jpg"):
        assert sum(name in line for line in lines) == 1
    # Both are drawn in either epoch.
    assert [line for line in lines if "epoch" in line] == [
        f"epoch {epoch}: 2 unreadable images were replaced" for epoch in (0, 1)
    ]


def test_the_mean_hand_stands_for_a_damaged_evaluation_image(data, tmp_path, caplog):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "evaluation" / "rgb" / "00000001.jpg").write_bytes(b"")
    config = CONFIG.override({"train.export": "float32"})
    scores = train(config, folder, tmp_path / "run", accelerator="cpu", progress=False)
    curves = logged(tmp_path / "run")
    for name in ("pa_mpjpe", "mpjpe", "f5"):
        assert curves[f"eval/{name}"][0][1] == pytest.approx(scores[name], rel=1e-4)
    assert scores["images"] == 2
    (line,) = (text for text in caplog.messages if "00000001.jpg" in text)
    assert line.endswith(
        "readable image (its format is not known); in the scores the mean hand stands for it"
    )


def test_a_resumed_run_counts_what_was_replaced_before_the_stop(damaged, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, logger="pahm")
    config = CONFIG.override({"train.epochs": 1, "train.batch_size": 3, "train.save_every": 1})
    whole = HandTraining.training_step

    def step(module, batch, index):
        if index == 2:
            raise RuntimeError("stopped")
        return whole(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(HandTraining, "training_step", step)
        with pytest.raises(RuntimeError, match="stopped"):
            train(config, damaged, tmp_path, accelerator="cpu", progress=False)
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)["pahm_replaced"]
    train(config, damaged, tmp_path, accelerator="cpu", progress=False)
    assert before > 0
    assert caplog.messages[-1] == "epoch 0: 2 unreadable images were replaced"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_strict_ends_a_run_at_a_damaged_image(damaged, tmp_path, capsys, workers):
    changes = [f"--train.workers={workers}", "--train.epochs=1", "--train.batch-size=9"]
    changes += ["--model.backbone=test_resnet", "--model.pretrained=False", "--model.image-size=64"]
    changes += ["--preset=tiny", "--accelerator=cpu", "--strict"]
    assert main(["train", "--data", str(damaged), "--out", str(tmp_path / "run"), *changes]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pahm train:")]
    assert len(error) == 1 and "/training/rgb/0000000" in error[0] and "not a readable image" in error[0]
    assert not (tmp_path / "run" / "last.ckpt").exists()
