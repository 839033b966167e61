"""Paraphrase detection: whether two sentences say the same."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryF1Score, BinaryPrecision, BinaryRecall

from gpt2_pl.errors import InputError
from gpt2_pl.metrics import MetricInfo, best_threshold
from gpt2_pl.tasks.classification import Classifier


class ParaphraseDetector(Classifier):
    """Whether the sentences of a pair say the same: class 1 if they do, class 0 if not.

    Beside accuracy and macro F1 it keeps F1, precision and recall of class 1. A threshold that is tuned is the one
    that scores best on the validation set of the epoch; checkpoints hold it, and test, predict and classify decide by
    it. Training and validation scores are always those of a fixed threshold, 0.5 beside a tuned one, so that they are
    not tuned on the rows they score; ``val/threshold`` and ``val/tuned_accuracy`` or ``val/tuned_f1`` say what tuning
    finds.

    Args:
        num_classes: 2.
        threshold: the least probability of class 1 that is called a paraphrase, or what to tune it for.
        **kwargs: as in :class:`~gpt2_pl.tasks.classification.Classifier`.

    Raises:
        InputError: more classes than two, or a threshold that is not between 0 and 1.
    """

    metric_info: ClassVar[dict[str, MetricInfo]] = {
        **Classifier.metric_info,
        "f1": MetricInfo(percent=True, shown=True),
        **dict.fromkeys(("precision", "recall", "tuned_accuracy", "tuned_f1"), MetricInfo(percent=True)),
        "threshold": MetricInfo(higher_is_better=None),
    }
    decision_threshold: Tensor

    def __init__(self, num_classes: int = 2, threshold: float | Literal["accuracy", "f1"] = 0.5, **kwargs: Any) -> None:
        if num_classes != 2:
            raise InputError(
                f"model.num_classes is {num_classes}; a pair is a paraphrase or not: give data.labels two names"
            )
        if not isinstance(threshold, str) and not 0.0 < threshold < 1.0:
            raise InputError(
                f"model.threshold is {threshold}; it must be between 0 and 1, or accuracy or f1 to tune it"
            )
        super().__init__(num_classes=num_classes, **kwargs)
        self.tuned_for = threshold if isinstance(threshold, str) else None
        self.register_buffer("decision_threshold", torch.tensor(0.5 if self.tuned_for else cast(float, threshold)))

    def _make_metrics(self) -> nn.ModuleDict:
        metrics = super()._make_metrics()
        for name, kind in (("f1", BinaryF1Score), ("precision", BinaryPrecision), ("recall", BinaryRecall)):
            metrics[name] = kind(validate_args=False)
        return metrics

    def predict_class(self, probability: Tensor, split: str | None = None) -> Tensor:
        """The class (B,): 1 where its probability reaches the threshold."""
        untuned = self.tuned_for is not None and split in ("train", "val")
        return (probability[:, 1] >= (0.5 if untuned else self.decision_threshold.to(probability.device))).long()

    def on_validation_epoch_end(self) -> None:
        """Tune the threshold where that is asked."""
        super().on_validation_epoch_end()
        if self.tuned_for is None or self.trainer.sanity_checking:
            return
        outcomes = self.outcomes.rows()
        threshold, score = best_threshold(outcomes["probability"][:, 1], outcomes["label"], self.tuned_for)
        self.decision_threshold.fill_(threshold)
        self.log_dict({"val/threshold": threshold, f"val/tuned_{self.tuned_for}": score}, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every classifier; a threshold that is given is not replaced by the checkpoint's."""
        if self.tuned_for is None:
            checkpoint["state_dict"]["decision_threshold"] = self.decision_threshold
        super().on_load_checkpoint(checkpoint)
