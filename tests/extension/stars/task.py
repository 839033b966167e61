"""Ratings as numbers: a task with a loss, a metric and a table of rows of its own."""

from __future__ import annotations

import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.regression import MeanAbsoluteError

from gpt2_pl.metrics import MetricInfo, RowOutputs
from gpt2_pl.tasks import Task
from gpt2_pl.tasks.protocols import RowTable


class StarRegressor(Task):
    """Predicts a rating from 0 to K - 1 from the last token's hidden state, by Huber's loss.

    Args:
        num_classes: K.
        delta: where the loss turns from a square to a line.
        **kwargs: as in Task.
    """

    monitor = "val/mae"
    metric_info = {
        "loss": MetricInfo(higher_is_better=False, shown=True),
        "mae": MetricInfo(higher_is_better=False, shown=True),
    }

    def __init__(self, num_classes: int = 2, delta: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters("num_classes", "delta")
        self.num_classes, self.delta = num_classes, delta
        self.head = nn.Linear(self.config.n_embd, 1)
        kinds = {"loss": MeanMetric, "mae": MeanAbsoluteError}
        self.metrics = nn.ModuleDict(
            {f"{split}_metrics": nn.ModuleDict({name: kind() for name, kind in kinds.items()})
             for split in ("train", "val", "test")}
        )  # fmt: skip
        self.outcomes = RowOutputs("row", "label", "rating")

    def forward(self, batch):
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        return self.head(self.backbone(batch["input_ids"], output_positions=last).squeeze(1)).squeeze(-1)

    def _step(self, batch, split):
        rating = self(batch)
        losses = nn.functional.huber_loss(rating, batch["labels"].float(), reduction="none", delta=self.delta)
        metrics = self.metrics[f"{split}_metrics"]
        metrics["loss"].update(losses.detach())
        metrics["mae"].update(rating.detach(), batch["labels"].float())
        self.log_scores(split, metrics)
        if split != "train":
            self.outcomes.update(row=batch["row"], label=batch["labels"], rating=rating)
        return losses

    def training_step(self, batch, batch_idx):
        losses = self._step(batch, "train")
        return self.mean_loss(losses.sum(), len(losses), batch, batch_idx)[0]

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def predict_step(self, batch, batch_idx):
        rating = self(batch)
        self.outcomes.update(row=batch["row"], label=torch.full_like(batch["row"], -1), rating=rating)
        return rating

    # For callbacks and commands

    def row_table(self, split):
        columns = (values.tolist() for values in self.outcomes.rows().values())
        rows = (
            [
                self.datamodule.row_number(split, row),
                self.datamodule.text(split, row),
                label,
                rating,
                abs(rating - label),
            ]
            for row, label, rating in zip(*columns, strict=True)
        )
        return RowTable("predictions", ["row", "text", "label", "prediction", "mae"], rows)

    def predict_proba(self, batch):
        distance = self(batch).unsqueeze(1) - torch.arange(self.num_classes, device=self.device)
        return (-(distance**2)).softmax(-1)

    def predict_class(self, probability, split=None):
        return probability.argmax(-1)
