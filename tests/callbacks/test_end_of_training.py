"""End of training: final validation and test, and exact resumption."""

import math

import pytest
import torch
from conftest import metrics
from helpers.refusals import refused
from helpers.stops import STOP, TINY, same, state
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop

from gpt2_pl.commands import main
from gpt2_pl.errors import InputError
from gpt2_pl.optim import LinearWithWarmup
from gpt2_pl.tasks import SentimentClassifier

ENDS = {
    "max_steps": ["--trainer.max_steps=8"],
    "max_steps with patience": ["--trainer.max_steps=1", "--early_stopping_patience=1"],
    "check_val_every_n_epoch": ["--trainer.check_val_every_n_epoch=5"],
    "interval beyond the end": ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=500"],
    "interval with a remainder": ["--trainer.val_check_interval=4"],
    "time interval": ["--trainer.val_check_interval=01:00:00:00"],
    "max_time": ["--trainer.max_time=00:00:00:00", "--trainer.min_epochs=1", "--trainer.check_val_every_n_epoch=2"],
    "endless": ["--trainer.max_epochs=-1", "--trainer.max_steps=7"],
}  # fmt: skip


@pytest.fixture
def validated(monkeypatch):
    """The optimizer steps after which fit validated."""
    steps = []
    loop = _EvaluationLoop.run

    def watched(self):
        if self.trainer.state.fn == "fit" and self.trainer.validating:
            steps.append(self.trainer.global_step)
        return loop(self)

    monkeypatch.setattr(_EvaluationLoop, "run", watched)
    return steps


BRIEF = ("max_steps", "interval with a remainder", "max_time")


@pytest.mark.parametrize("end", [
    pytest.param(end, marks=[] if name in BRIEF else pytest.mark.slow, id=name) for name, end in ENDS.items()
])  # fmt: skip
def test_fit_ending_between_validations_validates_and_tests(end, run, validated):
    folder = run(*TINY, *end)
    account = metrics(folder)
    last = account["epochs"][-1]
    assert account["status"] == "finished"
    assert validated[-1] == account["steps"]
    assert "val/accuracy" in last
    assert {"val/accuracy", "test/accuracy", "best_epoch"} <= account["scores"].keys()
    assert (folder / "checkpoints/best.ckpt").is_file()
    assert (folder / "predictions_val.csv").is_file()
    if end in (ENDS["max_steps"], ENDS["check_val_every_n_epoch"]):
        scored = run("validate", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/last.ckpt")
        assert metrics(scored)["scores"]["val/loss"] == pytest.approx(last["val/loss"], abs=1e-6)


@pytest.mark.parametrize("end", [["--trainer.max_steps=12"], ["--trainer.fast_dev_run=true"]], ids=str)
def test_fit_ending_at_a_validation_does_not_validate_twice(end, run, validated):
    main([*TINY, *end, "--trainer.enable_progress_bar=false"])
    assert len(set(validated)) == len(validated) > 0


CONTINUED = {
    "second epoch": (["--trainer.max_steps=9"], []),
    "accumulated": (["--trainer.max_steps=2"], ["--trainer.accumulate_grad_batches=2"]),
    "at a validation": (["--trainer.max_steps=4"], ["--trainer.val_check_interval=2"]),
    "before a validation": (["--trainer.max_steps=3"], ["--trainer.val_check_interval=2"]),
    "stopped, several rates": (
        [STOP],
        [
            "--model.schedule={class_path: gpt2_pl.optim.CosineWithWarmup, init_args: {warmup: 0.3}}",
            "--trainer.callbacks=[{class_path: gpt2_pl.callbacks.DiscriminativeLR, init_args: {decay: 0.7}}]",
        ],
    ),
    "stopped between steps": ([STOP], ["--trainer.accumulate_grad_batches=4"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def wholes():
    """Checkpoints and rows of runs that were not stopped, by their settings."""
    return {}


QUICK = ("accumulated", "before a validation", "stopped, several rates")
ENDED = [
    pytest.param(*case, marks=[] if name in QUICK else pytest.mark.slow, id=name) for name, case in CONTINUED.items()
]


@pytest.mark.parametrize(("end", "settings"), ENDED)
def test_fit_ended_within_epoch_resumes_bitwise(end, settings, run, wholes):
    if str(settings) not in wholes:
        whole = run(*TINY, *settings, "--name=whole")
        wholes[str(settings)] = state(whole), metrics(whole)["epochs"]
    expected, rows = wholes[str(settings)]
    ended = run(*TINY, *settings, *end, "--name=ended")
    n_ended = metrics(ended)["steps"]
    resumed = run(*TINY, *settings, f"--ckpt_path={ended}/checkpoints/last.ckpt")
    assert resumed == ended
    assert 0 < n_ended < metrics(resumed)["steps"]
    found = state(resumed)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(expected[key], found[key]), key
    loops = [content["loops"]["fit_loop"] for content in (expected, found)]
    for key in ("epoch_progress", "epoch_loop.state_dict", "epoch_loop.automatic_optimization.optim_progress"):
        assert same(loops[0][key], loops[1][key]), key
    assert [row["epoch"] for row in metrics(resumed)["epochs"]] == [1, 2]
    if "--trainer.val_check_interval=2" not in settings:  # else a row holds the best of several validations
        assert metrics(resumed)["epochs"][1]["val/loss"] == rows[1]["val/loss"]


def test_fit_without_validation_tests_the_last_checkpoint(run, capsys):
    folder = run(*TINY, "--trainer.limit_val_batches=0")
    account = metrics(folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert account["scores"].keys() >= {"test/accuracy"}
    assert "best_epoch" not in account["scores"]
    printed = capsys.readouterr()
    assert "trainer.limit_val_batches is 0: last.ckpt is tested" in printed.err
    assert "/checkpoints/last.ckpt" in printed.out.split("Evaluate:")[1]
    scored = run("test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert metrics(scored)["scores"]["test/accuracy"] == account["scores"]["test/accuracy"]


class Sigterm(Callback):
    """Simulate SIGTERM in the last step."""

    def on_train_batch_end(self, trainer, *_):
        trainer._signal_connector.received_sigterm = trainer.global_step == 4


def test_fit_sigterm_in_last_step_exits_with_status_143_and_prints_the_resume_command(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*TINY, "--trainer.max_steps=4", "--trainer.callbacks+=test_end_of_training.Sigterm")
    assert ended.value.code == 143
    folder = tmp_path / "lightning_logs/quickstart/version_0"
    assert metrics(folder)["status"] == "interrupted"
    assert state(folder)["global_step"] == 4
    assert f"--ckpt_path {folder.relative_to(tmp_path)}/checkpoints/last.ckpt" in capsys.readouterr().err


def test_fit_sigterm_in_last_step_resumed_is_validated_and_tested_as_if_not_stopped(run, tmp_path):
    settings = [*TINY, "--trainer.max_steps=4"]
    with pytest.raises(SystemExit):
        run(*settings, "--trainer.callbacks+=test_end_of_training.Sigterm")
    folder = tmp_path / "lightning_logs/quickstart/version_0"
    assert "val/loss" not in metrics(folder)["epochs"][-1]
    resumed = run(*settings, f"--ckpt_path={folder}/checkpoints/last.ckpt")
    expected = run(*settings)
    assert resumed == folder != expected
    account, other = metrics(resumed), metrics(expected)
    assert account["status"] == "finished"
    assert account["scores"] == other["scores"]
    assert [row["val/loss"] for row in account["epochs"]] == [row["val/loss"] for row in other["epochs"]]
    weights = [torch.load(f / "checkpoints/best.ckpt", weights_only=True)["state_dict"] for f in (resumed, expected)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    rows = [(f / "predictions_val.csv").read_text() for f in (resumed, expected)]
    assert rows[0] == rows[1]


def test_fit_resumed_after_own_early_stopping_trains_no_further(run):
    stop = "{class_path: EarlyStopping, init_args: {monitor: val/accuracy, mode: max, patience: 1}}"
    settings = [*TINY, "--trainer.max_epochs=6", "--model.optimizer.init_args.lr=0.0", f"--trainer.callbacks=[{stop}]"]
    folder = run(*settings)
    expected = metrics(folder)
    assert len(expected["epochs"]) == 2
    resumed = run(*settings, f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert metrics(resumed)["epochs"] == expected["epochs"]


def test_fit_resumed_with_longer_patience_uses_new_patience(run):
    settings = [*TINY, "--trainer.max_epochs=4", "--model.optimizer.init_args.lr=0.0"]
    folder = run(*settings, "--early_stopping_patience=1")
    assert len(metrics(folder)["epochs"]) == 2
    resumed = run(*settings, "--early_stopping_patience=2", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert len(metrics(resumed)["epochs"]) == 3


class Rates(Callback):
    """Record the number and the learning rate of every step."""

    seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize(
    ("schedule", "factor", "stopped_at"),
    [
        ("LinearWithWarmup", lambda step, total: (step + 1) / 3 if step < 2 else 1 - (step - 2) / (total - 2), [STOP]),
        (
            "CosineWithWarmup",
            lambda s, total: (s + 1) / 3 if s < 2 else 0.5 + 0.5 * math.cos(math.pi * (s - 2) / (total - 2)),
            [],
        ),
    ],
    ids=["linear, unfinished", "cosine, finished"],
)
def test_fit_resumed_with_more_epochs_uses_schedule_of_new_length(schedule, factor, stopped_at, run):
    """Extend a run of two epochs to four: no step has the rate 0 with which two epochs end."""
    schedule = f"--model.schedule={{class_path: gpt2_pl.optim.{schedule}, init_args: {{warmup: 2}}}}"
    folder = run(*TINY, schedule, *stopped_at)
    n_done = metrics(folder)["steps"]
    Rates.seen.clear()
    rates = "--trainer.callbacks=[{class_path: test_end_of_training.Rates}]"
    longer = [*TINY, schedule, rates, "--trainer.max_epochs=4"]
    run(*longer, f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert [step for step, _ in Rates.seen] == list(range(n_done, 24))
    for step, rate in Rates.seen:
        assert rate == pytest.approx(1e-3 * factor(step, 24), rel=1e-12)


ENDLESS = ["--trainer.max_time=00:00:00:00", "--trainer.min_epochs=2"]


@pytest.mark.parametrize(("epochs", "warmup"), [("-1", "0"), ("null", "4")])
def test_fit_without_length_trains_at_constant_rate(warmup, epochs, run):
    Rates.seen.clear()
    folder = run(*TINY, *ENDLESS, f"--trainer.max_epochs={epochs}", f"--model.schedule.init_args.warmup={warmup}",
                 "--trainer.callbacks=[{class_path: test_end_of_training.Rates}]")  # fmt: skip
    assert metrics(folder)["steps"] == 12
    expected = [1e-3 * min(1.0, (step + 1) / (int(warmup) + 1)) for step in range(12)]
    assert [rate for _, rate in Rates.seen] == pytest.approx(expected, rel=1e-12)


DECAYING = [
    ("gpt2_pl.optim.LinearWithWarmup", "-1"),
    ("gpt2_pl.optim.CosineWithWarmup", "null"),
    ("gpt2_pl.optim.SlantedTriangular", "-1"),
    ("{class_path: gpt2_pl.optim.ConstantWithWarmup, init_args: {warmup: 0.1}}", "null"),
]


def test_fit_decaying_schedule_without_length_is_refused(run, capsys):
    for schedule, epochs in DECAYING:
        line = refused(run, capsys, *TINY, *ENDLESS, f"--trainer.max_epochs={epochs}", f"--model.schedule={schedule}")
        assert "trainer.max_epochs or trainer.max_steps" in line, schedule


def test_task_decaying_schedule_with_iterable_dataset_is_refused(base):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ()

    task = SentimentClassifier(base=str(base), num_classes=2, schedule=LinearWithWarmup())
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(InputError, match=r"max_steps .*Linear"):
        trainer.fit(task, torch.utils.data.DataLoader(Stream()))


def test_fit_stopped_early_prints_reason_and_resumed_prints_nothing_left(run, capsys):
    folder = run(*TINY, "--trainer.max_epochs=9", "--early_stopping_patience=1", "--model.optimizer.init_args.lr=0")
    assert metrics(folder)["steps"] == 12
    assert "stopped early, val/accuracy has not improved in 1 validation\n" in capsys.readouterr().out
    again = ["fit", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/last.ckpt"]
    run(*again)
    assert "nothing was left to train: stopped early, val/accuracy" in capsys.readouterr().out
    assert (metrics(folder)["steps"], len(metrics(folder)["epochs"])) == (12, 2)


def test_fit_resumed_finished_run_prints_nothing_left(run, capsys):
    folder = run(*TINY)
    assert "nothing was left" not in capsys.readouterr().out
    run("fit", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/last.ckpt")
    assert "nothing was left to train: the checkpoint is at or beyond trainer.max_epochs" in capsys.readouterr().out


class Drop(Callback):
    """Spoil the weights after the first epoch, so that its validation stays the best."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.zero_()


def test_fit_sigterm_in_last_step_resumed_with_worse_weights_keeps_the_best(run, tmp_path):
    settings = [*TINY, "--trainer.max_steps=4", "--data.n_train=48", "--trainer.callbacks+=test_end_of_training.Drop"]
    with pytest.raises(SystemExit):
        run(*settings, "--trainer.callbacks+=test_end_of_training.Sigterm")
    folder = tmp_path / "lightning_logs/quickstart/version_0"
    rows, best = ((folder / name).read_bytes() for name in ("predictions_val.csv", "checkpoints/best.ckpt"))
    resumed = run(*settings, f"--ckpt_path={folder}/checkpoints/last.ckpt")
    account = metrics(resumed)
    assert account["status"] == "finished"
    assert account["scores"]["best_epoch"] == 1
    assert [row["epoch"] for row in account["epochs"]] == [1, 2]
    assert account["epochs"][1]["val/accuracy"] <= account["epochs"][0]["val/accuracy"]
    assert rows == (folder / "predictions_val.csv").read_bytes()
    assert best == (folder / "checkpoints/best.ckpt").read_bytes()
