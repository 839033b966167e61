"""Regression: a number for every text, such as a rating, or for every pair of texts, such as their similarity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, PearsonCorrCoef, SpearmanCorrCoef

from gpt2_pl.metrics import MetricInfo, RowOutputs, SplitMetrics, WeightedMean, finite
from gpt2_pl.tasks.pooled import Batch, PooledTask
from gpt2_pl.tasks.protocols import RowTable


class TextRegressor(PooledTask):
    """Regressor of a number from the hidden states of a text or of a pair of texts.

    The loss is the squared error. With several dropout masks it is the mean of their squared errors, and the prediction
    is the mean of their predictions. The metrics are the correlations of Pearson and Spearman of predictions and
    labels, and the mean absolute error.

    Args:
        **kwargs: arguments of :class:`~gpt2_pl.tasks.pooled.PooledTask`.
    """

    monitor = "val/pearson"
    metric_info: ClassVar[dict[str, MetricInfo]] = {
        "loss": MetricInfo(higher_is_better=False, shown=True),
        "pearson": MetricInfo(shown=True),
        "spearman": MetricInfo(shown=True),
        "mae": MetricInfo(higher_is_better=False),
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = SplitMetrics(_make_metrics)
        self.outcomes = RowOutputs("row", "label", "prediction")

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head."""
        return 1

    def forward(self, batch: Batch, split: str | None = None) -> Tensor:
        """Compute the predictions (n, B) of a batch with n dropout masks.

        Args:
            batch: a batch.
            split: the batch's split, whose precomputed features are used if there are any.
        """
        assert self.head is not None
        return self.head(self.pooled(batch, split)).squeeze(-1).float()

    def compute_losses(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Compute the squared error and the prediction of every row, both (B,)."""
        predictions = self(batch, split)
        losses = (predictions - batch["labels"].float()).square().mean(0)
        return losses, predictions.detach().mean(0)

    def update_scores(self, losses: Tensor, outputs: Tensor, batch: Batch, split: str) -> None:
        """Update the metrics of a split with squared errors (B,) and predictions (B,), and log them."""
        counted = outputs.nan_to_num() if split == "train" else outputs  # its loss stops training, or is skipped
        metrics = self.metrics.of(split)
        for name, metric in metrics.items():
            metric.update(*(finite(losses.detach(), split) if name == "loss" else (counted, batch["labels"].float())))
        self.log_scores(split, metrics)

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        prediction = self._step(batch, split)
        self.outcomes.update(row=self._row_numbers(batch), label=batch["labels"].float(), prediction=prediction)

    def predict_number(self, batch: Batch) -> Tensor:
        """Compute the predictions (B,)."""
        return self(batch).mean(0)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the predictions (B,)."""
        prediction = self.predict_number(batch)
        nothing = torch.full_like(prediction, torch.nan)
        self.outcomes.update(row=self._row_numbers(batch), label=nothing, prediction=prediction)
        return prediction

    def row_table(self, split: str) -> RowTable:
        """Return the prediction of every row, with its number, text, label, squared error and absolute error."""
        outcomes, has_labels = self.outcomes.rows(), split != "predict"

        def rows() -> Iterator[list[object]]:
            columns = (outcomes[key].tolist() for key in ("row", "label", "prediction"))
            for row, label, prediction in zip(*columns, strict=True):
                error = prediction - label
                numbers = [label, prediction, error**2, abs(error)] if has_labels else [prediction]
                yield [*self._source_cells(split, row), *(f"{number:.7g}" for number in numbers)]

        outcome_names = ["label", "prediction", "loss", "mae"] if has_labels else ["prediction"]
        return RowTable("predictions", [*self._source_columns(split), *outcome_names], rows())


def _make_metrics() -> dict[str, Metric]:
    """Create the metrics of one split; ``loss`` is updated with losses, the others with predictions and labels."""
    return {
        "loss": WeightedMean(),
        "pearson": PearsonCorrCoef(),
        "spearman": SpearmanCorrCoef(),
        "mae": MeanAbsoluteError(),
    }
