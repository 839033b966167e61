"""Protocols of datamodules and tasks.

Tasks use the protocols of datamodules; commands and callbacks use those of tasks. Classes need not derive from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import get_annotations
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gpt2_pl.optim import NamedParameters
from gpt2_pl.utils.registry import class_path


class RowTable(NamedTuple):
    """Outputs of a task for the rows of a split, which are written as ``<name>_<split>.csv``.

    ``gpt2-pl compare`` computes confidence intervals from a table named ``predictions`` with the columns ``text``,
    ``label`` and ``prediction``: from the classes if the table has columns ``p(<class>)``, otherwise from the columns
    with the names of the task's metrics. Such a column holds the metric of every row, and its mean is the score. If
    the task has the metrics ``pearson`` or ``spearman``, they are computed from the labels and the predictions. In a
    table named ``losses``, the columns ``n_tokens`` and ``loss`` hold the number of targets of every row and the sum of
    their losses, and rows with the same ``cluster`` count as one text.

    Args:
        name: name of the file without the split, such as ``predictions``.
        columns: names of the columns.
        rows: cells of every row.
    """

    name: str
    columns: Sequence[str]
    rows: Iterable[Sequence[object]]


@runtime_checkable
class LayeredModule(Protocol):
    """Module with layers that callbacks treat differently."""

    def layer_groups(self) -> dict[str, NamedParameters]:
        """Return the named parameters of each layer, from input to output."""
        ...


@runtime_checkable
class TokenizedData(Protocol):
    """Tokenized data."""

    tokenizer: Any  #: a ``tokenizers.Tokenizer``


@runtime_checkable
class RowData(Protocol):
    """Data whose rows are read from a file."""

    def row_number(self, split: str, row: int) -> int:
        """Return the number of a row in its file, counted from 1."""
        ...

    def text(self, split: str, row: int) -> str:
        """Return the text of a row."""
        ...


@runtime_checkable
class KeepingData(Protocol):
    """Data with columns that are copied to the file of predictions."""

    def kept_columns(self, split: str) -> Sequence[str]:
        """Return the names of the columns."""
        ...

    def kept_values(self, split: str, row: int) -> Sequence[object]:
        """Return the values of a row in these columns."""
        ...


@runtime_checkable
class PredictionForm(Protocol):
    """Data that choose what is written of predicted rows."""

    predict_columns: Sequence[str] | None  #: columns in their order, each with ``=NEW`` if renamed; None for all
    predict_labels: str  #: ``names`` or ``numbers``: how a predicted class is written


@runtime_checkable
class ClusteredData(Protocol):
    """Data that know which rows belong together, such as contexts that are cut from one text.

    ``gpt2-pl compare`` takes clusters instead of rows as independent texts.
    """

    def clusters(self, split: str) -> Sequence[int] | None:
        """Return the cluster of every row of a split, or None if rows are independent or this is not known."""
        ...


@runtime_checkable
class LabelledData(Protocol):
    """Labelled data."""

    labels: list[str]  #: names of the classes, in their order


@runtime_checkable
class PromptedData(Protocol):
    """Data with a prompt template."""

    def prompt_spec(self) -> dict[str, Any]:
        """Return the template, the names of its columns, the class names and the largest number of tokens."""
        ...


@runtime_checkable
class ReadableData(Protocol):
    """Data that can be read in order, independently of the trainer."""

    def evaluation_dataloader(self, split: str) -> Any:
        """Return a dataloader that yields each row of a split once."""
        ...


@runtime_checkable
class LabelledRows(RowData, ReadableData, Protocol):
    """Rows with a label and the texts of a template's fields; ``gpt2-pl references`` uses it."""

    rows: dict[str, Any]  #: texts of each split by field, a column each
    encoded: dict[str, Any]  #: tokens and ``labels`` (N,) of each split
    template: Any  #: the prompt, with its ``fields``


@runtime_checkable
class ClassificationRows(LabelledRows, LabelledData, Protocol):
    """Rows whose labels are classes; ``gpt2-pl references`` uses it."""

    num_classes: int


@runtime_checkable
class SourceTargetData(Protocol):
    """Rows with a given source and a target that is generated from it; ``gpt2-pl references`` uses it.

    The source of a poem is its first lines, its target the other lines.
    """

    max_length: int | None  #: largest number of tokens of a row; None for the model's

    def has_split(self, split: str) -> bool:
        """Return whether there are data for a split."""
        ...

    def setup(self, stage: str) -> None:
        """Read the splits of a stage."""
        ...

    def sources(self, split: str) -> Sequence[str]:
        """Return the source of every row of a split."""
        ...

    def targets(self, split: str) -> Sequence[str]:
        """Return the target of every row of a split."""
        ...


@runtime_checkable
class PreferenceData(TokenizedData, Protocol):
    """Texts that are divided into a prompt and a continuation, and pairs of continuations of a prompt."""

    def continuations(self, split: str, prompt_tokens: int, max_tokens: int) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of the prompt and of the continuation of each text."""
        ...

    def read_pairs(self, file: str, key: str) -> list[tuple[list[int], list[int], list[int]]]:
        """Return the tokens of the prompt and of the preferred and the rejected continuation of each row of a file."""
        ...

    def use_pairs(self, split: str, pairs: Sequence[tuple[list[int], list[int], list[int]]]) -> Any:
        """Set the pairs of a split; those of ``train`` are trained on."""
        ...

    def cached_texts(self, key: Any, draw: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Return drawn texts from a cache, or draw them."""
        ...

    def pair_dataloader(self, split: str) -> Any:
        """Return a dataloader that yields each pair of a split once."""
        ...


@runtime_checkable
class PoemData(TokenizedData, Protocol):
    """Poems whose first lines are the prompt."""

    poems: dict[str, Any]  #: poems of each split
    prompt_lines: int  #: number of lines of the prompt
    eval_batch_size: int  #: number of poems in a batch


@runtime_checkable
class ReferencedData(TokenizedData, Protocol):
    """Sources with references, which :class:`~gpt2_pl.tasks.DataToText` generates targets for."""

    eval_batch_size: int  #: number of sources in a batch

    def text(self, split: str, row: int) -> str:
        """Return the text of a source."""
        ...

    def prompts(self, split: str) -> Sequence[list[int]]:
        """Return the token ids of the text before the target of every source."""
        ...

    def references(self, split: str) -> Sequence[Sequence[str]]:
        """Return the references of every source."""
        ...

    def is_seen(self, split: str) -> Sequence[bool | None]:
        """Return for every source whether its category occurs in training; None if this is not known."""
        ...


@runtime_checkable
class TextPredictor(Protocol):
    """Task that predicts something for every text."""

    prompt_spec: dict[str, Any] | None  #: prompt of the training data

    @property
    def max_length(self) -> int:
        """Largest number of tokens in a text."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        ...


@runtime_checkable
class NumberPredictor(TextPredictor, Protocol):
    """Task that predicts a number for every text; ``gpt2-pl classify`` uses it."""

    def predict_number(self, batch: dict[str, Any]) -> Tensor:
        """Return the number (B,) of every text of a batch."""
        ...


@runtime_checkable
class TextClassifier(TextPredictor, Protocol):
    """Task that classifies texts; ``gpt2-pl classify`` uses it."""

    num_classes: int

    def predict_proba(self, batch: dict[str, Any]) -> Tensor:
        """Return the class probabilities (B, K) of a batch."""
        ...

    def predict_class(self, probability: Tensor, split: str | None = None) -> Tensor:
        """Return the predicted class (B,) for class probabilities (B, K)."""
        ...


@runtime_checkable
class WordClassifier(Protocol):
    """Task whose classes may be words; data with demonstrations use it."""

    label_words: list[str] | None  #: word of each class; None for classes without words


@runtime_checkable
class FeatureClassifier(TextClassifier, Protocol):
    """Classifier of pooled hidden states; ``gpt2-pl references`` uses it."""

    def encode(self, batch: dict[str, Any]) -> Tensor:
        """Return the pooled hidden states (B, C) of a batch."""
        ...


@runtime_checkable
class FeaturePredictor(NumberPredictor, Protocol):
    """Task that predicts a number from pooled hidden states; ``gpt2-pl references`` uses it."""

    def encode(self, batch: dict[str, Any]) -> Tensor:
        """Return the pooled hidden states (B, C) of a batch."""
        ...


@runtime_checkable
class TextGenerator(Protocol):
    """Task that continues texts; ``gpt2-pl generate`` uses it."""

    def continue_prompts(
        self, tokenizer: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        """Return the tokens that continue each prompt."""
        ...


class ScoredTexts(NamedTuple):
    """Scores of generated texts.

    Args:
        scores: the scores by name, such as ``chrf``.
        table: what every row adds to the scores, as :meth:`Task.row_table() <gpt2_pl.tasks.Task.row_table>` returns it,
            without losses.
        samples: the texts, as :meth:`Task.samples() <gpt2_pl.tasks.Task.samples>` returns them.
    """

    scores: dict[str, float]
    table: RowTable
    samples: dict[str, str]


@runtime_checkable
class ScoredGenerator(TextGenerator, Protocol):
    """Task that generates targets for sources and scores them; ``gpt2-pl references`` uses it."""

    samples_name: str  #: name of the file of generated texts, without the split

    @property
    def max_length(self) -> int:
        """Largest number of tokens in a text."""
        ...

    def score_texts(self, data: Any, split: str, texts: Sequence[str]) -> ScoredTexts:
        """Score one text for every row of a split of :class:`SourceTargetData` as if the task had generated it."""
        ...


def lacks(task: object, protocol: type) -> str:
    """Describe the members of a protocol that a task lacks, for error messages.

    Args:
        task: an object that does not implement ``protocol``.
        protocol: a class of this module.
    """
    classes = [cls for cls in protocol.__mro__ if cls.__module__ == __name__]
    members = {name for cls in classes for name in (*get_annotations(cls), *vars(cls)) if not name.startswith("_")}
    missing = sorted(name for name in members if not hasattr(task, name))
    return f"{class_path(type(task))} lacks {', '.join(missing)} (see {__name__}.{protocol.__name__})"
