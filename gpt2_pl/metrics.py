"""Metrics that torchmetrics does not provide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric


@dataclass(frozen=True)
class MetricInfo:
    """Interpretation and display of a metric.

    Args:
        higher_is_better: whether higher values are better; None for a descriptive metric, such as a number of lines.
        percent: whether the values are fractions that tables show in percent.
        shown: whether the table of epochs has a column for the metric.
    """

    higher_is_better: bool | None = True
    percent: bool = False
    shown: bool = False


class RowOutputs(Metric):
    """Per-row outputs of a split, such as predictions, collected across processes.

    Args:
        names: the names of the outputs, among them ``row``, the row numbers.
    """

    full_state_update = False

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self._shapes: dict[str, torch.Size] = {}  # shape of the output of one row
        for name in names:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, **values: Tensor) -> None:
        """Add a batch.

        Args:
            values: one tensor (B, ...) per name, with the rows as first dimension.
        """
        for name in self.names:
            getattr(self, name).append(values[name])
            self._shapes[name] = values[name].shape[1:]

    def rows(self) -> dict[str, Tensor]:
        """Return the outputs (N, ...) of all rows by name, sorted by row number, on the CPU.

        Use this instead of ``compute()``, where torchmetrics squeezes all dimensions of tensors with one element.
        """
        return {name: values.reshape(-1, *self._shapes[name]) for name, values in self.compute().items()}

    def compute(self) -> dict[str, Tensor]:
        """Return the outputs of :meth:`rows`; torchmetrics squeezes tensors with one element."""
        states = {name: getattr(self, name) for name in self.names}
        tensors = {name: torch.cat(state) if isinstance(state, list) else state for name, state in states.items()}
        order = tensors["row"].argsort()
        return {name: tensor[order].cpu() for name, tensor in tensors.items()}


class WeightedMean(Metric):
    """Weighted mean that propagates NaN.

    ``torchmetrics.MeanMetric`` drops NaN values by default and, with ``nan_strategy="disable"``, ignores the weights
    (torchmetrics 1.9).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add values and their weights, two tensors of the same shape."""
        self.total += (values * weights).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """Return the weighted mean of all values."""
        return self.total / self.weight


class ConfusionScore(Metric):
    """Score that is a function of the confusion matrix.

    Unlike the metrics of torchmetrics, which call ``torch.bincount``, an update does not wait for a GPU.

    Args:
        num_classes: number of classes K.
        score: maps the confusion matrix (K, K) of counts, with one row per label and one column per prediction, to the
            score.
        class_index: class whose score is returned, if ``score`` returns one for each class; None for all.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, score: Callable[[Tensor], Tensor], class_index: int | None = None) -> None:
        super().__init__()
        self.num_classes, self.score, self.class_index = num_classes, score, class_index
        self.add_state("counts", default=torch.zeros(num_classes**2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count predicted classes and labels, two tensors (B,) of class indices."""
        cells = label * self.num_classes + prediction
        self.counts.index_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> Tensor:
        """Return the score of all rows."""
        scores = self.score(self.counts.view(self.num_classes, self.num_classes))
        return scores if self.class_index is None else scores[self.class_index]


def accuracy(counts: Tensor) -> Tensor:
    """Return the share of correct predictions, given the confusion matrix (K, K)."""
    return counts.diagonal().sum() / counts.sum()


def precision(counts: Tensor) -> Tensor:
    """Return the share of each class's predictions that are correct (K,), 0 without predictions."""
    return counts.diagonal() / counts.sum(0).clamp(min=1)


def recall(counts: Tensor) -> Tensor:
    """Return the share of each class's rows that are predicted (K,), 0 without rows."""
    return counts.diagonal() / counts.sum(1).clamp(min=1)


def f1(counts: Tensor) -> Tensor:
    """Return the F1 of each class (K,), 0 for a class without rows and predictions."""
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1)).clamp(min=1)


def macro_f1(counts: Tensor) -> Tensor:
    """Return the mean F1 of the classes that have rows or predictions, given the confusion matrix (K, K)."""
    present = counts.sum(0) + counts.sum(1) > 0
    return f1(counts).sum() / present.sum().clamp(min=1)


class SplitMetrics(nn.ModuleDict):
    """Metrics of the training, validation and test split.

    Args:
        make: creates the metrics of one split, by name.
    """

    def __init__(self, make: Callable[[], dict[str, Metric]]) -> None:
        super().__init__({f"{split}_metrics": nn.ModuleDict(make()) for split in ("train", "val", "test")})

    def of(self, split: str) -> dict[str, Metric]:
        """Return the metrics of a split, by name."""
        metrics: Any = self[f"{split}_metrics"]
        return metrics


def finite(losses: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Return losses and their weights for a mean, with weight 0 for losses that are not finite in training.

    A loss that is not finite stops training, or its step is skipped; see
    :class:`~gpt2_pl.callbacks.NonFiniteLossGuard`. In validation and test such losses keep their weight, so that
    the mean is not finite either.

    Args:
        losses: any shape.
        split: ``train``, ``val`` or ``test``.

    Returns:
        Losses and weights, two tensors of the shape of ``losses``. In training, losses that are not finite become 0.
    """
    if split != "train":
        return losses, torch.ones_like(losses)
    return losses.nan_to_num(0.0, 0.0, 0.0), losses.isfinite().to(losses.dtype)


def best_threshold(probability: Tensor, label: Tensor, score: Literal["accuracy", "f1"]) -> tuple[float, float]:
    """Find the best threshold of the rule "predict class 1 if its probability is at least the threshold".

    The threshold is the midpoint between two neighbouring probabilities. Of several equally good thresholds, the one
    nearest to 0.5 is returned. If predicting class 1 for every row is best and a row has probability 0, the threshold
    is 0. If predicting class 0 for every row is best and a row has probability 1, it is the next float after 1.

    Args:
        probability: (N,) probabilities of class 1, in [0, 1].
        label: (N,) 0 or 1.
        score: ``accuracy``, or ``f1`` of class 1.

    Returns:
        The threshold and its score.
    """
    descending, order = probability.float().cpu().sort(descending=True)
    # (N + 1,): a threshold in (lower, upper] predicts class 1 for the k highest probabilities
    infinity = torch.tensor([torch.inf])
    upper, lower = torch.cat([infinity, descending]), torch.cat([descending, -infinity])
    hits = torch.cat([torch.zeros(1), label.cpu()[order].double().cumsum(0)])
    k, N, positives = torch.arange(len(hits)), len(label), hits[-1]
    if score == "accuracy":
        scores = (hits + (N - positives) - (k - hits)) / N
    else:
        scores = 2 * hits / (k + positives).clamp(min=1)
    scores[upper <= lower] = -1.0  # no threshold separates equal probabilities
    highest = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    thresholds = (upper.clamp(max=1.0) + lower.clamp(min=0.0)) / 2
    thresholds = torch.where(thresholds > lower, thresholds, upper.clamp(max=highest))
    best = (scores - scores.max() > -1e-12).nonzero().squeeze(-1)
    chosen = best[(thresholds[best] - 0.5).abs().argmin()]
    return float(thresholds[chosen]), float(scores[chosen])
