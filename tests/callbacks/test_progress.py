"""Progress: one line per epoch without a terminal, a bar of at most 80 columns with one."""

import math
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, metrics
from rich.console import Console

from gpt2_pl.callbacks import PredictionWriter
from gpt2_pl.callbacks.progress import EpochLines, RunClock, RunProgressBar, fraction_done
from gpt2_pl.callbacks.run_summary import RunSummary

QUICK = ["--config", ROOT / "configs/quickstart.yaml", "--data.n_train", "80", "--data.batch_size", "40"]


def fake_trainer(epochs=4, batches=10, whole=0, done=0, steps=-1, step=0, timers=()):
    progress = SimpleNamespace(current=SimpleNamespace(completed=done))
    epoch_progress = SimpleNamespace(current=SimpleNamespace(completed=whole))
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), epoch_progress=epoch_progress)
    return SimpleNamespace(
        fit_loop=fit_loop,
        num_training_batches=batches,
        max_epochs=epochs,
        max_steps=steps,
        global_step=step,
        current_epoch=whole,
        callbacks=list(timers),
    )


FRACTIONS = [
    ({"whole": 1, "done": 5}, 15 / 40),
    ({"whole": 4, "done": 0}, 1.0),
    ({"epochs": -1}, None),
    ({"epochs": None, "steps": 8, "step": 2}, 0.25),
    ({"whole": 0, "done": 5, "steps": 10, "step": 5}, 0.5),  # max_steps ends it first
    ({"batches": float("inf")}, None),
]


def test_fraction_done_of_limits_is_that_of_the_first_reached():
    for state, expected in FRACTIONS:
        assert fraction_done(fake_trainer(**state)) == expected, state


def test_run_clock_of_resumed_run_counts_from_its_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gpt2_pl.callbacks.progress.time.monotonic", lambda: now[0])
    clock = RunClock()
    clock.start(fake_trainer(whole=2))
    assert clock.seconds_left(fake_trainer(whole=2)) is None
    now[0] += 30.0  # one epoch of the two that are left
    assert clock.seconds_left(fake_trainer(whole=3)) == pytest.approx(30.0)
    assert clock.seconds_left(fake_trainer(whole=4)) == 0.0


def test_fit_without_terminal_prints_scores_of_an_epoch_in_short_lines(run, capsys):
    run("fit", *QUICK, "--trainer.max_epochs", "2")
    lines = capsys.readouterr().out.splitlines()
    found = [i for i, line in enumerate(lines) if line.startswith("epoch ")]
    assert [lines[i].partition(":")[0] for i in found] == ["epoch 1/2", "epoch 2/2"]
    number = r"\d\.\d{4}"
    scores = rf"loss {number}, accuracy {number}, macro f1 {number}"
    for i in found:
        assert re.fullmatch(rf"epoch ./2: train {scores}", lines[i]), lines[i]
        assert re.fullmatch(rf" {{10}} val   {scores}; took [\d:]+, [\d:]+ left", lines[i + 1]), lines[i + 1]
        assert max(map(len, lines[i : i + 2])) < 100
    assert "Gathered" not in "\n".join(lines)
    assert "FLOPs" not in "\n".join(lines)
    assert any(re.fullmatch(r"669,187 of 669,187 parameters train; the model occupies 2\.7 MB", line) for line in lines)


def test_progress_bar_on_terminal_counts_from_one_and_fits_80_columns():
    bar = RunProgressBar()
    trainer = fake_trainer(epochs=12, whole=11, done=133, batches=134)
    trainer.state = SimpleNamespace(fn="fit")
    trainer.sanity_checking, trainer.training = False, True
    trainer.progress_bar_callback, trainer.is_global_zero = bar, True
    bar._trainer = trainer
    bar._console_kwargs = {"width": 80, "force_terminal": True}
    bar._init_progress(trainer)
    assert bar.progress is not None
    try:
        bar.train_progress_bar_id = bar._add_task(134, bar._get_train_description(11))
        bar.progress.update(bar.train_progress_bar_id, completed=133)
        bar._metric_component.update({"loss": 0.123})
        console = Console(width=80, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(bar.progress.get_renderable())
        (line,) = console.export_text().rstrip("\n").splitlines()
    finally:
        bar._stop_progress()
    assert line.startswith("Epoch 12/12")
    assert "133/134" in line
    assert "left" in line
    assert line.rstrip().endswith("loss: 0.123")
    assert len(line) <= 80


def test_epoch_lines_on_other_process_prints_nothing(capsys):
    EpochLines().on_train_epoch_end(SimpleNamespace(is_global_zero=False), None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "interval", [pytest.param("val_check_interval=0.3", marks=pytest.mark.slow), "check_val_every_n_epoch=2"]
)
def test_epoch_lines_table_and_closing_scores_agree(interval, run, capsys):
    rows = ["--data.n_train=120", "--data.batch_size=20", "--trainer.max_epochs=3"]
    folder = run("fit", *QUICK[:2], *rows, f"--trainer.{interval}")
    out = capsys.readouterr().out
    epochs, closing = metrics(folder)["epochs"], metrics(folder)["scores"]
    shown = re.findall(r"^epoch (\d)/3: train [^;\n]*(?:\n +val [^;\n]*accuracy ([\d.]+))?", out, re.MULTILINE)
    expected = [f"{row['val/accuracy']:.4f}" if "val/accuracy" in row else "" for row in epochs]
    assert [accuracy for _, accuracy in shown] == expected
    (starred,) = re.findall(r"│ +(\d)\* │(.*)│", out)
    assert int(starred[0]) == closing["best_epoch"]
    assert starred[1].split("│")[3].strip() == f"{closing['val/accuracy']:.4f}"
    assert re.search(r"^val/accuracy +([\d.]+)", out, re.MULTILINE)[1] == max(filter(None, expected))


def test_run_summary_several_values_in_an_epoch_keep_best_number():
    for mode, values, best in (("min", [math.nan, 3.0, 2.0], 2.0), ("max", [math.nan, 0.1], 0.1)):
        summary, module = RunSummary(), SimpleNamespace(monitor="val/x", mode=mode)
        for value in values:
            summary._keep_better(module, {"val/x": value})
        assert summary._val_metrics == {"val/x": best}
        summary.epochs = [{"epoch": 1, "val/x": math.nan}, {"epoch": 2, "val/x": best}, {"epoch": 3}]
        assert summary.best_epoch(module)["epoch"] == 2


def test_run_summary_layer_table_leaves_out_layers_without_parameters():
    summary = RunSummary()
    counts = {"embeddings": 8, "head": 0}
    summary.layers = [
        {"layer": name, "parameters": n, "trainable": n, "peak_rates": [0.1]} for name, n in counts.items()
    ]
    assert list(summary.layer_table().columns[0].cells) == ["embeddings", "all"]


def test_prediction_writer_score_that_is_no_number_keeps_best_rows(monkeypatch):
    writer, module, written = PredictionWriter(), SimpleNamespace(monitor="val/x", mode="min"), []
    monkeypatch.setattr(writer, "_write", lambda *_: written.append(writer.best))
    for score in (5.0, math.nan, 3.0, math.nan, 4.0):
        trainer = SimpleNamespace(
            sanity_checking=False, state=SimpleNamespace(fn="fit"), callback_metrics={"val/x": score}
        )
        writer.on_validation_end(trainer, module)
    assert written == [5.0, 3.0]
