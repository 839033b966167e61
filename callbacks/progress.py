"""Progress of a run: a bar on a terminal, otherwise lines after each epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Task as BarTask
from rich.table import Column, Table
from rich.text import Text

from gpt2_pl.callbacks.run_summary import RunSummary
from gpt2_pl.tasks.base import Task
from gpt2_pl.utils.trainer import find_callbacks

_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # the trainer's
MIN_UPDATE_INTERVAL = 0.1  # seconds between two updates of the bar in training
BAR_WIDTH = 20  # characters; all columns of the bar then fit 80 characters


class RunClock:
    """Estimator of the remaining time of a run.

    The estimate is linear in the fraction of the run that is done, and includes validation. It is measured from the
    start of this process, so that it also holds for resumed runs. Early stopping may end the run sooner.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._start_fraction = 0.0

    def start(self, trainer: Trainer) -> None:
        """Start the measurement."""
        self._start, self._start_fraction = time.monotonic(), fraction_done(trainer) or 0.0

    def seconds_left(self, trainer: Trainer) -> float | None:
        """Return the estimate in seconds, or None if it is not known yet or the run is unbounded."""
        limits = [timer.time_remaining() for timer in find_callbacks(trainer, Timer)]
        left = [limit for limit in limits if limit is not None]
        done = fraction_done(trainer)
        if done is not None and done > self._start_fraction:
            elapsed = time.monotonic() - self._start
            left.append(elapsed * (1.0 - done) / (done - self._start_fraction))
        return max(0.0, min(left)) if left else None


def epoch_number(epoch: int, trainer: Trainer) -> str:
    """Format the number of an epoch, counted from 0, for display: ``1/3``, or ``1`` if the run is unbounded."""
    epochs = trainer.max_epochs or 0
    return f"{epoch + 1}/{epochs}" if epochs > 0 else f"{epoch + 1}"


def fraction_done(trainer: Trainer) -> float | None:
    """Return the fraction of a run's training that is done, in [0, 1], or None if the run is unbounded."""
    fractions = []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    if epochs > 0 and 0 < batches < math.inf:
        batches_done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        fractions.append((trainer.current_epoch * batches + batches_done) / (epochs * batches))
    if trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    return min(1.0, max(fractions)) if fractions else None


class _TimeColumn(ProgressColumn):
    """Column of the elapsed time of the stage and the remaining time of the run."""

    max_refresh = 0.5  # seconds

    def __init__(self, clock: RunClock, trainer: Trainer) -> None:
        super().__init__()
        self.clock, self.trainer = clock, trainer

    def render(self, task: BarTask) -> Text:
        """Render the column."""
        elapsed = task.finished_time if task.finished else task.elapsed
        left = self.clock.seconds_left(self.trainer) if self.trainer.state.fn == "fit" else task.time_remaining
        texts = ["-:--:--" if seconds is None else str(timedelta(seconds=int(seconds))) for seconds in (elapsed, left)]
        return Text(f"{texts[0]}, {texts[1]} left", style="dim")


class RunProgressBar(RichProgressBar):
    """Rich progress bar in 80 columns, with epochs counted from 1 and the remaining time of the run.

    Messages of the trainer are printed above the bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = RunClock()
        self._updated = 0.0  # when the bar was updated last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Direct the trainer's messages to the console of the bar."""
        super().setup(trainer, pl_module, stage)
        _LOG.addFilter(self._print_above)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the bar."""
        _LOG.removeFilter(self._print_above)
        super().teardown(trainer, pl_module, stage)

    def _print_above(self, record: logging.LogRecord) -> bool:
        """Print a message above the bar while there is one; return whether it remains to be logged."""
        if self.progress is None or not self.progress.live.is_started:
            return True
        self.progress.console.print(record.getMessage(), markup=False, highlight=False)
        return False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.clock.start(trainer)

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return the columns."""
        description = TextColumn("[progress.description]{task.description}")
        batches, time_left = BatchesProcessedColumn(style=""), _TimeColumn(self.clock, trainer)
        return [description, BarColumn(bar_width=BAR_WIDTH), batches, time_left]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, at most ten times a second: it takes time, and waits for the loss of the step."""
        now = time.monotonic()
        if now - self._updated >= MIN_UPDATE_INTERVAL or trainer.is_last_batch:
            self._updated = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return the metrics that the bar shows, without the version number."""
        metrics = super().get_metrics(trainer, pl_module)
        loss = pl_module.last_loss if isinstance(pl_module, Task) else None
        shown = {} if loss is None else {"loss": loss.item()}
        return {**shown, **{name: value for name, value in metrics.items() if name != "v_num"}}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {epoch_number(current_epoch, self.trainer)}".ljust(len(self.validation_description))


class RunModelSummary(RichModelSummary):
    """Summary of the modules with parameters and of the numbers of parameters, printed before training."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print the table without modules that have no parameters, such as metrics, and without operation counts."""
        columns = dict(summary_data)
        table = Table("name", "type", Column("params", justify="right"))
        for name, kind, count in zip(columns["Name"], columns["Type"], columns["Params"], strict=True):
            if count.strip() != "0":
                table.add_row(name, kind, count)
        console = get_console()
        console.print(table)
        counts = f"{trainable_parameters:,} of {total_parameters:,} parameters train"
        console.print(f"{counts}; the model occupies {model_size:.1f} MB", highlight=False)


class EpochLines(Callback):
    """Printer of the scores, the duration and the remaining time at the end of each epoch, without a terminal."""

    def __init__(self) -> None:
        self.clock = RunClock()
        self._epoch_start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.clock.start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line of training scores and one of validation scores on the first process."""
        if not trainer.is_global_zero:
            return
        names = getattr(pl_module, "displayed_metrics", ("loss",))
        rows = [row for summary in find_callbacks(trainer, RunSummary) for row in summary.epochs]
        metrics: Mapping[str, Any] = rows[-1] if rows else trainer.callback_metrics
        left = self.clock.seconds_left(trainer)
        seconds = f"took {timedelta(seconds=int(time.monotonic() - self._epoch_start))}"
        remaining = "" if left is None or trainer.should_stop else f", {timedelta(seconds=int(left))} left"
        start, lines = f"epoch {epoch_number(trainer.current_epoch, trainer)}:", []
        for split in ("train", "val"):
            if values := [(n, float(metrics[f"{split}/{n}"])) for n in names if f"{split}/{n}" in metrics]:
                scores = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values)
                lines.append(f"{start} {split:5} {scores}")
                start = " " * len(start)
        last = f"{lines.pop()};" if lines else start
        print("\n".join([*lines, f"{last} {seconds}{remaining}"]), flush=True)
