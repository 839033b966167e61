"""A program that ends runs by SIGKILL at chosen moments and lets them go on: do they end like one that was left alone?

    python faults.py FOLDER N [SEED] -- ARGUMENTS OF gpt2-pl fit

Moments are counted in a first, undisturbed run: training, validation and test steps, every piece of every file that is
written, and what lies right before and after its renaming. N of them are drawn, of all kinds or those that FAULT_KINDS
names; FAULT_SIGNAL is another signal than SIGKILL. It prints a line of JSON for each, with what was left behind.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch

from gpt2_pl.commands import main
from gpt2_pl.tasks import LanguageModel, SentimentClassifier
from gpt2_pl.tasks.classification import Classifier


class Moments:
    """Counts moments by kind, and ends the process at one of them."""

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at, self.counts = at, Counter()
        self.signal = signal.Signals[os.environ.get("FAULT_SIGNAL", "SIGKILL")]

    def reached(self, kind: str) -> None:
        self.counts[kind] += 1
        if (kind, self.counts[kind]) == self.at:
            os.kill(os.getpid(), self.signal)

    def install(self) -> None:
        open_, replace = Path.open, Path.replace
        moments = self

        class Slowly:
            """A file whose every piece reaches the disk in two halves."""

            def __init__(self, file, kind):
                self.file, self.kind = file, kind

            def write(self, data):
                half = len(data) // 2
                self.file.write(data[:half])
                self.file.flush()
                moments.reached(f"in {self.kind}")
                self.file.write(data[half:])
                return len(data)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                self.file.__enter__()
                return self

            def __exit__(self, *args):
                return self.file.__exit__(*args)

        def kind_of(path):
            return path.name.split(".")[1] + Path(path.name).suffixes[0] if path.name.endswith(".part") else path.name

        def open_slowly(path, mode="r", *args, **kwargs):
            file = open_(path, mode, *args, **kwargs)
            return Slowly(file, kind_of(path)) if "w" in mode else file

        def replace_slowly(path, target):
            moments.reached(f"before {Path(target).name}")
            found = replace(path, target)
            moments.reached(f"after {Path(target).name}")
            return found

        Path.open, Path.replace = open_slowly, replace_slowly
        for task, name in ((Classifier, "training_step"), (Classifier, "validation_step"), (Classifier, "test_step"),
                           (LanguageModel, "training_step")):  # fmt: skip
            setattr(task, name, self._counted(getattr(task, name), name))

    def _counted(self, step, kind):
        def counted(task, batch, batch_idx):
            self.reached(f"before {kind}")
            found = step(task, batch, batch_idx)
            self.reached(kind)
            return found

        return counted


def fit(folder: Path, arguments: list[str], at: tuple[str, int] | None = None, report: Path | None = None) -> int:
    """Fit in a process of its own, forked from this one; gives its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            with open(folder / "log", "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            moments = Moments(at)
            moments.install()
            main(["fit", *arguments, "--trainer.enable_progress_bar=false"])
            if report is not None:
                report.write_text(json.dumps(moments.counts))
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path):
    """All that two equal runs share: scores, weights, what was said of every row."""
    (run,) = (folder / "lightning_logs").glob("*/*/")
    account = json.loads((run / "metrics.json").read_text())
    for epoch in account["epochs"]:  # training scores count the rows since resuming
        for name in [name for name in epoch if name.startswith("train/")]:
            del epoch[name]
    kept = {name: account[name] for name in ("status", "scores", "epochs", "parameters", "steps")}
    states = {
        name: torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"] for name in ("best", "last")
    }
    files = {path.name: path.read_text() for path in run.glob("predictions_*.csv")}
    parts = [str(path) for path in run.rglob("*.part")]
    return kept, states, files, parts


def differences(one, two) -> list[str]:
    """In what two outcomes differ."""
    found = [name for name in one[0] if one[0][name] != two[0][name]]
    for checkpoint in one[1]:
        a, b = one[1][checkpoint], two[1][checkpoint]
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            found.append(f"weights of {checkpoint}.ckpt")
    found += [name for name in one[2] if one[2][name] != two[2].get(name)]
    return found + two[3]


def go_on(folder: Path, arguments: list[str]) -> int:
    """Do what a user does: go on from the last checkpoint, or where there is none begin again."""
    (run,) = list((folder / "lightning_logs").glob("*/*/")) or [None]
    last = None if run is None else run / "checkpoints/last.ckpt"
    if last is None or not last.is_file():
        shutil.rmtree(folder / "lightning_logs", ignore_errors=True)
        return fit(folder, arguments)
    return fit(folder, [*arguments, f"--ckpt_path={last.relative_to(folder)}"])


def cases(counts: dict[str, int], n: int, seed: int) -> list[tuple[str, int]]:
    """Moments of all kinds in turn, of each kind drawn without repetition."""
    generator = random.Random(seed)
    by_kind = {kind: generator.sample(range(1, count + 1), count) for kind, count in sorted(counts.items())}
    found = []
    while len(found) < n and any(by_kind.values()):
        for kind in generator.sample(sorted(by_kind), len(by_kind)):
            if by_kind[kind] and len(found) < n:
                found.append((kind, by_kind[kind].pop()))
    return found


if __name__ == "__main__":
    split = sys.argv.index("--")
    folder, n, seed = Path(sys.argv[1]), int(sys.argv[2]), int((sys.argv[3:split] or ["0"])[0])
    arguments = sys.argv[split + 1 :]
    torch.set_num_threads(1)
    assert SentimentClassifier  # everything is imported before the first fork
    whole = folder / "whole"
    whole.mkdir(parents=True)
    assert fit(whole, arguments, report=folder / "counts.json") == 0, (whole / "log").read_text()[-3000:]
    expected = outcome(whole)
    counts = json.loads((folder / "counts.json").read_text())
    if kinds := os.environ.get("FAULT_KINDS"):
        counts = {kind: counts[kind] for kind in kinds.split(",")}
    for i, at in enumerate(cases(counts, n, seed)):
        place = folder / str(i)
        place.mkdir()
        killed = fit(place, arguments, at)
        said = [line for line in (place / "log").read_text().splitlines() if line.startswith(("gpt2-pl:", "Traceback"))]
        left = sorted(path.name for path in place.rglob(".*"))
        status = go_on(place, arguments)
        wrong = differences(expected, outcome(place)) if status == 0 else [(place / "log").read_text()[-2000:]]
        print(json.dumps({"at": at, "killed": killed, "said": said, "left": left, "went_on": status, "wrong": wrong}))
        sys.stdout.flush()
        shutil.rmtree(place)
