"""Texts with a number as their label: ratings, and the similarity of two sentences."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from gpt2_pl.datamodules.labelled import LabelledText
from gpt2_pl.datamodules.paraphrase import TEMPLATE
from gpt2_pl.datamodules.rows import Row, parse_number
from gpt2_pl.errors import InputError

_LIMIT = 1e6  # of the absolute value of a label


class TextRegression(LabelledText):
    """Datamodule of rows with one or more texts and a number.

    Batches contain ``input_ids`` and ``attention_mask`` (B, T), padded on the right, ``labels`` (B,) in float32 and
    ``row`` (B,).

    Args:
        min_label: smallest valid label.
        max_label: largest valid label.
        **kwargs: arguments of :class:`~gpt2_pl.datamodules.labelled.LabelledText`.

    Raises:
        InputError: an argument is out of range; in ``prepare_data``, a file, column, label or text is invalid.
    """

    LABEL_TYPE: ClassVar[str] = "float32"
    NO_LABEL: ClassVar[float] = math.nan

    def __init__(self, min_label: float = -_LIMIT, max_label: float = _LIMIT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not -_LIMIT <= min_label < max_label <= _LIMIT:
            expected = f"below data.max_label, and both in [{-_LIMIT:g}, {_LIMIT:g}]"
            raise InputError(key="data.min_label", value=min_label, expected=f"{expected}; max_label is {max_label}")
        self.min_label, self.max_label = min_label, max_label

    @property
    def _label_values(self) -> list[Any]:
        return [self.min_label, self.max_label]

    def _parse_label(self, row: Row, column: str, source: str, number: int) -> float:
        return parse_number(row, column, (self.min_label, self.max_label), source, number)


class STSB(TextRegression):
    """Datamodule of the Semantic Textual Similarity Benchmark (Cer et al. 2017): pairs of sentences, rated 0 to 5.

    Files have the columns ``sentence1``, ``sentence2`` and ``label`` or ``score``. The default hub dataset is that of
    GLUE (Wang et al. 2019). Its test set has no labels and is not used.

    Args:
        hub_id: dataset on the Hugging Face hub; ignored if a train, val or test file is given.
        hub_config: configuration of the hub dataset.
        template: text of a pair, with ``{sentence1}`` and ``{sentence2}`` as the placeholders of the sentences.
        min_label: smallest valid label.
        max_label: largest valid label.
        **kwargs: arguments of :class:`TextRegression`.
    """

    HUB_SPLITS = {"train": "train", "val": "validation"}
    ALIASES = {"label": ("score",)}

    def __init__(
        self,
        hub_id: str | None = "nyu-mll/glue",
        hub_config: str | None = "stsb",
        template: str = TEMPLATE,
        min_label: float = 0.0,
        max_label: float = 5.0,
        **kwargs: Any,
    ) -> None:
        limits = {"min_label": min_label, "max_label": max_label}
        super().__init__(hub_id=hub_id, hub_config=hub_config, template=template, **limits, **kwargs)
