"""Logging of a task's scores and losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from gpt2_pl.metrics import RowOutputs
from gpt2_pl.utils.trainer import log_every_n_steps


class ScoredModule(LightningModule):
    """Module that logs scores of epochs and losses of steps."""

    #: Mean loss of the last training batch, a scalar on its device; None before the first.
    last_loss: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logged: set[str] = set()  # splits whose metrics are registered with the trainer in this epoch

    def log_scores(self, split: str, metrics: Mapping[str, Metric]) -> None:
        """Log the scores of a split at the end of the epoch.

        Metrics are registered with ``self.log`` in the first step only: ``log`` takes longer than a metric update.

        Args:
            split: ``train``, ``val`` or ``test``.
            metrics: metrics by name.
        """
        if split not in self._logged:
            self._logged.add(split)
            for name, metric in metrics.items():
                self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, batch_size=1)

    def log_step_loss(self, loss: Tensor) -> None:
        """Log ``train/loss_step`` in the steps that loggers record, every ``log_every_n_steps``.

        The progress bar reads the loss of the last step when it is drawn, because ``log`` takes as long as some layers
        of a small GPT-2, and its value would be copied from the GPU in every step.

        Args:
            loss: mean loss of a batch, a scalar.
        """
        self.last_loss = loss.detach()
        every = log_every_n_steps(self.trainer)
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss_step", self.last_loss, on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_start(self) -> None:
        """Start the scores of a new epoch."""
        self._start_epoch("train")

    def on_validation_epoch_start(self) -> None:
        """Reset the scores and the row outputs of an evaluation."""
        self._start_epoch("val")

    def on_test_epoch_start(self) -> None:
        """Reset the scores and the row outputs of an evaluation."""
        self._start_epoch("test")

    def on_predict_epoch_start(self) -> None:
        """Reset the row outputs of a prediction."""
        self._start_epoch("predict")

    def _start_epoch(self, split: str) -> None:
        """Reset what Lightning does not reset: the registered scores, and the row outputs of an evaluation."""
        self._logged.discard(split)
        for metric in self.children():
            if isinstance(metric, RowOutputs) and split != "train":
                metric.reset()
