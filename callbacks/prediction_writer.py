"""Writing of a model's outputs for every row."""

from __future__ import annotations

import csv
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.filesystem import atomic_write
from gpt2_pl.tasks.base import Task


class PredictionWriter(Callback):
    """Writer of a task's table of rows, ``<name>_<split>.csv`` in the run's folder, after every evaluation.

    In training it keeps the validation table of the best epoch by the task's ``monitor``. The table of a classifier is
    ``predictions``: for every row its number in its file (from 1), its text, its label, the predicted class and the
    probability of each class. The table of a poem generator is ``losses``: for every poem its number, the number of
    scored tokens, and the sum of their losses in nats. See
    :meth:`Task.row_table() <gpt2_pl.tasks.Task.row_table>`.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.wrote = False  #: whether this process has written a file

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far."""
        self.best = state_dict.get("best")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation rows; in training, only if the score is the best so far."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            score = float(trainer.callback_metrics[str(pl_module.monitor)])
            sign = 1 if pl_module.mode == "max" else -1
            if self.best is not None and sign * score <= sign * self.best:
                return
            self.best = score
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the test rows."""
        self._write(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the predicted rows."""
        self._write(trainer, pl_module, "predict")

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        table = pl_module.row_table(split) if isinstance(pl_module, Task) else None
        folder = run_folder(trainer)
        if table is None or folder is None or not trainer.is_global_zero:
            return
        with atomic_write(folder / f"{table.name}_{split}.csv") as file:
            writer = csv.writer(file)
            writer.writerow(table.columns)
            writer.writerows(table.rows)
        self.wrote = True
