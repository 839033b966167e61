"""Killed and terminated processes, full disks, and non-finite losses."""

import json
import math
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, metrics, process, started, weights
from helpers import forked
from helpers.fault_injection import differences, outcome
from helpers.faults import QUICK, faults
from lightning.pytorch import Callback
from torch import nn

from gpt2_pl.callbacks.non_finite_loss import _format_message
from gpt2_pl.commands.lightning_cli import GPT2CLI
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.metrics import finite
from gpt2_pl.tasks import LanguageModel, SentimentClassifier

STEPS = [*QUICK, "--checkpoint_every_n_steps=3"]
STAGES = [*QUICK, "--early_stopping_patience=1", f"--config={ROOT}/configs/strategy/ulmfit.yaml"]


def test_fit_killed_once_per_kind_of_moment_resumes_to_the_same_result(tmp_path):
    """Kill the process once in each kind of step and while files are written and renamed, within stages and epochs."""
    kinds = ["training_step", "test_step", "in last.ckpt", "before metrics.json"]
    arguments = [*STAGES, "--checkpoint_every_n_steps=3", "--trainer.max_epochs=2"]
    cases = faults(tmp_path, len(kinds), 1, arguments, FAULT_KINDS=",".join(kinds))
    assert {case["killed"] for case in cases} == {-9}
    assert not [case for case in cases if case["went_on"] or case["wrong"]]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "arguments"), [(1, STEPS), (2, STAGES)], ids=["steps", "stages and patience"])
def test_fit_killed_at_any_moment_resumes_to_the_same_result(seed, arguments, tmp_path):
    """Kill the process at fifteen moments: in steps, validation and test, and while files are written and renamed."""
    cases = faults(tmp_path, 15, seed, arguments)
    assert {case["killed"] for case in cases} == {-9}
    assert not [case for case in cases if case["went_on"] or case["wrong"]]


def test_atomic_write_replaces_the_file_without_rewriting_it(tmp_path):
    for text in ("before", "after"):
        with atomic_write(tmp_path / "file") as file:
            file.write(text)
        if text == "before":
            os.link(tmp_path / "file", tmp_path / "reader")
    assert [(tmp_path / name).read_text() for name in ("file", "reader")] == ["after", "before"]


def test_fit_sigterm_in_a_step_resumes_to_the_same_result(tmp_path):
    """Send SIGTERM in a training step and in validation."""
    cases = faults(
        tmp_path,
        2,
        3,
        [*QUICK, "--trainer.max_epochs=2"],
        FAULT_SIGNAL="SIGTERM",
        FAULT_KINDS="training_step,validation_step",
    )
    assert {case["killed"] for case in cases} == {143}
    assert not [case for case in cases if case["went_on"] or case["wrong"]]


def test_fit_sigterm_saves_the_current_step_and_prints_the_resume_command(tmp_path):
    """The checkpoint contains the reached step, although checkpoints are otherwise written once per epoch."""
    code = (
        "import os, signal, sys; from gpt2_pl.tasks.classification import Classifier\n"
        "from gpt2_pl.commands import main\n"
        "step, n = Classifier.training_step, iter(range(1000))\n"
        "def end(task, batch, i):\n"
        "    if next(n) == 11: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(task, batch, i)\n"
        "Classifier.training_step = end; main(sys.argv[1:])"
    )
    (tmp_path / "end.py").write_text(code)
    done = forked.run([tmp_path / "end.py", "fit", *QUICK], cwd=tmp_path)
    assert done.returncode == 143
    run = tmp_path / "lightning_logs/quickstart/version_0"
    last = f"{run.relative_to(tmp_path)}/checkpoints/last.ckpt"
    command = f"gpt2-pl fit --config lightning_logs/quickstart/version_0/config.yaml --ckpt_path {last}"
    assert command in done.stderr
    assert torch.load(tmp_path / last, weights_only=True)["global_step"] == 12  # eight steps an epoch
    assert metrics(run)["status"] == "interrupted"


@pytest.fixture(scope="module")
def first_epoch(fitted):
    """The folder of a run of one epoch, in a working folder."""
    return fitted("fit", *QUICK, "--trainer.max_epochs=1").parents[2]


@pytest.fixture
def folder(first_epoch, run, tmp_path):
    shutil.copytree(first_epoch, tmp_path, dirs_exist_ok=True)
    return tmp_path / "lightning_logs/quickstart/version_0"


@pytest.fixture
def small_disk():
    """A function that limits the size of files to a number of bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_room(run, capsys, *args):
    """Run a command that fails on a full disk, and return its one line of error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("gpt2-pl: error: disk full while writing ")
    return line


def test_fit_disk_full_keeps_the_previous_checkpoint_and_resumes(folder, run, small_disk, capsys):
    """Files cannot grow to the size of a checkpoint: that of the first epoch is kept, and the run resumes from it."""
    checkpoint = folder / "checkpoints/last.ckpt"
    before, config = checkpoint.read_bytes(), (folder / "config.yaml").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small_disk(len(config) // 2)  # a resumed run writes its config.yaml again
    line = no_room(run, capsys, "fit", *QUICK, f"--ckpt_path={checkpoint}")
    assert "lightning_logs/quickstart/version_0/config.yaml" in line
    assert (folder / "config.yaml").read_bytes() == config
    small_disk(len(before) // 2)
    line = no_room(run, capsys, "fit", *QUICK, f"--ckpt_path={checkpoint}")
    assert "lightning_logs/quickstart/version_0/checkpoints/" in line
    assert checkpoint.read_bytes() == before
    assert {path.name for path in checkpoint.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert not list(folder.glob(".*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run("fit", *QUICK, f"--ckpt_path={checkpoint}")
    assert len(metrics(folder)["epochs"]) == 3


def test_export_disk_full_leaves_no_files(run, base, small_disk, capsys, tmp_path, data_flags):
    shared = ["fit", f"--config={ROOT}/configs/task/imdb.yaml", f"--model.base={base}", "--data.max_length=32",
              *data_flags, "--trainer.limit_train_batches=1", "--trainer.max_epochs=1"]  # fmt: skip
    whole = run(*shared, "--name=whole")
    lora = run(*shared, f"--config={ROOT}/configs/strategy/lora.yaml", "--name=lora")
    before = sorted(tmp_path.rglob("*"))
    for folder, kind, size in ((whole, "hf", 20_000), (lora, "peft", 2000)):  # the tokenizer's file has room
        small_disk(size)
        line = no_room(run, capsys, "export", folder, "--format", kind, "--out", tmp_path / "o")
        assert f"{tmp_path}/.o.part/" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_fit_disk_full_in_dataset_cache_is_named(ending, run, base, small_disk, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"sentence": f"a long film, the {i}th", "sentiment": i % 2} for i in range(2000)]
    file = tmp_path / f"rows.{ending}"
    if ending == "csv":
        file.write_text("sentence,sentiment\n" + "".join(f'"{row["sentence"]}",{row["sentiment"]}\n' for row in rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small_disk(3000)
    line = no_room(run, capsys, "fit", f"--config={ROOT}/configs/task/imdb.yaml", f"--model.base={base}",
                   f"--data.train_file={file}", "--data.max_length=32")  # fmt: skip
    assert str(tmp_path / "cache") in line


@pytest.mark.slow
def test_fit_equal_settings_give_bitwise_equal_runs(tmp_path):
    """Compare scores, predictions and weights of two runs in processes with different hash seeds."""
    found = []
    for name, begin in (("one", process), ("two", started)):
        (tmp_path / name).mkdir()
        done = begin(tmp_path / name, "fit", *QUICK, "--trainer.max_epochs=1", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(outcome(tmp_path / name))
    assert found[0][2]
    assert differences(*found) == []


class Poison(Callback):
    """Make the loss of one step NaN or infinite."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        at = trainer.global_step == self.step
        if at and not isinstance(pl_module.head.linear.bias, nn.Parameter):
            raise AssertionError
        self.kept = pl_module.head.linear.bias.detach().clone() if at else None
        if at:
            pl_module.head.linear.bias.data[0] = self.value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.kept is not None:
            pl_module.head.linear.bias.data.copy_(self.kept)
            self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.kept is not None:
            self.unchanged = all(torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True))


def test_message_of_a_non_finite_loss_has_the_numbers_of_rows_in_their_file():
    batch = {"row": torch.tensor([0, 2])}
    data = SimpleNamespace(row_number=lambda split, row: {"train": 10}[split] * row + 1, text=lambda split, row: "")
    trainer = SimpleNamespace(datamodule=data, current_epoch=0, global_step=0, callbacks=[], loggers=[])
    assert "rows 1, 21; no checkpoint was saved" in _format_message(trainer, math.nan, "step 1", batch)


def test_fit_non_finite_loss_stops_and_names_the_place(run, capsys, monkeypatch):
    poison(monkeypatch, Poison(10, torch.nan))
    with pytest.raises(SystemExit) as stop:
        run("fit", *QUICK)
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("gpt2-pl: error: the loss is ")
    assert "at epoch 2, step 11, rows " in line
    assert len(line.partition("rows ")[2].partition(";")[0].split(", ")) == 10
    assert "the last checkpoint is lightning_logs/quickstart/version_0/checkpoints/last.ckpt" in line
    assert "--on_non_finite_loss skip" in line
    folder = Path("lightning_logs/quickstart/version_0")
    assert metrics(folder)["status"] == "failed"
    assert all(t.isfinite().all() for t in weights(folder / "checkpoints/last.ckpt").values() if t.is_floating_point())


def test_fit_on_non_finite_loss_skip_omits_and_counts_the_step(run, monkeypatch):
    callback = Poison(10, torch.inf)
    poison(monkeypatch, callback)
    folder = run("fit", *QUICK, "--on_non_finite_loss=skip")
    assert callback.unchanged
    account = metrics(folder)
    assert account["skipped_steps"] == 1
    assert account["status"] == "finished"
    assert all(torch.tensor(value).isfinite() for epoch in account["epochs"] for value in epoch.values())


def poison(monkeypatch, callback):
    """Add a callback to the trainer of the command line."""
    instantiate = GPT2CLI._instantiate_trainer
    monkeypatch.setattr(GPT2CLI, "_instantiate_trainer", lambda cli, config, callbacks: instantiate(
        cli, config, [callback, *callbacks]))  # fmt: skip


def test_finite_keeps_non_finite_losses_in_validation_only(base):
    for task in (SentimentClassifier(base=str(base), num_classes=2), LanguageModel(base=str(base))):
        metric = task.metrics["val_metrics"]["loss"]
        metric.update(*finite(torch.tensor([1.0, torch.nan]), "val"))
        assert metric.compute().isnan()
        metric = task.metrics["train_metrics"]["loss"]
        metric.update(*finite(torch.tensor([1.0, torch.nan, torch.inf, 3.0]), "train"))
        assert metric.compute() == 2.0
