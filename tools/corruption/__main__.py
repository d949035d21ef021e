"""Damages inputs of every kind that the packages read, and counts what should never happen.

    python tools/corruption [--seed 0] [--cases 2500] [--jobs 2] [--only KIND ...] [--keep FOLDER]

Each case damages one file of a small valid input and reads it in a process of its own. The input must be
refused with one sentence, or be read. Where it is read, the result must be the undamaged one, or, for formats
without a digest, one that is plausible: finite numbers, indices in range, the right shapes, and nothing lost
without a word. Five things are counted, and a line is printed for each case in which one of them happened:

  crash       the process was ended by a signal
  hang        it took more than 30 seconds
  memory      it held more than 4 GB
  traceback   an error that the command line would not turn into a sentence
  nonsense    a result that is wrong without a word, or an error of more than one sentence

The exit code is 1 where a count is not 0. The same seed damages the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from damage import damage
from inputs import KINDS
from kind import Kind, Nonsense, prepare

SECONDS = 30
BYTES = 4 << 30
FAULTS = ("crash", "hang", "memory", "traceback", "nonsense")
LONGEST = 1000  # characters of a sentence


def outcome(kind: Kind, folder: Path, expected: object) -> tuple[str, str]:
    """The outcome of reading the damaged input in `folder`, and its message."""
    from pahm.cli import input_errors, sentence

    try:
        found = kind.read(folder)
        return kind.judge(found, expected), ""
    except Nonsense as error:
        return "nonsense", str(error)
    except MemoryError as error:
        return "memory", f"MemoryError {error}"
    except input_errors() as error:
        said = sentence(error, argparse.Namespace(command=kind.name))
        ugly = len(said) > LONGEST or not said or "Traceback" in said
        return (
            ("nonsense", f"an error of {len(said)} characters: {said[:200]}") if ugly else ("refused", said)
        )
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"


def in_a_process(kind: Kind, folder: Path, expected: object) -> tuple[str, str]:
    """`outcome` in a forked process; watches its exit, time and memory."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        # An allocation beyond the machine's memory fails here, before it harms other processes.
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * BYTES, size + 2 * BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.setsid()
        result = outcome(kind, folder, expected)
        os.write(writer, json.dumps(result).encode()[:60000])
        os._exit(0)
    os.close(writer)
    told, deadline = b"", time.monotonic() + SECONDS
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (part := os.read(reader, 65536)):
            break
        told += part
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        return "hang", f"more than {SECONDS} s"
    os.close(reader)
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name
    if not told:
        return "crash", f"ended with code {os.WEXITSTATUS(status)} and no result"
    if usage.ru_maxrss * 1024 > BYTES:
        return "memory", f"{usage.ru_maxrss >> 20} GB"
    return tuple(json.loads(told))


def run(kind: Kind, cases: int, seed: int, keep: Path | None) -> collections.Counter[str]:
    """Damage the input of a kind `cases` times; returns how often each outcome occurred."""
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        whole.mkdir()
        kind.make(whole)
        shutil.copytree(whole, Path(place, "first"))
        expected = kind.read(Path(place, "first"))
        files = kind.files(whole)
        for number in range(cases):
            draw = random.Random(f"{seed} {kind.name} {number}")
            folder = Path(place, "case")
            shutil.copytree(whole, folder)
            target = draw.choice(files).relative_to(whole)
            status = os.stat(folder / target)
            way, content = (
                kind.damage(folder / target, draw)
                if kind.damage
                else damage((folder / target).read_bytes(), draw, kind.text)
            )
            (folder / target).write_bytes(content)
            if draw.random() < 0.5:  # a flipped bit keeps the file's times, a copy changes them
                os.utime(folder / target, ns=(status.st_atime_ns, status.st_mtime_ns))
            result, words = in_a_process(kind, folder, expected)
            counts[result] += 1
            if result in FAULTS:
                print(f"{result}: {kind.name} case {number} ({way} in {target}): {words}", flush=True)
                if keep is not None:
                    shutil.copytree(folder, keep / f"{kind.name}-{number}", dirs_exist_ok=True)
            shutil.rmtree(folder)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2500, help="of all kinds together, about")
    parser.add_argument("--only", nargs="+", choices=[kind.name for kind in KINDS], metavar="KIND")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its share of the kinds")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of cases that went wrong")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.only is None or kind.name in options.only]
    total = sum(kind.weight for kind in KINDS)
    prepare()
    shares = [kinds[job :: options.jobs] for job in range(options.jobs)]
    workers = []
    for share in shares:
        reader, writer = os.pipe()
        worker = os.fork()
        if worker == 0:
            table = {
                k.name: run(k, round(options.cases * k.weight / total) or 1, options.seed, options.keep)
                for k in share
            }
            with open(writer, "w") as stream:
                json.dump(table, stream)
            os._exit(0)
        os.close(writer)
        workers.append((worker, reader))
    rows: dict[str, dict[str, int]] = {}
    failed = 0
    for worker, reader in workers:
        with open(reader) as stream:
            text = stream.read()
        failed |= os.waitpid(worker, 0)[1]
        rows |= json.loads(text) if text else {}
    if failed:
        print("a worker of the campaign itself failed", file=sys.stderr)
        return 1
    titles = ("refused", "same", "plausible", *FAULTS)
    print(f"{'input':22}{'cases':>7}" + "".join(f"{title:>11}" for title in titles))
    sums: collections.Counter[str] = collections.Counter()
    for name, counts in sorted(rows.items()):
        sums.update(counts)
        print(
            f"{name:22}{sum(counts.values()):7}" + "".join(f"{counts.get(title, 0):11}" for title in titles)
        )
    print(f"{'all':22}{sum(sums.values()):7}" + "".join(f"{sums[title]:11}" for title in titles))
    return int(any(sums[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
