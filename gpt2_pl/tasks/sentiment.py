"""Sentiment analysis."""

from __future__ import annotations

from typing import Any

from gpt2_pl.tasks.classification import Classifier


class SentimentClassifier(Classifier):
    """How favourable a text is, in K classes. Arguments are those of :class:`~gpt2_pl.tasks.classification.Classifier`.

    Args:
        num_classes: number of classes K; on the command line the datamodule's.
        **kwargs: the others.
    """

    def __init__(self, num_classes: int = 5, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, **kwargs)
