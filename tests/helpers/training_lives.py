"""A training run in a process of its own, which may be killed at a chosen moment, and what it left behind."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pahm.train.losses
import pahm.train.trainer
from pahm.config import from_json
from pahm.train.run_folder import Place
from pahm.train.trainer import HandTraining, _trainer, evaluation_loader, train

CONTEXT = multiprocessing.get_context("forkserver")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def live(config, data, out, death, options, hold=False):
    """Train; `death` is None or (moment, number): before step `number` ("step"), after an epoch's evaluation
    and before its checkpoint ("border"), after its checkpoint ("saved"), inside the file of the checkpoint at
    step `number` ("write"), or before the export ("export"). hold: batch normalisation keeps its statistics.
    """
    torch.set_num_threads(1)
    # The server's children would start loader workers by a server of their own, which imports all anew.
    multiprocessing.set_start_method("fork", force=True)
    moment, number = death or (None, None)
    hooks = {name: getattr(HandTraining, name) for name in ("training_step", "on_train_epoch_end")}
    losses = []

    def training_step(self, batch, index):
        if moment == "step" and self.global_step == number:
            die()
        for layer in self.network.modules() if hold else ():
            layer.train(not isinstance(layer, torch.nn.BatchNorm2d))
        loss = hooks["training_step"](self, batch, index)
        losses.append((self.global_step, float(self.trainer.callback_metrics["loss"])))
        return loss

    def on_train_epoch_end(self):
        if moment == "border" and self.current_epoch == number:
            die()
        hooks["on_train_epoch_end"](self)

    def on_train_epoch_start(self):
        if moment == "saved" and self.current_epoch == number + 1:
            die()

    def save(checkpoint, stream, save=torch.save):
        if moment == "write" and checkpoint["global_step"] == number:
            save(checkpoint, stream)
            stream.flush()
            os.ftruncate(stream.fileno(), stream.tell() // 2)
            die()
        save(checkpoint, stream)

    def export(*arguments, **keywords):
        die()

    HandTraining.training_step = training_step
    HandTraining.on_train_epoch_end = on_train_epoch_end
    HandTraining.on_train_epoch_start = on_train_epoch_start
    torch.save = save
    if moment == "export":
        pahm.train.trainer.export = export
    train(from_json(config), data, out, accelerator="cpu", progress=False, **options)
    (Path(out) / f"losses{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(losses))


def start(config, data, out, death=None, hold=False, **options):
    CONTEXT.set_forkserver_preload(["pahm.train.trainer", "training_lives"])
    process = CONTEXT.Process(target=live, args=(config.to_json(), str(data), str(out), death, options, hold))
    process.start()
    return process


def finish(config, data, out, death=None, hold=False, **options):
    """The exit code of a run: 0, or -9 where it was killed."""
    process = start(config, data, out, death, hold, **options)
    process.join(300)
    return process.exitcode


def logged(out):
    """The (step, value) pairs of every curve that TensorBoard shows of a run."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def score(config, data, options):
    """The scores of a new network, as the evaluation within a run logs them, and this process's images."""
    config, names = from_json(config), []
    update = HandTraining.validation_step

    def validation_step(self, batch, index):
        names.extend(batch.get("name", []))
        update(self, batch, index)

    HandTraining.validation_step = validation_step
    torch.manual_seed(0)
    trainer = _trainer(config, Path(data), Place(), "cpu", options["devices"], 1, "auto", False)
    trainer.validate(HandTraining(config), evaluation_loader(config, Path(data), trainer), verbose=False)
    HandTraining.validation_step = update
    return {name: value.item() for name, value in trainer.callback_metrics.items()}, names


def spoil(config, data, out, options):
    """The error of a run in which the last process's first loss is not a number."""
    last = int(os.environ.get("RANK", "0")) == options["devices"] - 1
    whole = pahm.train.losses.edge_loss
    pahm.train.losses.edge_loss = lambda *arguments: whole(*arguments) * (float("nan") if last else 1.0)
    try:
        train(from_json(config), data, out, accelerator="cpu", progress=False, **options)
    except FloatingPointError as error:
        return str(error)
    finally:
        pahm.train.losses.edge_loss = whole


def refuse(config, data, out, options):
    """The error of a run with an image that cannot be read, which only one process meets."""
    try:
        train(from_json(config), data, out, accelerator="cpu", progress=False, strict=True, **options)
    except ValueError as error:
        return str(error)


def main(data, out, config):
    """What a process of torchrun does in `test_processes.py`."""
    out, text, rank = Path(out), Path(config).read_text(), os.environ["RANK"]
    options = {"devices": int(os.environ["WORLD_SIZE"])}
    found = {"scores": score(text, data, options)}
    train(from_json(text), data, out.with_name("plain"), accelerator="cpu", progress=False, **options)
    live(text, data, out, None, options, hold=True)
    found["error"] = spoil(text, data, out.with_name("spoilt"), options)
    found["refused"] = refuse(text, out.with_name("damaged"), out.with_name("strict"), options)
    out.with_name(f"found{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
