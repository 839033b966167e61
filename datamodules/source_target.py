"""Pairs of a source and a target, which a language model writes after it: data-to-text and other generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import TargetTokenDataset
from gpt2_pl.datamodules.prompt_template import Template
from gpt2_pl.datamodules.readers import read_file
from gpt2_pl.datamodules.rows import Row, RowSource, parse_text, require_columns
from gpt2_pl.errors import InputError, shorten

if TYPE_CHECKING:
    from tokenizers import Encoding

TEMPLATE = "{source}\n{target}"
_SEEN = {"true": True, "1": True, "false": False, "0": False}  # texts of a column of truth values


@dataclass(frozen=True)
class SourceRow:
    """A source and its references.

    Args:
        number: number of its first row in the file, from 1.
        where: file and number of this row, for error messages.
        texts: texts of the template's fields before the target.
        references: the targets; empty in prediction.
        is_seen: whether its category occurs in training; None if this is not known.
    """

    number: int
    where: str
    texts: Mapping[str, str]
    references: tuple[str, ...] = ()
    is_seen: bool | None = None


class SourceTargetPairs(TextData):
    """Datamodule of sources and targets, for :class:`~gpt2_pl.tasks.DataToText`.

    The prompt is the text of ``template`` before the target. Loss and perplexity are those of the target and the end of
    text. A target is a text or, in JSON lines and Parquet files, a list of texts: several references for one source.
    Rows with the same source are one source with several references as well. Training has a row for every reference;
    validation and test have a row for every source, whose loss is that of the first reference.

    Batches contain ``input_ids``, ``attention_mask`` and ``targets`` (B, T), padded on the right, and ``row`` (B,).

    Args:
        train_file: training data: a CSV, TSV, JSON lines or Parquet file, or a list of such files.
        val_file: validation data; by default, a fraction of the training sources.
        test_file: test data.
        predict_file: sources for which ``gpt2-pl predict`` generates targets.
        columns: column of each template field whose name differs from the column's.
        template: text of a row, with ``{field}`` as the placeholder of a column's text. The last field is the target,
            at the end of the template; spaces before it belong to it. A field ``target`` is also read from a column
            ``references``.
        train_references: ``all`` to train on every reference of a source, or ``first`` to train on the first one.
        seen_column: column that tells whether the category of a source occurs in training: true or false, 1 or 0; None
            if the data do not tell. Files without this column do not tell either.
        tokenizer: folder or hub id of the tokenizer; on the command line it defaults to that of the pretrained base.
        max_length: maximum number of tokens in a row; defaults to the context length of the model. Longer targets are
            truncated.
        batch_size: rows per process and step.
        eval_batch_size: rows per process and step in validation, test and generation.
        val_fraction: fraction of the training sources used for validation if there is no validation file, in (0, 1).
        train_fraction: fraction of the remaining training sources to use, in (0, 1].
        split_seed: seed of ``val_fraction`` and ``train_fraction``.
        quoting: whether double quotes enclose values in delimited files; defaults to True.

    Raises:
        InputError: an argument is out of range, or the template does not end with a target; in ``prepare_data``, a
            file, column or text is invalid, or a source leaves no room for a target.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        columns: dict[str, str] | None = None,
        template: str = TEMPLATE,
        train_references: Literal["all", "first"] = "all",
        seen_column: str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        split_seed: int = 0,
        quoting: bool | None = None,
    ) -> None:
        if isinstance(train_file, list) and not train_file:
            raise InputError(key="data.train_file", value=train_file, expected="a file or a list of files")
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        sizes = (max_length, batch_size, eval_batch_size)
        super().__init__(files, None, tokenizer, *sizes, val_fraction, train_fraction, split_seed)
        self.columns, self.quoting = dict(columns or {}), quoting
        self.train_references, self.seen_column = train_references, seen_column
        self.template, (*fields, self.target) = template, Template(template).fields
        end = f"{{{self.target}}}"
        if not fields or not template.endswith(end) or template.count(end) > 1:
            expected = r"text with two fields, the last of them at its end, such as {source}\n{target}"
            raise InputError(key="data.template", value=template, expected=expected)
        opening = template.removesuffix(end)
        self.prompt = Template(opening.rstrip(" "))
        self._space = " " * (len(opening) - len(opening.rstrip(" ")))  # at the start of every target
        self.rows: dict[str, list[SourceRow]] = {}
        self._prompt_ids: dict[str, list[list[int]]] = {}

    # Reading

    def _encode(self, split: str) -> TargetTokenDataset:
        files = self.files[self._source_split(split)]
        key = f"data.{self._source_split(split)}_file"
        opened = [read_file(file, key, self.quoting) for file in ([files] if isinstance(files, str) else files or [])]
        rows = [row for source in opened for row in self._read(source, split != "predict")]
        if split != "predict":
            rows = _grouped(rows)
        rows = [rows[i] for i in self._split_indices(split, len(rows))]
        self.rows[split] = rows
        prompts = self._encode_texts([self.prompt.fill(row.texts) for row in rows])
        limit = self._max_length()
        for row, prompt in zip(rows, prompts, strict=True):
            if not 1 <= len(prompt) < limit:
                expected = f"between 1 and {limit - 1} tokens, which leaves room for a target (data.max_length)"
                raise InputError(f"the prompt must have {expected}, got {len(prompt)}", key=key, source=row.where)
        self._prompt_ids[split] = prompts
        if split == "predict":
            ids = [np.array(prompt) for prompt in prompts]
            return TargetTokenDataset.of_rows([(row, np.full(len(row), -100)) for row in ids])
        pairs = self._pairs(split)
        targets = self._encode_texts([self._space + text for _, text in pairs])
        texts = [(prompts[i], target) for (i, _), target in zip(pairs, targets, strict=True)]
        lost = [max(0, len(prompt) + len(target) - limit) for prompt, target in texts]
        return TargetTokenDataset.of_rows([self._row(*text, limit) for text in texts], lost)

    def _pairs(self, split: str) -> list[tuple[int, str]]:
        """Return the source and the reference of every row of tokens."""
        many = split == "train" and self.train_references == "all"
        rows = enumerate(self.rows[split])
        return [(i, text) for i, row in rows for text in (row.references if many else row.references[:1])]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        encodings: list[Encoding] = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _row(self, prompt: list[int], target: list[int], max_length: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the token ids (T,) of a row and their targets (T,), -100 for the tokens of the prompt."""
        ids = np.array([*prompt, *target, self._end_of_text][: max_length + 1])
        targets = ids[1:].copy()
        targets[: len(prompt) - 1] = -100
        return ids[:-1], targets

    def _read(self, source: RowSource, has_targets: bool) -> Iterator[SourceRow]:
        """Yield the rows of a source, each with its targets if there are any."""
        names = {field: self._column(field, source.columns) for field in [*self.prompt.fields, self.target]}
        target = names.pop(self.target)
        columns = [*names.values(), *([target] if has_targets else [])]
        require_columns(source, columns, keys="data.columns")
        if len(set(columns)) < len(columns):
            raise InputError(key="data.columns", value=columns, expected="a different column to each template field")
        seen = self.seen_column if has_targets and self.seen_column in source.columns else None
        for number, row in source.read([*columns, *([seen] if seen and seen not in columns else [])]):
            assert isinstance(row, dict)
            where = f"{source.key}: {source.name}, row {number}"
            texts = {field: parse_text(row, column, source.name, number).strip() for field, column in names.items()}
            references = _parse_references(row, target, where) if has_targets else ()
            yield SourceRow(number, where, texts, references, _parse_seen(row, seen, where) if seen else None)

    def _column(self, field: str, columns: Sequence[str]) -> str:
        """Return the column of a template field."""
        if field in self.columns or field in columns:
            return self.columns.get(field, field)
        return "references" if field == "target" and "references" in columns else field

    # Rows for the task and the commands

    def row_number(self, split: str, row: int) -> int:
        """Return the number of a source's first row in its file, from 1."""
        return self.rows[split][row].number

    def text(self, split: str, row: int) -> str:
        """Return the texts of a source's template fields, separated by ``|``."""
        return " | ".join(self.rows[split][row].texts.values())

    def sources(self, split: str) -> list[str]:
        """Return the text before the target of every row of tokens."""
        return [self.prompt.fill(self.rows[split][i].texts).strip() for i, _ in self._pairs(split)]

    def targets(self, split: str) -> list[str]:
        """Return the target of every row of tokens."""
        return [text for _, text in self._pairs(split)]

    def prompts(self, split: str) -> list[list[int]]:
        """Return the token ids of the text before the target of every source."""
        return self._prompt_ids[split]

    def references(self, split: str) -> list[tuple[str, ...]]:
        """Return the references of every source."""
        return [row.references for row in self.rows[split]]

    def is_seen(self, split: str) -> list[bool | None]:
        """Return for every source whether its category occurs in training; None if this is not known."""
        return [row.is_seen for row in self.rows[split]]

    def prompt_spec(self) -> dict[str, Any]:
        """Return the template, its target and its columns, which checkpoints store to generate new targets."""
        columns = {field: list(dict.fromkeys([self.columns.get(field, field), field])) for field in self.prompt.fields}
        return {"template": self.template, "target": self.target, "columns": columns, "quoting": self.quoting}

    @property
    def perplexity_note(self) -> str:
        """Definition of the perplexity in validation and test, displayed with its values."""
        return "Perplexity of validation and test: that of the first reference of each source and the end of text."

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record, with the template and the number of references in each split."""
        references = {split: sum(len(row.references) for row in rows) for split, rows in self.rows.items()}
        shown = {"template": self.template, "train_references": self.train_references, "references": references}
        return {**super().description(), **shown}


class WebNLG(SourceTargetPairs):
    """Datamodule of WebNLG (Gardent et al. 2017): sets of RDF triples and sentences that say them.

    A source is the triples of a set as ``subject : property : object``, joined by `` | `` as in Li & Liang (2021). JSON
    lines have the columns ``source`` and ``target`` (one line per reference) or ``references`` (a list), and may have
    ``seen``.

    Args:
        seen_column: as in the base class.
        **kwargs: arguments of :class:`SourceTargetPairs`.
    """

    def __init__(self, seen_column: str | None = "seen", **kwargs: Any) -> None:
        super().__init__(seen_column=seen_column, **kwargs)


def _grouped(rows: Iterable[SourceRow]) -> list[SourceRow]:
    """Return one row for each source, with all its references, in the order of their first rows."""
    groups: dict[tuple[str, ...], SourceRow] = {}
    for row in rows:
        key = tuple(row.texts.values())
        first = groups.get(key)
        groups[key] = row if first is None else replace(first, references=first.references + row.references)
    return list(groups.values())


def _parse_references(row: Row, column: str, where: str) -> tuple[str, ...]:
    """Return the references in a column of a row, a text or a list of texts.

    Raises:
        InputError: the value is neither a text nor a list of texts, the list is empty, or a text is blank.
    """
    value = row[column]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        expected = "must be a non-empty string or a list of them"
        raise InputError(f"{where}: {column!r} {expected}, got {shorten(value)}", key=column)
    return tuple(text.strip() for text in texts)


def _parse_seen(row: Row, column: str, where: str) -> bool:
    """Return the truth value in a column of a row.

    Raises:
        InputError: it has none.
    """
    value = row[column]
    if (is_seen := _SEEN.get(str(value).strip().lower())) is None:
        raise InputError(f"{where}: {column!r} must be true or false, got {shorten(value)}", key=column)
    return is_seen
