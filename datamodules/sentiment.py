"""Sentiment: the Stanford Sentiment Treebank and movie reviews."""

from __future__ import annotations

from typing import Any

from gpt2_pl.datamodules.classification import TextClassification

TEMPLATE = "Review: {sentence} Sentiment:"
SST5_LABELS = ("very negative", "negative", "neutral", "positive", "very positive")


class SST5(TextClassification):
    """Sentences in five classes (Socher et al. 2013).

    Files are CS224N's by default: tab-separated, with the columns ``sentence`` and ``sentiment`` (0 to 4). All
    arguments of :class:`~gpt2_pl.datamodules.classification.TextClassification` apply.
    """

    ALIASES = {"sentence": ("text",), "sentiment": ("label",)}

    def __init__(
        self,
        hub_id: str | None = "SetFit/sst5",
        label_column: str = "sentiment",
        labels: list[str] | None = None,
        template: str = TEMPLATE,
        **kwargs: Any,
    ) -> None:
        labels = labels or list(SST5_LABELS)
        super().__init__(hub_id=hub_id, label_column=label_column, labels=labels, template=template, **kwargs)


class IMDB(TextClassification):
    """Movie reviews in two classes (Maas et al. 2011), and CFIMDB (Kaushik et al. 2020) in CS224N's file format.

    Files have the columns ``sentence`` and ``sentiment`` (0 negative, 1 positive) by default; the hub's dataset is
    IMDB, whose test split is the test set. All arguments of
    :class:`~gpt2_pl.datamodules.classification.TextClassification` apply.
    """

    HUB_SPLITS = {"train": "train", "test": "test"}
    ALIASES = {"sentence": ("text",), "sentiment": ("label",)}

    def __init__(
        self,
        hub_id: str | None = "stanfordnlp/imdb",
        label_column: str = "sentiment",
        template: str = TEMPLATE,
        **kwargs: Any,
    ) -> None:
        super().__init__(hub_id=hub_id, label_column=label_column, template=template, **kwargs)
