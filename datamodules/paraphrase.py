"""Paraphrase detection: sentence pairs in the formats of CS224N, QQP and MRPC."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from gpt2_pl.datamodules.classification import TextClassification
from gpt2_pl.errors import InputError

TEMPLATE = "{sentence1}\n{sentence2}\n"
PAIR_LABELS = ("not_duplicate", "duplicate")  # GLUE's names


class QuoraPairs(TextClassification):
    """Datamodule of sentence pairs that are paraphrases (1) or not (0).

    Files have the columns ``sentence1``, ``sentence2`` and ``is_duplicate`` (CS224N), ``question1``, ``question2`` and
    ``is_duplicate`` or ``label`` (QQP, Iyer et al. 2017), or ``#1 String``, ``#2 String`` and ``Quality`` (MRPC, Dolan
    & Brockett 2005, without quoting). The default hub dataset is QQP from GLUE (Wang et al. 2019). Its test set has no
    labels and is not used.

    Args:
        hub_id: dataset on the Hugging Face hub; ignored if a train, val or test file is given.
        hub_config: configuration of the hub dataset.
        label_column: column of the labels, which are class names or class indices.
        labels: class names in the order of their indices; defaults to not_duplicate, duplicate.
        template: text of a pair, with ``{sentence1}`` and ``{sentence2}`` as the placeholders of the sentences.
        swap_pairs: whether to train on every pair in both orders.
        **kwargs: arguments of :class:`~gpt2_pl.datamodules.classification.TextClassification`.

    Raises:
        InputError: as in the base class; also if ``swap_pairs`` is set and the template does not have two fields.
    """

    HUB_SPLITS = {"train": "train", "val": "validation"}
    ALIASES = {
        "sentence1": ("question1", "#1 String"),
        "sentence2": ("question2", "#2 String"),
        "is_duplicate": ("label", "Quality"),
    }

    def __init__(
        self,
        hub_id: str | None = "nyu-mll/glue",
        hub_config: str | None = "qqp",
        label_column: str = "is_duplicate",
        labels: list[str] | None = None,
        template: str = TEMPLATE,
        swap_pairs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hub_id=hub_id,
            hub_config=hub_config,
            label_column=label_column,
            labels=labels or list(PAIR_LABELS),
            template=template,
            **kwargs,
        )
        if swap_pairs and len(self.template.fields) != 2:
            message = f"data.template must have two fields if data.swap_pairs is set, got {template!r}"
            raise InputError(message, key="data.template")
        self.swap_pairs = swap_pairs

    def _field_permutations(self, split: str) -> list[dict[str, str]]:
        permutations = super()._field_permutations(split)
        if self.swap_pairs and split == "train":
            first, second = self.template.fields
            permutations.append({first: second, second: first})
        return permutations

    def _dedup_key(self, row: Mapping[str, str]) -> Hashable:
        return frozenset(map(self.template.normalizer, map(row.__getitem__, self.template.fields)))  # in any order
