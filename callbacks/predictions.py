"""What the model said of every row, as a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.files import whole_file
from gpt2_pl.tasks.classification import Classifier


class PredictionWriter(Callback):
    """Writes ``predictions_<split>.csv`` into the run folder: each row's number in its file (from 1), text, label,
    prediction and the probability of each class.

    For validation during training these are the rows of the best epoch by the task's ``monitor``.
    """

    def __init__(self) -> None:
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score so far."""
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation rows, in training only when they are the best so far."""
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
        if not isinstance(pl_module, Classifier):
            return
        outcomes = pl_module.outcomes.compute()
        folder = trainer.log_dir
        if not trainer.is_global_zero or folder is None:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        names = datamodule.labels
        with whole_file(Path(folder) / f"predictions_{split}.csv") as file:
            writer = csv.writer(file)
            labelled = ["label"] if split != "predict" else []
            writer.writerow(["row", "text", *labelled, "prediction", *(f"p({name})" for name in names)])
            said = pl_module.decide(outcomes["probability"], split).tolist()
            for row, label, probability, decision in zip(
                *(outcomes[k].tolist() for k in ("row", "label", "probability")), said, strict=True
            ):
                truth = [names[label]] if labelled else []
                shown = (f"{p:.6f}" for p in probability)
                number, text = datamodule.number(split, row), datamodule.text(split, row)
                writer.writerow([number, text, *truth, names[decision], *shown])
