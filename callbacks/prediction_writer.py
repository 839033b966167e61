"""What the model said of every row, or how well it foresaw it, as a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_pl.callbacks.run_folder import run_folder
from gpt2_pl.filesystem import whole_file
from gpt2_pl.tasks.classification import Classifier
from gpt2_pl.tasks.poetry import PoemGenerator
from gpt2_pl.text.poems import Poem


class PredictionWriter(Callback):
    """Writes a file of every row into the run folder, for validation during training that of the best epoch by the
    task's ``monitor``.

    Of a classifier it is ``predictions_<split>.csv``: each row's number in its file (from 1), text, label, prediction
    and the probability of each class. Of a poem generator it is ``losses_<split>.csv``: each poem's number, how many
    tokens were scored, and the sum of their losses in nats.
    """

    def __init__(self) -> None:
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best score so far."""
        self.best = state_dict.get("best")

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
        if not isinstance(pl_module, Classifier | PoemGenerator):
            return
        outcomes = pl_module.outcomes.rows()
        folder = run_folder(trainer)
        if not trainer.is_global_zero or folder is None:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        if isinstance(pl_module, PoemGenerator):
            self._write_losses(folder / f"losses_{split}.csv", outcomes, datamodule.poems[split])
            return
        names = datamodule.labels
        with whole_file(folder / f"predictions_{split}.csv") as file:
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

    @staticmethod
    def _write_losses(path: Path, outcomes: dict[str, Any], poems: list[Poem]) -> None:
        with whole_file(path) as file:
            writer = csv.writer(file)
            writer.writerow(["poem", "n_tokens", "loss"])
            for row, n_tokens, loss in zip(*(outcomes[k].tolist() for k in ("row", "n_tokens", "loss")), strict=True):
                writer.writerow([poems[row].number, n_tokens, f"{loss:.6f}"])
