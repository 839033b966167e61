"""Paraphrases: pairs of questions from Quora, and other pairs in the formats of GLUE's QQP and of MRPC."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from gpt2_pl.datamodules.classification import TextClassification
from gpt2_pl.errors import InputError

TEMPLATE = "{sentence1}\n{sentence2}\n"
PAIR_LABELS = ("not_duplicate", "duplicate")  # as GLUE names them


class QuoraPairs(TextClassification):
    """Pairs of sentences that say the same (1) or do not (0).

    Files have the columns ``sentence1``, ``sentence2`` and ``is_duplicate`` (CS224N), ``question1``, ``question2`` and
    ``is_duplicate`` or ``label`` (QQP, Iyer et al. 2017), or ``#1 String``, ``#2 String`` and ``Quality`` (MRPC, Dolan
    & Brockett 2005, which does not quote). The hub's dataset is QQP of GLUE (Wang et al. 2019), whose test set has no
    labels.

    Args:
        swap_pairs: train on every pair the other way round too.
        **kwargs: as in :class:`~gpt2_pl.datamodules.classification.TextClassification`.

    Raises:
        InputError: as there; also ``swap_pairs`` with a template that has not two fields.
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
            raise InputError(f"data.swap_pairs swaps the two fields of the template; it is {template!r}")
        self.swap_pairs = swap_pairs

    def _field_permutations(self, split: str) -> list[dict[str, str]]:
        variants = super()._field_permutations(split)
        if self.swap_pairs and split == "train":
            first, second = self.template.fields
            variants.append({first: second, second: first})
        return variants

    def _dedup_key(self, row: Mapping[str, str]) -> Hashable:
        return frozenset(row[field].strip() for field in self.template.fields)  # whichever comes first
