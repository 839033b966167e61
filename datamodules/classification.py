"""Text classification data: from files or a hub id to batches of token ids."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import tokenizers
from lightning.pytorch.utilities import rank_zero_warn

from gpt2_pl import __version__
from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import TokenDataset
from gpt2_pl.datamodules.cache import cached
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.datamodules.readers import Row, RowSource, parse_label, parse_text, read_file, read_hub, require_columns
from gpt2_pl.errors import InputError, printable

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# columns beside the fields, whose names are identifiers
_NUMBER, _TOKENS, _LABEL, _REASON = "row number", "token ids", "label index", "reason to skip"
_NO_LABEL = -1
_CACHE_FORMAT = 5  # part of every cache key; raised when what is cached changes
_BATCH_ROWS, _BATCH_CHARACTERS = 5000, 1 << 24  # rows that are encoded together end at either


class _Example(NamedTuple):
    """A row by its number in the source, from 1: its texts by field, label and token ids, or the reason to skip it."""

    number: int
    texts: dict[str, str] = {}
    label: int = _NO_LABEL
    reason: str | None = None
    ids: Sequence[int] = ()


class TextClassification(TextData):
    """Rows with one or more texts and a label, for any classification task.

    Batches hold ``input_ids`` and ``attention_mask`` (B, T), ``labels`` and ``row`` (B,), padded on the right.

    Args:
        train_file: CSV, TSV, JSON lines or Parquet file to train on, or several.
        val_file: file to validate on; without one, a share of the training rows is set aside.
        test_file: file to test on.
        predict_file: file to predict; it needs no labels.
        hub_id: dataset on the Hugging Face hub, read when none of train, val and test file is given.
        hub_config: its configuration, where it has several.
        columns: template field -> column, where the two names differ.
        label_column: column of the labels, which are class indices or names.
        labels: the class names, in order.
        template: the text the model reads, with ``{field}`` for a row's text.
        tokenizer: folder or hub id; on the command line the base's own by default.
        max_length: tokens in a row's text; by default what the model has room for. Longer text is cut, the template
            never.
        batch_size: rows per process and step.
        eval_batch_size: rows per process in validation, test and prediction.
        val_fraction: share of the training rows to validate on where there is no validation set. Other training rows
            with the same texts are left out.
        train_fraction: share of the remaining training rows to use, drawn once with ``split_seed``.
        balance: make the training classes equally frequent: ``undersample`` leaves rows of the larger ones out,
            ``oversample`` repeats rows of the smaller ones.
        split_seed: decides which rows all these are.
        quoting: whether double quotes enclose values in delimited files; by default in all but MRPC's.
        on_invalid_row: ``error``, or ``skip`` rows without text, with an unknown label, that are not UTF-8, have too
            many or too few values, or are not a JSON object. metrics.json counts them.

    Raises:
        InputError: at ``prepare_data``, a file, column, label or text that cannot be used, by file and row.
    """

    ALIASES: ClassVar[dict[str, tuple[str, ...]]] = {}  # template field or label column -> its names in published sets

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        hub_id: str | None = None,
        hub_config: str | None = None,
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
        balance: Literal["oversample", "undersample"] | None = None,
        split_seed: int = 0,
        quoting: bool | None = None,
        on_invalid_row: Literal["error", "skip"] = "error",
    ) -> None:
        if isinstance(train_file, list) and not train_file:
            raise InputError("data.train_file is an empty list; give a file, or several")
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
        self.hub_config, self.quoting, self.on_invalid_row = hub_config, quoting, on_invalid_row
        self.train_fraction, self.balance, self.split_seed = train_fraction, balance, split_seed
        self.rows: dict[str, Dataset] = {}  # the texts of each split, by field
        self.skipped: dict[str, int] = {}  # how many rows of each source cannot be used

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return len(self.labels)

    # Reading and encoding

    def _sources(self, split: str) -> list[RowSource]:
        """All rows of a split that has data of its own."""
        if (files := self.files[split]) is not None:
            files = [files] if isinstance(files, str) else files
            return [
                read_file(file, f"data.{split}_file", self.quoting, self.on_invalid_row == "skip") for file in files
            ]
        assert self.hub_id is not None
        return [read_hub(self.hub_id, self.HUB_SPLITS[split], "data.hub_id", self.hub_config)]

    def column(self, name: str, columns: Sequence[str]) -> str:
        """Which of the columns holds a template field or the label: the one that ``data.columns`` says, the one of
        that name, or the one that a published set calls otherwise."""
        if name in self.columns or name in columns:
            return self.columns.get(name, name)
        return next((alias for alias in self.ALIASES.get(name, ()) if alias in columns), name)

    def _field_permutations(self, split: str) -> list[dict[str, str]]:
        """Which of a row's fields stand in each field of the template: once as they are, and other ways to train on."""
        return [{field: field for field in self.template.fields}]

    def _encode(self, split: str) -> TokenDataset:
        import datasets

        sources = self._sources("train" if split == "val" and not self._has_own_val() else split)
        parts, rows = [], []
        for variant in self._field_permutations(split):
            pairs = [self._encode_source(source, variant, split != "predict") for source in sources]
            encoded = TokenDataset.concatenate([part for part, _ in pairs])
            texts = datasets.concatenate_datasets([kept for _, kept in pairs])
            if (chosen := self._split_indices(split, len(encoded))) is not None:
                encoded, texts = encoded.select(chosen), texts.select(chosen)
            parts.append(encoded)
            rows.append(texts)
        encoded, texts = TokenDataset.concatenate(parts), datasets.concatenate_datasets(rows)
        if split == "train" and not self._has_own_val():
            held_out = {self._dedup_key(row) for row in self._rows_of("val").select_columns(self.template.fields)}
            contents = map(self._dedup_key, texts.select_columns(self.template.fields))
            apart = np.flatnonzero([content not in held_out for content in contents])
            encoded, texts = encoded.select(apart), texts.select(apart)
        if split == "train" and self.balance is not None:
            assert encoded.labels is not None
            order = balanced(encoded.labels, self.balance, self.split_seed)
            encoded, texts = encoded.select(order), texts.select(order)
        self.rows[split] = texts
        return encoded

    def _rows_of(self, split: str) -> Dataset:
        """The texts of a split, encoded now where it has not been."""
        if split not in self.rows:
            self.encoded[split] = self._encode(split)
        return self.rows[split]

    def _dedup_key(self, row: Mapping[str, str]) -> Hashable:
        """What makes a row the same as another."""
        return tuple(row[field].strip() for field in self.template.fields)

    def _encode_source(
        self, source: RowSource, variant: dict[str, str], labelled: bool
    ) -> tuple[TokenDataset, Dataset]:
        """Encode the usable rows of a source, and give their texts by field."""
        fields = {field: self.column(name, source.columns) for field, name in variant.items()}
        label_column = self.column(self.label_column, source.columns) if labelled else None
        require_columns(source, list(fields.values()), label_column)
        if len(set(fields.values())) < len(fields):
            raise InputError(f"data.columns: two fields of the template read one column: {fields}")
        labels, max_length, tokenizer = self.labels if labelled else None, self._max_length(), self.tokenizer.to_str()
        key = [_CACHE_FORMAT, __version__, tokenizers.__version__, source.fingerprint, self.template.text, fields]
        key += [label_column, labels, max_length, tokenizer, self.on_invalid_row]
        rows = cached("rows", key, _schema(fields), lambda: self._batches(source, fields, label_column))
        reasons = rows.data.column(_REASON)
        encoded = _token_rows(rows)
        if reasons.null_count < len(rows):
            usable = np.flatnonzero(reasons.is_null())
            unusable = rows.select(np.setdiff1d(np.arange(len(rows)), usable))
            self._tell_skipped(source.name, dict(zip(unusable[_NUMBER], unusable[_REASON], strict=True)), len(rows))
            encoded, rows = encoded.select(usable), rows.select(usable)
        if not labelled:
            encoded.labels = None
        return encoded, rows.select_columns([*fields, _NUMBER])

    def _batches(self, source: RowSource, fields: dict[str, str], label_column: str | None) -> Iterator[pa.RecordBatch]:
        """Read, check and encode the rows of a source. Those that are left out come without tokens, with the reason."""
        import pyarrow as pa

        schema = _schema(fields)
        columns = list(dict.fromkeys([*fields.values(), *([label_column] if label_column else [])]))
        examples = (self._checked(source, number, row, fields, label_column) for number, row in source.read(columns))
        while checked := list(_first(examples, _BATCH_ROWS, _BATCH_CHARACTERS)):
            batch = self._tokenized(source, checked)
            values = {
                _NUMBER: [example.number for example in batch],
                **{field: [example.texts.get(field) for example in batch] for field in fields},
                _TOKENS: [example.ids for example in batch],
                _LABEL: [example.label for example in batch],
                _REASON: [example.reason for example in batch],
            }
            yield pa.RecordBatch.from_pydict(values, schema=schema)

    def _checked(
        self, source: RowSource, number: int, row: Row | str, fields: dict[str, str], label_column: str | None
    ) -> _Example:
        """Check the texts and the label of a row."""
        if isinstance(row, str):
            return _Example(number, reason=row)
        try:
            texts = {field: parse_text(row, column, source.name, number) for field, column in fields.items()}
            label = parse_label(row, label_column, self.labels, source.name, number) if label_column else _NO_LABEL
        except InputError as error:
            if self.on_invalid_row == "error":
                raise
            return _Example(number, reason=str(error).removeprefix(printable(f"{source.name}, ")))
        return _Example(number, texts, label)

    def _tokenized(self, source: RowSource, batch: list[_Example]) -> list[_Example]:
        """Return examples with their token ids; those without any have a reason to be skipped."""
        texts = [example.texts for example in batch if example.reason is None]
        ids = iter(self.template.encode(texts, self.tokenizer, self._max_length()))
        examples = []
        for example in batch:
            if example.reason is None:
                example = example._replace(ids=next(ids))
                if not example.ids:
                    reason = f"row {example.number}: {self.template.no_token(example.texts)}"
                    if self.on_invalid_row == "error":
                        raise InputError(f"{source.name}, {reason}")
                    example = _Example(example.number, reason=reason)
            examples.append(example)
        return examples

    def _tell_skipped(self, source: str, skipped: dict[int, str], total: int) -> None:
        """Say once of a source which rows, by number, are skipped and why."""
        if source not in self.skipped:
            told = "; ".join(skipped[number] for number in sorted(skipped)[:3])
            rank_zero_warn(f"{printable(source)}: {len(skipped)} of {total} rows are skipped: {told}")
        self.skipped[source] = len(skipped)
        if len(skipped) == total:
            raise InputError(f"{source} has no rows that can be used")

    def _split_indices(self, split: str, n: int) -> np.ndarray | None:
        """Which of the n rows read belong to the split; None for all of them."""
        if split not in ("train", "val") or (split == "val" and self._has_own_val()):
            return None
        order = np.random.default_rng(self.split_seed).permutation(n)
        n_val = 0 if self._has_own_val() else max(1, round(n * self.val_fraction))
        if split == "val":
            return np.sort(order[:n_val])
        n_train = max(1, round((n - n_val) * self.train_fraction))
        return None if n_train == n else np.sort(order[n_val : n_val + n_train])

    def row_number(self, split: str, row: int) -> int:
        """The number of a row, from 1, in its file."""
        return self.rows[split][row][_NUMBER]

    def text(self, split: str, row: int) -> str:
        """The text of a row's template fields, as the source holds it."""
        return " | ".join(self.rows[split][row][field].strip() for field in self.template.fields)

    def prompt_spec(self) -> dict[str, Any]:
        """How a model is asked, and what it can answer: the template, the names that its fields' columns may have, the
        class names, how many tokens a text may have, and whether quotes enclose values."""
        columns = {
            field: list(dict.fromkeys([self.columns.get(field, field), field, *self.ALIASES.get(field, ())]))
            for field in self.template.fields
        }
        return {
            "template": self.template.text,
            "columns": columns,
            "labels": self.labels,
            "max_length": self._max_length(),
            "quoting": self.quoting,
        }

    def description(self) -> dict[str, Any]:
        """What a run says of its data: sources, template, classes, rows in each split read."""
        return {
            "class": type(self).__name__,
            "files": {split: file for split, file in self.files.items() if file is not None},
            "hub_id": self.hub_id,
            **self.prompt_spec(),
            "rows": {split: len(rows) for split, rows in self.encoded.items()},
            "skipped": self.skipped,
            "batch_size": self.batch_size,
        }


def balanced(labels: np.ndarray, how: Literal["oversample", "undersample"], seed: int) -> np.ndarray:
    """Row numbers (N,), ascending, in which every class that occurs is equally frequent.

    ``undersample`` draws from the larger classes as many rows as the smallest has; ``oversample`` repeats rows of the
    smaller ones, each as often as the others but for one.
    """
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    n = (max if how == "oversample" else min)(map(len, classes))
    drawn = [np.resize(generator.permutation(rows), n) for rows in classes]
    return np.sort(np.concatenate(drawn))


def _first(examples: Iterator[_Example], n_rows: int, n_characters: int) -> Iterator[_Example]:
    """Yield the next examples until there are so many rows or characters."""
    for example in islice(examples, n_rows):
        yield example
        n_characters -= sum(map(len, example.texts.values()))
        if n_characters <= 0:
            return


def _schema(fields: Iterable[str]) -> pa.Schema:
    import pyarrow as pa

    texts = [(field, pa.large_string()) for field in fields]
    tokens = (_TOKENS, pa.large_list(pa.int32()))
    return pa.schema([(_NUMBER, pa.int64()), *texts, tokens, (_LABEL, pa.int64()), (_REASON, pa.large_string())])


def _token_rows(rows: Dataset) -> TokenDataset:
    column = rows.data.column(_TOKENS).combine_chunks()
    return TokenDataset(column.values.to_numpy(), column.offsets.to_numpy(), np.asarray(rows.data.column(_LABEL)))
