"""Sentiment classification: the Stanford Sentiment Treebank and movie reviews."""

from __future__ import annotations

from typing import Any

from gpt2_pl.datamodules.classification import TextClassification

TEMPLATE = "Review: {sentence} Sentiment:"
SST5_LABELS = ("very negative", "negative", "neutral", "positive", "very positive")


class SST5(TextClassification):
    """Datamodule of the Stanford Sentiment Treebank in five classes (Socher et al. 2013).

    The default columns are those of CS224N's tab-separated files: ``sentence`` and ``sentiment`` (0 to 4).

    Args:
        hub_id: dataset on the Hugging Face hub; ignored if a train, val or test file is given.
        label_column: column of the labels, which are class names or class indices.
        labels: class names in the order of their indices; defaults to very negative, negative, neutral, positive, very
            positive.
        template: text of a row, with ``{sentence}`` as the placeholder of the sentence.
        **kwargs: arguments of :class:`~gpt2_pl.datamodules.classification.TextClassification`.
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
    """Datamodule of movie reviews in two classes: IMDB (Maas et al. 2011) and CFIMDB (Kaushik et al. 2020).

    The default columns are those of CS224N's files: ``sentence`` and ``sentiment`` (0 negative, 1 positive). The
    default hub dataset is IMDB; its test split is the test set.

    Args:
        hub_id: dataset on the Hugging Face hub; ignored if a train, val or test file is given.
        label_column: column of the labels, which are class names or class indices.
        template: text of a row, with ``{sentence}`` as the placeholder of the sentence.
        **kwargs: arguments of :class:`~gpt2_pl.datamodules.classification.TextClassification`.
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
