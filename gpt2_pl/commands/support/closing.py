"""End of a command that uses a trainer: a validation that a resumed run lacks, and the final output."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from gpt2_pl.callbacks import PredictionWriter, ResumableModelCheckpoint, RunSummary, run_folder
from gpt2_pl.commands.support.process import program
from gpt2_pl.commands.support.terminal import wrapped
from gpt2_pl.errors import printable
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.tasks.averaging import blocks_resuming
from gpt2_pl.tasks.protocols import NumberPredictor, TextClassifier, TextGenerator
from gpt2_pl.utils.trainer import callbacks_of, find_callbacks


def resume_advice(trainer: Trainer, folder: Path) -> str:
    """Return how to resume an interrupted run, as the end of a message."""
    last = Path(folder, "checkpoints", "last.ckpt")
    if not last.is_file():
        return " before the first checkpoint"
    if blocks_resuming(trainer):
        return "; it cannot be resumed, because StochasticWeightAveraging has begun to average"
    command = shlex.join([*program(), "fit", "--config", f"{folder}/config.yaml", "--ckpt_path", str(last)])
    return f"; resume it with {printable(command)}"


def validate_final_weights(
    trainer: Trainer,
    module: LightningModule,
    datamodule: Any,
    summary: RunSummary,
    best: ResumableModelCheckpoint | None,
) -> None:
    """Validate a resumed run that SIGTERM had ended between its last step and the validation that follows.

    Such a run has nothing left to train, so Lightning neither validates it nor saves a best checkpoint.

    Args:
        trainer: the trainer, after ``fit``.
        module: the module with the weights of ``last.ckpt``.
        datamodule: its data.
        summary: the record of the run.
        best: the callback of the best checkpoint; None if nothing is monitored.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    number = epochs.started
    row = next((row for row in summary.epochs if row["epoch"] == number), {"epoch": number})
    is_scored = any(name.startswith("val/") for name in row)
    if summary.has_trained or not number or is_scored or best is None or best.monitor is None:
        return
    source = Path(str(trainer.ckpt_path))
    for writer in find_callbacks(trainer, PredictionWriter):
        writer.keeps_best = True
    trainer.validate(module, datamodule, verbose=False)
    row.update({name: value for name, value in summary.scores.items() if name.startswith("val/")})
    summary.epochs, summary.scores = [*(one for one in summary.epochs if one["epoch"] != number), row], {}
    score = trainer.callback_metrics[best.monitor]
    target = Path(str(best.dirpath), f"{best.filename}.ckpt")
    is_better = torch.lt if best.mode == "min" else torch.gt
    if best.best_model_score is None or is_better(score, best.best_model_score):
        if trainer.is_global_zero:
            with source.open("rb") as weights, atomic_write(target, "wb") as file:
                shutil.copyfileobj(weights, file)
        trainer.strategy.barrier()
        best.best_model_path, best.best_model_score = str(target), score
    summary.on_train_end(trainer, module)


def score_untrained(trainer: Trainer, module: LightningModule, datamodule: Any, can_test: bool) -> None:
    """Evaluate a model that needs no training on the validation set and, if there is one, on the test set."""
    trainer.validate(module, datamodule, verbose=False)
    if can_test:
        trainer.test(module, datamodule, verbose=False)


def early_end(trainer: Trainer, has_trained: bool) -> str:
    """Return the reason why training had fewer epochs than requested, as a new line, or an empty string."""
    callbacks = callbacks_of(trainer)
    stopped = (one for one in callbacks if isinstance(one, EarlyStopping) and one.wait_count >= one.patience)
    untrained = "" if has_trained else "nothing was left to train: "
    if (early := next(stopped, None)) is not None:
        times = f"{early.wait_count} validation{'s' if early.wait_count > 1 else ''}"
        return f"\n  {untrained}stopped early, {early.monitor} has not improved in {times}"
    if untrained:
        return f"\n  {untrained}the checkpoint is at or beyond trainer.max_epochs or trainer.max_steps"
    return ""


def print_report(
    trainer: Trainer,
    module: LightningModule,
    summary: RunSummary,
    command: str,
    can_test: bool,
    note: str,
) -> None:
    """Print tables and final scores, the folder of the run, and commands that use it.

    Args:
        trainer: after the command.
        module: the task.
        summary: the scores.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        can_test: whether the data have a test set.
        note: end of the line that reports the end of the command.
    """
    if not trainer.is_global_zero:
        return
    from rich.console import Console

    console, folder = Console(), run_folder(trainer)
    if summary.epochs:
        console.print(summary.table(module))
        console.print(summary.layer_table())
    for name, value in summary.final_scores(module).items():
        if "/" in name:
            console.print(f"{printable(name):16} {value:.4f}", markup=False)
    if folder is not None:
        _print_folder(trainer, module, folder, command, can_test, note)
    elif trainer.logger is None:
        console.print(f"\n{command} finished; trainer.logger is false: there is no run folder")


def _print_folder(
    trainer: Trainer, module: LightningModule, folder: Path, command: str, can_test: bool, note: str
) -> None:
    names = {re.sub(r"^events\.out\.tfevents\..+", "events.out.*", path.name) for path in folder.iterdir()}
    files = ", ".join(sorted(name for name in names if not name.startswith(".")))
    for line in printable(f"\n{command} finished: {folder}{note}\n  {files}", keep="\n").split("\n"):
        print(wrapped(line, sys.stdout))
    checkpoints = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    if (best := next(filter(Path.is_file, checkpoints), None)) is not None:
        print(f"Checkpoint:   {best.stat().st_size / 1e6:.1f} MB")
        again = [*program(), "test" if can_test else "validate", "--config", f"{folder}/config.yaml"]
        _print_command("Evaluate:     ", shlex.join([*again, "--ckpt_path", str(best)]))
        use = ["generate", str(folder), "--prompt"] if isinstance(module, TextGenerator) else []
        use = ["classify", str(folder), "--text"] if isinstance(module, TextClassifier | NumberPredictor) else use
        if use:
            _print_command("Use:          ", f"{shlex.join([*program(), *use])} TEXT")
    if command == "predict":
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _print_command("TensorBoard:  ", shlex.join(["tensorboard", "--logdir", str(logger.save_dir)]))


def _print_command(title: str, command: str) -> None:
    """Print a command, with backslashes at the ends of its lines if it is too long for the terminal."""
    text = f"{title}{printable(command)}"
    print(text if "'" in command else wrapped(text, sys.stdout, end=" \\"))  # a quoted blank must not be broken
