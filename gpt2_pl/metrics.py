"""Metrics that torchmetrics does not have."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Outcomes(Metric):
    """What the model said of every row: row numbers, labels and class probabilities, gathered over processes."""

    full_state_update = False
    row: list[Tensor]
    label: list[Tensor]
    probability: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("row", "label", "probability"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, row: Tensor, label: Tensor, probability: Tensor) -> None:
        """Add a batch: ``row`` (B,), ``label`` (B,; -1 where unknown), ``probability`` (B, K)."""
        self.row.append(row)
        self.label.append(label)
        self.probability.append(probability.float())

    def compute(self) -> dict[str, Tensor]:
        """All rows, sorted by number: ``row`` (N,), ``label`` (N,), ``probability`` (N, K)."""
        parts = {name: getattr(self, name) for name in ("row", "label", "probability")}
        whole = {name: torch.cat(part) if isinstance(part, list) else part for name, part in parts.items()}
        order = whole["row"].argsort()
        return {name: tensor[order].cpu() for name, tensor in whole.items()}
