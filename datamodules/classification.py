"""Text classification data: from files or a hub id to batches of token ids."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from datamodules.base import TextData
from datamodules.batching import TokenRows
from datamodules.rows import label_of, read_file, read_hub, require_columns, text_of
from datamodules.template import Template
from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_CACHE_FORMAT = 1  # part of every cache key; raised when what is cached changes


class TextClassification(TextData):
    """Rows with one or more texts and a label, for any classification task.

    Batches hold ``input_ids`` and ``attention_mask`` (B, T), ``labels`` and ``row`` (B,), padded on the right.

    Args:
        train_file: CSV, TSV, JSON lines or Parquet file to train on.
        val_file: file to validate on; without one, a share of the training rows is set aside.
        test_file: file to test on.
        predict_file: file to predict; it needs no labels.
        hub_id: dataset on the Hugging Face hub, read when none of train, val and test file is given.
        columns: template field -> column, where the two names differ.
        label_column: column of the labels, which are class indices or names.
        labels: the class names, in order.
        template: the text the model reads, with ``{field}`` for a row's text.
        tokenizer: folder or hub id; on the command line the base's own by default.
        max_length: tokens in a row's text; by default what the model has room for. Longer text is cut, the template
            never.
        batch_size: rows per process and step.
        eval_batch_size: rows per process in validation, test and prediction.
        val_fraction: share of the training rows to validate on where there is no validation set.
        train_fraction: share of the remaining training rows to use, drawn once with ``split_seed``.
        split_seed: decides which rows these are.

    Raises:
        InputError: at ``prepare_data``, a file, column, label or text that cannot be used, by file and row.
    """

    HUB_COLUMNS: ClassVar[dict[str, str]] = {}  # template field or label_column -> column in the hub's dataset

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        hub_id: str | None = None,
        columns: dict[str, str] | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        template: str = "{sentence}",
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        split_seed: int = 0,
    ) -> None:
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        super().__init__(files, hub_id, tokenizer, max_length, batch_size, eval_batch_size, val_fraction)
        if not 0.0 < train_fraction <= 1.0:
            raise InputError(f"data.train_fraction is {train_fraction}; it must be above 0 and at most 1")
        self.columns = dict(columns or {})
        self.label_column = label_column
        self.labels = list(labels or ("negative", "positive"))
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise InputError(f"data.labels is {self.labels}; there must be two or more different names")
        self.template = Template(template)
        self.train_fraction, self.split_seed = train_fraction, split_seed
        self.rows: dict[str, Dataset] = {}

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return len(self.labels)

    # Reading and encoding

    def _read(self, split: str) -> tuple[Dataset, str]:
        """All rows of a split that has data of its own, and their source's name for messages."""
        if (file := self.files[split]) is not None:
            return read_file(file, f"data.{split}_file"), file
        assert self.hub_id is not None
        name = self.HUB_SPLITS[split]
        return read_hub(self.hub_id, name, "data.hub_id"), f"{self.hub_id} ({name})"

    def _columns(self, split: str) -> dict[str, str]:
        from_hub = self.hub_id is not None and split != "predict"
        return {**(self.HUB_COLUMNS if from_hub else {}), **self.columns}

    def _field_columns(self, split: str) -> dict[str, str]:
        columns = self._columns(split)
        return {field: columns.get(field, field) for field in self.template.fields}

    def _encode(self, split: str) -> TokenRows:
        rows, source = self._read("train" if split == "val" and not self._has_own_val() else split)
        fields = self._field_columns(split)
        label_column = self._columns(split).get(self.label_column, self.label_column)
        labelled = split != "predict"
        require_columns(rows, [*fields.values(), *([label_column] if labelled else [])], source)
        max_length = self._max_length()
        import datasets

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            records = [
                {field: text_of({column: batch[column][i]}, column, source, n + 1) for field, column in fields.items()}
                for i, n in enumerate(numbers)
            ]
            encoded: dict[str, list[Any]] = {"input_ids": self.template.encode(records, self.tokenizer, max_length)}
            if labelled:
                encoded["label"] = [
                    label_of({label_column: value}, label_column, self.labels, source, n + 1)
                    for n, value in zip(numbers, batch[label_column], strict=True)
                ]
            return encoded

        key = [_CACHE_FORMAT, rows._fingerprint, self.template.text, fields, max_length, self.tokenizer.to_str()]
        key += [label_column, self.labels] if labelled else []
        datasets.disable_progress_bars()
        encoded = rows.map(
            encode,
            batched=True,
            with_indices=True,
            batch_size=5000,
            remove_columns=rows.column_names,
            features=_features(labelled),
            new_fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32],
        )
        chosen = self._chosen(split, len(rows))
        if chosen is not None:
            rows, encoded = rows.select(chosen), encoded.select(chosen)
            encoded = encoded.flatten_indices(new_fingerprint=None) if len(encoded) else encoded
        self.rows[split] = rows
        return _token_rows(encoded)

    def _chosen(self, split: str, n: int) -> np.ndarray | None:
        """Which of the n rows read belong to the split; None for all of them."""
        if split not in ("train", "val") or (split == "val" and self._has_own_val()):
            return None
        order = np.random.default_rng(self.split_seed).permutation(n)
        n_val = 0 if self._has_own_val() else max(1, round(n * self.val_fraction))
        if split == "val":
            return np.sort(order[:n_val])
        n_train = max(1, round((n - n_val) * self.train_fraction))
        return None if n_train == n else np.sort(order[n_val : n_val + n_train])

    def text(self, split: str, row: int) -> str:
        """The text of a row's template fields, as the source holds it."""
        return " | ".join(self.rows[split][row][column].strip() for column in self._field_columns(split).values())

    def description(self) -> dict[str, Any]:
        """What a run says of its data: sources, template, classes, rows in each split read."""
        return {
            "class": type(self).__name__,
            "files": {split: file for split, file in self.files.items() if file is not None},
            "hub_id": self.hub_id,
            "template": self.template.text,
            "labels": self.labels,
            "rows": {split: len(rows) for split, rows in self.encoded.items()},
            "batch_size": self.batch_size,
        }


def _features(labelled: bool) -> Any:
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), **({"label": Value("int64")} if labelled else {})})


def _token_rows(encoded: Dataset) -> TokenRows:
    column = encoded.data.column("input_ids").combine_chunks()
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy()
    labels = np.asarray(encoded.data.column("label")) if "label" in encoded.column_names else None
    return TokenRows(values, offsets, labels)
