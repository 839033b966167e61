"""Rows with texts and a label, from files or the Hugging Face hub."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import tokenizers
from lightning.pytorch.utilities import rank_zero_warn

from gpt2_pl import __version__
from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import TokenDataset
from gpt2_pl.datamodules.cache import cached
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.datamodules.readers import read_file, read_hub
from gpt2_pl.datamodules.rows import Row, RowSource, batches, parse_text, require_columns
from gpt2_pl.errors import InputError, printable
from gpt2_pl.text.normalization import Step
from gpt2_pl.utils.columns import check_kept, choose_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Cached columns in addition to the template fields; their names contain blanks, so that they never equal a field.
_NUMBER, _TOKENS, _LABEL, _REASON = "row number", "token ids", "label", "reason to skip"
_LOST = "number of tokens removed"
_CACHE_FORMAT = 10  # part of every cache key; increment it when the cached contents change
_KEPT = "kept {}"  # a column that is copied to the file of predictions
_WRITTEN = ("row", "text", "label", "prediction")  # other columns of the file of predictions
_BATCH_ROWS, _BATCH_CHARACTERS = 5000, 1 << 24  # limits of the rows that are encoded together


class LabelledText(TextData):
    """Datamodule of rows with one or more texts and a label; subclasses define what a label is.

    Batches contain ``input_ids`` and ``attention_mask`` (B, T), padded on the right, ``labels`` (B,) and ``row`` (B,).

    Args:
        train_file: training data: a CSV, TSV, JSON lines or Parquet file, or a list of such files.
        val_file: validation data; by default, a fraction of the training rows.
        test_file: test data.
        predict_file: rows to predict, without labels.
        hub_id: dataset on the Hugging Face hub; ignored if a train, val or test file is given.
        hub_config: configuration of the hub dataset, if it has several.
        columns: column of each template field whose name differs from the column's.
        label_column: column of the labels.
        template: text of a row, with ``{field}`` as the placeholder of a column's text.
        normalize: steps that change a text before it is inserted into the template: ``lowercase``, and
            ``space_punctuation``, which puts a space before every ``.``, ``?``, ``,`` and ``'``, and replaces runs of
            white space by one space. Checkpoints store them, so that ``classify`` changes new texts in the same way.
        keep: columns of ``predict_file`` that are copied to the file of predictions, such as ``[id]``.
        predict_columns: columns of the file of predictions, in this order, each with a new name if it has one, such as
            ``[id, prediction=label]``; defaults to all.
        tokenizer: folder or hub id of the tokenizer; on the command line it defaults to that of the pretrained base.
        max_length: maximum number of tokens in a row; defaults to the context length of the model. Longer texts are
            truncated; the rest of the template is not.
        batch_size: rows per process and step.
        eval_batch_size: rows per process and step in validation, test and prediction.
        val_fraction: fraction of the training rows used for validation if there is no validation set, in (0, 1).
            Training rows with the same texts as a validation row are dropped.
        train_fraction: fraction of the remaining training rows to use, sampled once with ``split_seed``, in (0, 1].
        split_seed: seed of ``val_fraction`` and ``train_fraction``.
        steps_per_epoch: optimizer steps in an epoch, after which a checkpoint is written; None for those of one pass
            over the training rows. Epochs are cut from consecutive passes: a long epoch repeats the rows, each pass in
            a new order, and a short one is followed by the rest of its pass.
        quoting: whether double quotes enclose values in delimited files; defaults to True except for MRPC files.
        on_invalid_row: ``error`` or ``skip``. A row is invalid if it has no text, has an invalid label, is not UTF-8,
            has too many or too few values, or is not a JSON object. metrics.json counts skipped rows.

    Raises:
        InputError: an argument is out of range; in ``prepare_data``, a file, column, label or text is invalid.
    """

    ALIASES: ClassVar[dict[str, tuple[str, ...]]] = {}  # other names of a field or label column in published datasets
    LABEL_TYPE: ClassVar[str] = "int64"  # Arrow's name of the type of a label
    NO_LABEL: ClassVar[float] = -1  # of a row without a label
    predict_labels: Literal["names", "numbers"] = "names"

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
        template: str = "{sentence}",
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        quoting: bool | None = None,
        on_invalid_row: Literal["error", "skip"] = "error",
        normalize: list[Step] | None = None,
        keep: list[str] | None = None,
        predict_columns: list[str] | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        if isinstance(train_file, list) and not train_file:
            raise InputError(key="data.train_file", value=train_file, expected="a file or a list of files")
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        sizes = (max_length, batch_size, eval_batch_size)
        super().__init__(files, hub_id, tokenizer, *sizes, val_fraction, train_fraction, split_seed, steps_per_epoch)
        self.columns = dict(columns or {})
        self.label_column = label_column
        self.template = Template(template, normalize or ())
        self.hub_config, self.quoting = hub_config, quoting
        self.skip_bad = on_invalid_row == "skip"
        self.keep = list(keep or ())
        self.predict_columns = None if predict_columns is None else list(predict_columns)
        check_kept(self.keep, _WRITTEN, "data.keep")
        self.rows: dict[str, Dataset] = {}  # texts and row numbers of each split
        self.skipped: dict[str, int] = {}  # number of invalid rows in each source
        self.dropped_duplicates: int | None = None  # training rows that equal a validation row of data.val_fraction

    # Labels

    @property
    @abstractmethod
    def _label_values(self) -> list[Any]:
        """What determines the label of a row in addition to its value, for the key of the cache."""

    @abstractmethod
    def _parse_label(self, row: Row, column: str, source: str, number: int) -> float:
        """Return the label in a column of a row.

        Raises:
            InputError: the value is not a label.
        """

    def _chosen_rows(self, labels: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
        """Return the rows to train on, in ascending order; a subclass may leave out or repeat some.

        Args:
            labels: label of each encoded row.
            rows: indices of the rows of the training split.
            num_rows: number of rows of the source. Row ``i + num_rows`` is row i with its fields in another order.
        """
        return rows

    # Reading and encoding

    def _sources(self, split: str) -> list[RowSource]:
        """Open all sources of a split that has its own files or hub split."""
        if (files := self.files[split]) is not None:
            files = [files] if isinstance(files, str) else files
            return [read_file(file, f"data.{split}_file", self.quoting) for file in files]
        assert self.hub_id is not None
        return [read_hub(self.hub_id, self.HUB_SPLITS[split], "data.hub_id", self.hub_config)]

    def column(self, name: str, columns: Sequence[str]) -> str:
        """Return the column of a template field or of the label.

        Args:
            name: template field or label column.
            columns: all columns of a source.

        Returns:
            The column that ``data.columns`` assigns, else the column of the same name, else the first alias of a
            published dataset that is a column, else ``name``.
        """
        if name in self.columns or name in columns:
            return self.columns.get(name, name)
        return next((alias for alias in self.ALIASES.get(name, ()) if alias in columns), name)

    def _field_permutations(self, split: str) -> list[dict[str, str]]:
        """Return assignments of a row's fields to template fields; every one after the first augments the split."""
        return [{field: field for field in self.template.fields}]

    def _encode(self, split: str) -> TokenDataset:
        import datasets

        sources = self._sources(self._source_split(split))
        parts, indices, start = [], [], 0
        for permutation in self._field_permutations(split):
            encoded_sources = [self._encode_source(source, permutation, split != "predict") for source in sources]
            n = sum(len(encoded) for encoded, _ in encoded_sources)
            indices.append(start + self._split_indices(split, n))
            parts += encoded_sources
            start += n
        encoded = TokenDataset.concatenate([part for part, _ in parts])
        texts = datasets.concatenate_datasets([part for _, part in parts])
        rows = np.concatenate(indices)
        if split == "train" and not self._has_own_val():
            if "val" not in self.rows:
                self.encoded["val"] = self._encode("val")
            val_keys = {self._dedup_key(row) for row in self.rows["val"].select_columns(self.template.fields)}
            train_keys = map(self._dedup_key, texts.select(rows).select_columns(self.template.fields))
            is_own = np.array([key not in val_keys for key in train_keys], dtype=bool)
            self._note_duplicates(len(np.unique(rows[~is_own] % n)))
            rows = rows[is_own]
        if split == "train":
            assert encoded.labels is not None
            rows = self._chosen_rows(encoded.labels, rows, n)
        if not np.array_equal(rows, np.arange(len(encoded))):
            encoded, texts = encoded.select(rows), texts.select(rows)
        self.rows[split] = texts
        return encoded

    def _note_duplicates(self, n: int) -> None:
        """Record and say how many training rows are dropped because a validation row has the same texts."""
        self.dropped_duplicates = n
        if n:
            rows = "row has" if n == 1 else "rows have"
            self._warn_once(f"{n:,} training {rows} the texts of a validation row (data.val_fraction): dropped")

    def _dedup_key(self, row: Mapping[str, str]) -> Hashable:
        """Return a key that is equal for rows with the same texts."""
        return tuple(self.template.normalizer(row[field]) for field in self.template.fields)

    def _encode_source(
        self, source: RowSource, permutation: dict[str, str], labeled: bool
    ) -> tuple[TokenDataset, Dataset]:
        """Encode the valid rows of a source.

        Args:
            source: the rows.
            permutation: field of the rows for each template field.
            labeled: whether to read labels.

        Returns:
            Token ids and labels, and the texts of the same rows by field.

        Raises:
            InputError: a column is missing or used twice, a row is invalid, or all rows are skipped.
        """
        fields = {field: self.column(name, source.columns) for field, name in permutation.items()}
        label_column = self.column(self.label_column, source.columns) if labeled else None
        kept = [] if labeled else self.keep
        columns = [column for column in dict.fromkeys([*fields.values(), label_column, *kept]) if column is not None]
        require_columns(source, list(fields.values()), keys="data.columns")
        require_columns(source, [label_column] if label_column is not None else [], keys="data.label_column")
        require_columns(source, kept, keys="data.keep")
        if len(set(fields.values())) < len(fields):
            raise InputError(key="data.columns", value=fields, expected="a different column to each template field")
        labels, max_length = self._label_values if labeled else None, self._max_length()
        tokenizer = self.tokenizer.to_str()
        key = [_CACHE_FORMAT, __version__, tokenizers.__version__, source.fingerprint, self.template.text, fields]
        key += [label_column, labels, max_length, tokenizer, self.skip_bad, self.template.normalizer.steps]
        key += [kept]
        schema, read = _schema(fields, self.LABEL_TYPE, kept), source.read(columns, self.skip_bad)
        examples = (self._parse_row(source, number, row, fields, label_column, kept) for number, row in read)
        rows = cached("rows", key, schema, lambda: self._encode_batches(source.name, examples, schema))
        encoded, valid = _token_rows(rows), np.flatnonzero(rows.data.column(_REASON).is_null())
        if len(valid) < len(rows):
            self._warn_skipped(source, rows.data.column(_REASON).drop_null().to_pylist(), len(rows))
            encoded, rows = encoded.select(valid), rows.select(valid)
        if not labeled:
            encoded.labels = None
        return encoded, rows.select_columns([*fields, *map(_KEPT.format, kept), _NUMBER])

    def _encode_batches(self, source: str, examples: Iterable[Row], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Add the token ids to rows of :meth:`_parse_row`; skipped rows have a reason in place of texts and tokens."""
        import pyarrow as pa

        for batch in batches(examples, self._n_characters, _BATCH_ROWS, _BATCH_CHARACTERS):
            valid = [example for example in batch if _REASON not in example]
            encoded = self.template.encode_or_truncate(valid, self.tokenizer, self._max_length())
            for example, ids, lost in zip(valid, *encoded, strict=True):
                if ids:
                    example[_TOKENS], example[_LOST] = ids, lost
                    continue
                example[_REASON] = f"row {example[_NUMBER]}: {self.template.no_token(example)}"
                if not self.skip_bad:
                    raise InputError(f"{source}, {example[_REASON]}", key="data.tokenizer")
            yield pa.RecordBatch.from_pylist(batch, schema=schema)

    def _n_characters(self, example: Row) -> int:
        return sum(len(example.get(field, "")) for field in self.template.fields)

    def _parse_row(
        self,
        source: RowSource,
        number: int,
        row: Row | str,
        fields: dict[str, str],
        label_column: str | None,
        kept: Sequence[str],
    ) -> Row:
        """Return the number, the texts by field, the label and the kept values of a row, or the reason to skip it."""
        example: Row = {_NUMBER: number, _LABEL: self.NO_LABEL}
        if isinstance(row, str):
            return {**example, _REASON: row}
        try:
            texts = {field: parse_text(row, column, source.name, number) for field, column in fields.items()}
            if label_column is not None:
                example[_LABEL] = self._parse_label(row, label_column, source.name, number)
        except InputError as error:
            if not self.skip_bad:
                raise
            return {**example, _REASON: str(error).removeprefix(printable(f"{source.name}, "))}
        values = {_KEPT.format(column): "" if row[column] is None else str(row[column]) for column in kept}
        return {**example, **texts, **values}

    def _warn_skipped(self, source: RowSource, reasons: list[str], total: int) -> None:
        """Warn once per source about skipped rows.

        Args:
            source: the source.
            reasons: reason to skip each of the skipped rows.
            total: number of rows in the source.

        Raises:
            InputError: all rows are skipped.
        """
        if source.name not in self.skipped:
            skipped = f"{len(reasons)} of {total} rows are skipped: {'; '.join(reasons[:3])}"
            rank_zero_warn(f"{printable(source.name)}: {skipped}")
        self.skipped[source.name] = len(reasons)
        if len(reasons) == total:
            raise source.error(" has no valid rows")

    def prepare_data(self) -> None:
        """Check and encode all data of the run, and that the columns to write exist."""
        written = self._written_columns()
        check_kept(self.keep, written, "data.keep")
        choose_columns([*self.keep, *written], self.predict_columns, "data.predict_columns")
        super().prepare_data()

    def _written_columns(self) -> list[str]:
        """Return the columns of the file of predictions without those that are copied."""
        return ["row", "text", "prediction"]

    def kept_columns(self, split: str) -> list[str]:
        """Return the columns that are copied to the file of predictions of a split."""
        return self.keep if split == "predict" else []

    def kept_values(self, split: str, row: int) -> list[str]:
        """Return the values of a row in the columns that are copied."""
        return [self.rows[split][row][_KEPT.format(column)] for column in self.kept_columns(split)]

    def row_number(self, split: str, row: int) -> int:
        """Return the number of a row in its file, from 1."""
        return self.rows[split][row][_NUMBER]

    def text(self, split: str, row: int) -> str:
        """Return the original texts of a row's template fields, separated by ``|``."""
        return " | ".join(self.rows[split][row][field].strip() for field in self.template.fields)

    def prompt_spec(self) -> dict[str, Any]:
        """Return the prompt format, which checkpoints store to classify new rows.

        Returns:
            ``template``, ``normalize``, ``columns`` (possible column names of each template field), ``max_length`` and
            ``quoting``; of a classifier also ``labels``.
        """
        columns = {
            field: list(dict.fromkeys([self.columns.get(field, field), field, *self.ALIASES.get(field, ())]))
            for field in self.template.fields
        }
        return {
            "template": self.template.text,
            "normalize": self.template.normalizer.steps,
            "columns": columns,
            "max_length": self._max_length(),
            "quoting": self.quoting,
        }

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record, with the hub dataset, the prompt format and rows left out."""
        left_out = {"skipped": self.skipped, "dropped_duplicates": self.dropped_duplicates}
        return {**super().description(), "hub_id": self.hub_id, **self.prompt_spec(), **left_out}


def _schema(fields: Iterable[str], label_type: str, kept: Iterable[str]) -> pa.Schema:
    import pyarrow as pa

    texts = [(field, pa.large_string()) for field in (*fields, *map(_KEPT.format, kept))]
    tokens = [(_TOKENS, pa.large_list(pa.int32())), (_LOST, pa.int32())]
    return pa.schema(
        [(_NUMBER, pa.int64()), *texts, *tokens, (_LABEL, pa.type_for_alias(label_type)), (_REASON, pa.large_string())]
    )


def _token_rows(rows: Dataset) -> TokenDataset:
    column = rows.data.column(_TOKENS).combine_chunks()
    labels, lost = np.asarray(rows.data.column(_LABEL)), np.asarray(rows.data.column(_LOST).fill_null(0))
    return TokenDataset(column.values.to_numpy(), column.offsets.to_numpy(), labels, lost)
