"""Prompt formats of trained models: from texts to the text and the tokens that a model reads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt2_pl.datamodules.prompt_template import Template, Truncation
from gpt2_pl.errors import InputError, require
from gpt2_pl.tasks.protocols import TextPredictor
from gpt2_pl.text.poems import Poem, split_lines

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Text = str | Sequence[str] | Mapping[str, str]
"""A text; or, for a template of several fields, one text for each field: in order, or by field or column."""

_SURROGATE = re.compile("[\ud800-\udfff]")  # stands for bytes of the command line that are not UTF-8
_MAX_CHARACTERS = 1 << 24  # of a text that is not read from a file
_LENGTH = f"at most {_MAX_CHARACTERS:,} characters long"


class PromptFormat:
    """Prompt format of a checkpoint or an exported folder.

    Args:
        spec: the format, as :meth:`~gpt2_pl.tasks.protocols.PromptedData.prompt_spec` of the training data returns it.

    Attributes:
        template: the template, up to the target if there is one; None for a language model without a template.
        fields: names of its fields.
        columns: possible names of the column of each field in a file.
        max_length: maximum number of tokens; None for the model's.
        quoting: whether double quotes enclose values in delimited files; None if this is not known.
        prompt_lines: number of first lines of a poem that are its prompt in training; None without poems.
        is_poem: whether a prompt is the first lines of a poem.

    Raises:
        InputError: the template is invalid.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        template, target = spec.get("template"), spec.get("target")
        if template is not None and target is not None:
            template = template.rpartition(f"{{{target}}}")[0].rstrip(" ")
        self.template = None if template is None else Template(template, spec.get("normalize") or ())
        self.fields = [] if self.template is None else self.template.fields
        self.columns: dict[str, list[str]] = spec.get("columns") or {field: [field] for field in self.fields}
        self.max_length: int | None = spec.get("max_length")
        self.quoting: bool | None = spec.get("quoting")
        self.prompt_lines: int | None = spec.get("prompt_lines")
        self.is_poem = self.prompt_lines is not None

    def rows(self, texts: Sequence[Text], name: str = "text") -> list[dict[str, str]]:
        """Return the text of each field of the template, for every given text.

        Args:
            texts: as in :meth:`Predictor.predict() <gpt2_pl.inference.predictor.Predictor.predict>`.
            name: what error messages call a text.

        Raises:
            InputError: a text is blank or too long, or does not fit the template.
        """
        _require_list(texts, name)
        return [self._row(text, f"{name} {number}") for number, text in enumerate(texts, start=1)]

    def _row(self, text: Text, where: str) -> dict[str, str]:
        n = len(self.fields)
        expected = f"{n} text{'s' if n > 1 else ''}, {', '.join(self.fields)}"
        row: dict[str, Any] = {}
        if isinstance(text, Mapping):
            for field in self.fields:
                found = next((column for column in (field, *self.columns.get(field, ())) if column in text), field)
                row[field] = text.get(found)
        else:
            values = [text] if isinstance(text, str) or not isinstance(text, Sequence) else list(text)
            require(len(values) == n, where, text, expected)
            row = dict(zip(self.fields, values, strict=True))
        for field, value in row.items():
            is_text = isinstance(value, str) and bool(value.strip())
            require(is_text, where, value, f"a non-empty string{f' in {field!r}' if len(row) > 1 else ''}")
            require(not _SURROGATE.search(value), where, value, "UTF-8 text")
            require(len(value) <= _MAX_CHARACTERS, where, value, _LENGTH)
        return row

    def encode(self, rows: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> tuple[list[list[int]], Truncation]:
        """Return the token ids of every row of texts, and the counts of the truncated ones.

        A row with a text without tokens has an empty list.
        """
        assert self.template is not None
        assert self.max_length is not None
        ids, lost = self.template.encode_or_truncate(rows, tokenizer, self.max_length)
        read = [(len(row_ids), n) for row_ids, n in zip(ids, lost, strict=True) if row_ids]
        return ids, Truncation.of([length for length, _ in read], [n for _, n in read])

    def warn_of_truncation(self, counts: Truncation) -> None:
        """Warn of truncated texts, if there are any."""
        if counts.n_truncated:
            assert self.max_length is not None
            warnings.warn(counts.sentence(self.max_length), stacklevel=3)

    def no_token(self, row: Mapping[str, str]) -> str:
        """Return the error message for a row of texts without token ids."""
        assert self.template is not None
        return self.template.no_token(row)

    def fill(self, prompts: Sequence[Text], name: str = "prompt", as_is: bool = False) -> list[str]:
        """Return the text that a language model continues for each prompt.

        Args:
            prompts: the prompts, or the texts of a template's fields.
            name: what error messages call a prompt.
            as_is: whether prompts are returned as they are.

        Raises:
            InputError: the prompts are not a list; or a prompt is not a text or too long, or does not fit the template.
        """
        if self.template is not None and not as_is:
            return [self.template.fill(row) for row in self.rows(prompts, name)]
        _require_list(prompts, name)
        texts: list[str] = []
        for number, prompt in enumerate(prompts, start=1):
            text: Any = prompt
            if isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) == 1:
                text = prompt[0]
            require(isinstance(text, str), f"{name} {number}", prompt, 'one text (in JSON lines, that of "prompt")')
            require(as_is or bool(text.strip()), f"{name} {number}", prompt, "a text that is not blank (or use as_is)")
            require(len(text) <= _MAX_CHARACTERS, f"{name} {number}", prompt, _LENGTH)
            require(not _SURROGATE.search(text), f"{name} {number}", prompt, "UTF-8 text")
            texts.append(Poem(0, split_lines(text)).text if self.is_poem and not as_is else text)
        return texts


def _require_list(texts: Sequence[Text], name: str) -> None:
    """Check that texts are not a single text."""
    require(not isinstance(texts, str | Mapping), f"{name}s", texts, f"a list, such as [{name}]")


def complete_prompt_spec(task: TextPredictor, source: str) -> dict[str, Any]:
    """Return the prompt format of a classifier or regressor, which is complete and fits its model.

    Args:
        task: the classifier or regressor.
        source: its checkpoint or folder, for error messages.

    Raises:
        InputError: the prompt format is missing, incomplete, or does not fit the model.
    """
    spec: dict[str, Any] = task.prompt_spec or {}
    fault, num_classes = "", getattr(task, "num_classes", None)
    required = ("template", "columns", "max_length", *(() if num_classes is None else ("labels",)))
    if missing := [key for key in required if spec.get(key) is None]:
        fault = f"prompt_spec.{missing[0]} is missing"
    elif set(Template(spec["template"]).fields) != spec["columns"].keys() or not all(spec["columns"].values()):
        fault = "prompt_spec.columns must name a column for each template field"
    elif num_classes not in (None, len(spec.get("labels") or [])):
        fault = f"prompt_spec must have {num_classes} labels"
    elif not 1 <= spec["max_length"] <= task.max_length:
        fault = f"prompt_spec must have a max_length of 1 to {task.max_length}"
    if fault:
        raise InputError(f"{source} cannot be used to classify: {fault}", key="prompt_spec")
    return spec
