"""What tasks ask of a datamodule, and commands and callbacks of a task. Classes need not derive from these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import get_annotations
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gpt2_pl.utils.registry import class_path


class RowTable(NamedTuple):
    """A task's outputs for the rows of a split, to be written as ``<name>_<split>.csv``.

    ``gpt2-pl compare`` computes intervals from a table named ``predictions`` with the columns ``text``, ``label`` and
    ``prediction``: from the classes where there are columns ``p(<class>)``, otherwise from the columns that have the
    names of the task's metrics. Such a column holds the metric of every row, and its mean is the score.

    Args:
        name: of the file, such as ``predictions``.
        columns: the header.
        rows: the cells of every row.
    """

    name: str
    columns: Sequence[str]
    rows: Iterable[Sequence[object]]


@runtime_checkable
class TokenizedData(Protocol):
    """Data whose texts are token ids."""

    tokenizer: Any  #: a ``tokenizers.Tokenizer``


@runtime_checkable
class RowData(Protocol):
    """Data whose rows are those of a file."""

    def row_number(self, split: str, row: int) -> int:
        """Return the number of a row in its file, from 1."""
        ...

    def text(self, split: str, row: int) -> str:
        """Return the text of a row."""
        ...


@runtime_checkable
class LabelledData(Protocol):
    """Data in classes."""

    labels: list[str]  #: the names of the classes, in their order


@runtime_checkable
class PromptedData(Protocol):
    """Data that is put into a template."""

    def prompt_spec(self) -> dict[str, Any]:
        """Return the template, the names of its columns and of the classes, and the longest text in tokens."""
        ...


@runtime_checkable
class ReadableData(Protocol):
    """Data that can be read in order, without the trainer."""

    def evaluation_dataloader(self, split: str) -> Any:
        """Return batches of a split, each row once."""
        ...


@runtime_checkable
class PoemData(TokenizedData, Protocol):
    """Poems of which the first lines are given."""

    poems: dict[str, Any]  #: the poems of each split
    prompt_lines: int  #: how many lines are given
    eval_batch_size: int  #: poems in a batch


@runtime_checkable
class TextClassifier(Protocol):
    """A task that puts texts in classes; ``gpt2-pl classify`` uses it."""

    num_classes: int
    prompt_spec: dict[str, Any] | None  #: of the data that it was trained on

    @property
    def max_length(self) -> int:
        """The longest text, in tokens."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        ...

    def predict_proba(self, batch: dict[str, Any]) -> Tensor:
        """Return the class probabilities (B, K) of a batch."""
        ...

    def predict_class(self, probability: Tensor, split: str | None = None) -> Tensor:
        """Return the class (B,) that probabilities (B, K) amount to."""
        ...


@runtime_checkable
class TextGenerator(Protocol):
    """A task that continues texts; ``gpt2-pl generate`` uses it."""

    def continue_prompts(
        self, tokenizer: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        """Return the tokens that continue each prompt."""
        ...


def lacks(task: object, protocol: type) -> str:
    """Describe which members of a protocol a task does not have, for error messages.

    Args:
        task: an object that is no instance of ``protocol``.
        protocol: one of the classes of this module.
    """
    classes = [cls for cls in protocol.__mro__ if cls.__module__ == __name__]
    members = {name for cls in classes for name in (*get_annotations(cls), *vars(cls)) if not name.startswith("_")}
    missing = sorted(name for name in members if not hasattr(task, name))
    return f"{class_path(type(task))} lacks {', '.join(missing)} (see {__name__}.{protocol.__name__})"
