"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class MetricInfo:
    """How the values of a metric are read and shown.

    Args:
        higher_is_better: None for a metric that describes and does not judge, such as a number of lines.
        percent: whether the values are shares, which tables show in percent.
        shown: whether the table of epochs has a column of it.
    """

    higher_is_better: bool | None = True
    percent: bool = False
    shown: bool = False


class RowOutputs(Metric):
    """Values of every row of a split, such as what the model said of it, gathered over processes.

    Args:
        names: of the values; ``row``, the rows' numbers, is one of them.
    """

    full_state_update = False

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self._shapes: dict[str, torch.Size] = {}  # of one row's value
        for name in names:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, **values: Tensor) -> None:
        """Add a batch: of every name a tensor whose first dimension is the rows'."""
        for name in self.names:
            getattr(self, name).append(values[name])
            self._shapes[name] = values[name].shape[1:]

    def rows(self) -> dict[str, Tensor]:
        """The values (N, ...) of all rows by name, sorted by the rows' numbers, on the CPU.

        Use this and not ``compute()``, from which torchmetrics squeezes every dimension of a single value.
        """
        return {name: values.reshape(-1, *self._shapes[name]) for name, values in self.compute().items()}

    def compute(self) -> dict[str, Tensor]:
        """The values of :meth:`rows`, those of a single element without dimensions."""
        parts = {name: getattr(self, name) for name in self.names}
        whole = {name: torch.cat(part) if isinstance(part, list) else part for name, part in parts.items()}
        order = whole["row"].argsort()
        return {name: tensor[order].cpu() for name, tensor in whole.items()}


class WeightedMean(Metric):
    """The weighted mean of values, in which a NaN shows.

    torchmetrics' own leaves NaN out, and told not to, leaves out the weights (1.9).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        """Add values and their weights, of one shape."""
        self.total += (values * weights).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """The mean of everything added."""
        return self.total / self.weight


def finite(losses: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Losses and their weights in a mean. In training those that are NaN or infinite weigh nothing: they stop the run,
    or their steps are left out. In validation and test they show.

    Args:
        losses: any shape.
        split: ``train``, ``val`` or ``test``.

    Returns:
        Two tensors of the shape of ``losses``.
    """
    if split != "train":
        return losses, torch.ones_like(losses)
    return losses.nan_to_num(0.0, 0.0, 0.0), losses.isfinite().to(losses.dtype)


def best_threshold(probability: Tensor, label: Tensor, score: Literal["accuracy", "f1"]) -> tuple[float, float]:
    """Find the threshold at which "class 1 if its probability is at least the threshold" scores best.

    It lies half-way between two probabilities; of several equally good ones it is the one nearest to 0.5. It is 0 where
    class 1 is best predicted for every row and one of them has probability 0, and the next float after 1 where class 0
    is and one of them has probability 1.

    Args:
        probability: (N,) of class 1, in [0, 1].
        label: (N,) 0 or 1.
        score: ``accuracy``, or ``f1`` of class 1.

    Returns:
        The threshold and the score.
    """
    descending, order = probability.float().cpu().sort(descending=True)
    # (N + 1,): class 1 is predicted for the k highest, by a threshold in (lower, upper]
    upper, lower = (
        torch.cat([torch.tensor([torch.inf]), descending]),
        torch.cat([descending, torch.tensor([-torch.inf])]),
    )
    hits = torch.cat([torch.zeros(1), label.cpu()[order].double().cumsum(0)])
    k, N, positives = torch.arange(len(hits)), len(label), hits[-1]
    if score == "accuracy":
        scores = (hits + (N - positives) - (k - hits)) / N
    else:
        scores = 2 * hits / (k + positives).clamp(min=1)
    scores[upper <= lower] = -1.0  # no threshold divides equal probabilities
    highest = torch.tensor(1.0).nextafter(torch.tensor(2.0))
    thresholds = (upper.clamp(max=1.0) + lower.clamp(min=0.0)) / 2
    thresholds = torch.where(thresholds > lower, thresholds, upper.clamp(max=highest))
    best = (scores - scores.max() > -1e-12).nonzero().squeeze(-1)
    chosen = best[(thresholds[best] - 0.5).abs().argmin()]
    return float(thresholds[chosen]), float(scores[chosen])
