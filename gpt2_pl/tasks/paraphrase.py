"""Paraphrase detection: whether two sentences have the same meaning."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from gpt2_pl.errors import require
from gpt2_pl.metrics import ConfusionScore, MetricInfo, best_threshold, f1, precision, recall
from gpt2_pl.tasks.classification import Classifier


class ParaphraseDetector(Classifier):
    """Classifier of sentence pairs: class 1 if the sentences have the same meaning, otherwise class 0.

    In addition to accuracy and macro F1, it computes F1, precision and recall of class 1. A tuned threshold is the one
    with the best score on the validation set of the epoch. Checkpoints hold it, and ``test``, ``predict`` and
    ``classify`` use it. Training and validation scores always use a fixed threshold, which is 0.5 if the threshold is
    tuned, so that it is not tuned on the rows that they score. ``val/threshold`` is the tuned threshold, and
    ``val/tuned_accuracy`` or ``val/tuned_f1`` is its score.

    Args:
        num_classes: 2.
        threshold: smallest probability of class 1 that is classified as a paraphrase, in (0, 1), or the score for which
            the threshold is tuned.
        **kwargs: arguments of :class:`~gpt2_pl.tasks.classification.Classifier`.

    Raises:
        InputError: a number of classes other than 2, or a threshold outside (0, 1).
    """

    metric_info: ClassVar[dict[str, MetricInfo]] = {
        **Classifier.metric_info,
        "f1": MetricInfo(percent=True, shown=True),
        **dict.fromkeys(("precision", "recall", "tuned_accuracy", "tuned_f1"), MetricInfo(percent=True)),
        "threshold": MetricInfo(higher_is_better=None),
    }
    decision_threshold: Tensor

    def __init__(self, num_classes: int = 2, threshold: float | Literal["accuracy", "f1"] = 0.5, **kwargs: Any) -> None:
        require(num_classes == 2, "model.num_classes", num_classes, "2 for paraphrases (two names in data.labels)")
        is_valid = isinstance(threshold, str) or 0.0 < threshold < 1.0
        require(is_valid, "model.threshold", threshold, "in (0, 1), or accuracy or f1 to tune it")
        super().__init__(num_classes=num_classes, **kwargs)
        self.tuned_for = threshold if isinstance(threshold, str) else None
        self.register_buffer("decision_threshold", torch.tensor(0.5 if self.tuned_for else cast(float, threshold)))

    def _make_metrics(self) -> dict[str, Metric]:
        of_class_1 = {score.__name__: ConfusionScore(2, score, class_index=1) for score in (f1, precision, recall)}
        return {**super()._make_metrics(), **of_class_1}

    def predict_class(self, probability: Tensor, split: str | None = None) -> Tensor:
        """Return the predicted class (B,): 1 if its probability reaches the threshold."""
        untuned = self.tuned_for is not None and split in ("train", "val")
        return (probability[:, 1] >= (0.5 if untuned else self.decision_threshold.to(probability.device))).long()

    def on_validation_epoch_end(self) -> None:
        """Tune the threshold, if it is to be tuned."""
        if self.tuned_for is None or self.trainer.sanity_checking:
            return
        outcomes = self.outcomes.rows()
        threshold, score = best_threshold(outcomes["probability"][:, 1], outcomes["label"], self.tuned_for)
        self.decision_threshold.fill_(threshold)
        self.log_dict({"val/threshold": threshold, f"val/tuned_{self.tuned_for}": score}, sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint, and keep a fixed threshold instead of the checkpoint's."""
        if self.tuned_for is None:
            checkpoint["state_dict"]["decision_threshold"] = self.decision_threshold
        super().on_load_checkpoint(checkpoint)
