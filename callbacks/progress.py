"""Progress of a run: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar, Timer
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from gpt2_pl.callbacks.run_summary import RunSummary

BAR_WIDTH = 20  # characters; the whole bar fits 80 columns
LINE_WIDTH = 98  # characters of output that is not a terminal
SHOWN = {"train/loss_step": "loss"}  # logged name -> name in the bar


class RunClock:
    """Estimates how long a run still takes.

    The estimate is linear in the part of the run that is done, validation included. It counts from where this process
    began, so that it is right for resumed runs too. Early stopping may end the run sooner.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._start_fraction = 0.0

    def start(self, trainer: Trainer) -> None:
        """Begin to measure."""
        self._start, self._start_fraction = time.monotonic(), fraction_done(trainer) or 0.0

    def seconds_left(self, trainer: Trainer) -> float | None:
        """Return the estimate in seconds, or None where it is not known yet or the run has no end."""
        limits = [timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
        left = [float(limit) for limit in limits if limit is not None]
        done = fraction_done(trainer)
        if done is not None and done > self._start_fraction:
            elapsed = time.monotonic() - self._start
            left.append(elapsed * (1.0 - done) / (done - self._start_fraction))
        return max(0.0, min(left)) if left else None


def fraction_done(trainer: Trainer) -> float | None:
    """Return the part of a run's training that is done, in [0, 1], or None if the run has no end."""
    epoch_loop = trainer.fit_loop.epoch_loop
    fractions = []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches and not math.isinf(batches):
        done = epoch_loop.batch_progress.current.completed
        whole = trainer.fit_loop.epoch_progress.current.completed
        fractions.append((whole * batches + (done if whole == trainer.current_epoch else 0)) / (epochs * batches))
    if trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    return min(1.0, max(fractions)) if fractions else None


def duration(seconds: float) -> str:
    """Return a duration for people: ``41 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _TimeColumn(ProgressColumn):
    """Elapsed time of the stage and time left of the whole run."""

    max_refresh = 0.5  # seconds

    def __init__(self, clock: RunClock, trainer: Trainer) -> None:
        super().__init__()
        self.clock, self.trainer = clock, trainer

    def render(self, task: Task) -> Text:
        """Render the column."""
        elapsed = task.finished_time if task.finished else task.elapsed
        left = self.clock.seconds_left(self.trainer) if self.trainer.state.fn == "fit" else task.time_remaining
        texts = ["-:--:--" if seconds is None else str(timedelta(seconds=int(seconds))) for seconds in (elapsed, left)]
        return Text(f"{texts[0]}, {texts[1]} left", style="dim")


class _BatchColumn(ProgressColumn):
    """Batches done and in all."""

    def render(self, task: Task) -> Text:
        """Render the column."""
        total = "?" if task.total is None or math.isinf(task.total) else str(int(task.total))
        return Text(f"{int(task.completed)}/{total}")


class RunProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with epochs counted from 1 and the time left of the whole run, in 80 columns."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = RunClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.clock.start(trainer)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return the columns."""
        description = TextColumn("[progress.description]{task.description}")
        return [description, BarColumn(bar_width=BAR_WIDTH), _BatchColumn(), _TimeColumn(self.clock, trainer)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return the metrics that are shown: the loss of the step."""
        metrics = super().get_metrics(trainer, pl_module)
        return {SHOWN.get(name, name): value for name, value in metrics.items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        total = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        return f"{f'Epoch {current_epoch + 1}{total}':{len(self.validation_description)}}"


def pack(start: str, parts: list[str], width: int = LINE_WIDTH) -> str:
    """Join parts by semicolons in as few lines of at most ``width`` characters as they take, later ones indented."""
    lines = [start + parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 3 > width:  # "; " and the next semicolon
            lines[-1] += ";"
            lines.append(f"  {part}")
        else:
            lines[-1] += f"; {part}"
    return "\n".join(lines)


class RunModelSummary(RichModelSummary):
    """Prints the modules that have parameters before training, and how many of these train."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print the table; metrics have no parameters, and operations are not counted before the model has run."""
        columns = dict(summary_data)
        table = Table()
        shown = [name for name in ("Name", "Type", "Params") if name in columns]
        for name in shown:
            table.add_column(name.lower(), justify="right" if name == "Params" else "left")
        for row in zip(*(columns[name] for name in shown), strict=True):
            if row[-1].strip() != "0":
                table.add_row(*row)
        console = get_console()
        console.print(table)
        share = f"{trainable_parameters:,} of {total_parameters:,} parameters train"
        console.print(f"{share}; the model occupies {model_size:.1f} MB", highlight=False)


class EpochLines(Callback):
    """Prints a line after every epoch, for output that is not a terminal: scores, seconds and the time left."""

    def __init__(self) -> None:
        self.clock = RunClock()
        self._epoch_start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.clock.start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_start = time.monotonic()

    @staticmethod
    def _epoch_scores(trainer: Trainer) -> Mapping[str, Any]:
        """The epoch's row of the table that ends the run, where it is kept; else what was logged last."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        rows = next((callback.epochs for callback in callbacks if isinstance(callback, RunSummary)), [])
        return rows[-1] if rows else trainer.callback_metrics

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line, on one process."""
        if not trainer.is_global_zero:
            return
        names = getattr(pl_module, "displayed_metrics", ("loss",))
        metrics = self._epoch_scores(trainer)
        scores = [
            f"{split} " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found)
            for split in ("train", "val")
            if (found := [(n, float(metrics[f"{split}/{n}"])) for n in names if f"{split}/{n}" in metrics])
        ]
        epochs = trainer.max_epochs
        total = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        left = self.clock.seconds_left(trainer)
        seconds = duration(time.monotonic() - self._epoch_start)
        remaining = "" if left is None or trainer.should_stop else f", {duration(left)} left"
        print(pack(f"epoch {trainer.current_epoch + 1}{total}: ", [*scores, f"{seconds}{remaining}"]), flush=True)
