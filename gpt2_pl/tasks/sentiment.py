"""Sentiment analysis."""

from __future__ import annotations

from typing import Any

from gpt2_pl.tasks.classification import Classifier


class SentimentClassifier(Classifier):
    """Classifier of the sentiment of a text, in K classes.

    Args:
        num_classes: number of classes K; on the command line that of the datamodule.
        **kwargs: arguments of :class:`~gpt2_pl.tasks.classification.Classifier`.
    """

    def __init__(self, num_classes: int = 5, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
