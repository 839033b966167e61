"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from typing import Literal

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


def best_threshold(probability: Tensor, label: Tensor, score: Literal["accuracy", "f1"]) -> tuple[float, float]:
    """The threshold at which "class 1 if its probability is at least the threshold" scores best.

    It lies half-way between two probabilities; of several equally good ones it is the one nearest to 0.5.

    Args:
        probability: (N,) of class 1, in [0, 1].
        label: (N,) 0 or 1.
        score: ``accuracy``, or ``f1`` of class 1.

    Returns:
        The threshold and the score.
    """
    order = probability.float().argsort(descending=True)
    edges = torch.cat([torch.tensor([1.0]), probability.float().cpu()[order.cpu()], torch.tensor([0.0])])
    upper, lower = edges[:-1], edges[1:]  # (N + 1,): the k highest are called 1, and the threshold is between these two
    hits = torch.cat([torch.zeros(1), label.cpu()[order.cpu()].double().cumsum(0)])
    k, N, positives = torch.arange(len(hits)), len(label), hits[-1]
    if score == "accuracy":
        scores = (hits + (N - positives) - (k - hits)) / N
    else:
        scores = 2 * hits / (k + positives).clamp(min=1)
    scores[upper <= lower] = -1.0  # no threshold divides equal probabilities
    middle = (upper + lower) / 2
    middle = torch.where(middle > lower, middle, upper)
    best = (scores - scores.max() > -1e-12).nonzero().squeeze(-1)
    chosen = best[(middle[best] - 0.5).abs().argmin()]
    return float(middle[chosen]), float(scores[chosen])
