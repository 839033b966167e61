"""Text classification data from files or the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gpt2_pl.datamodules.batching import TokenDataset
from gpt2_pl.datamodules.few_shot import draw_shots, in_turn, prepend, run_seed, shuffled_classes
from gpt2_pl.datamodules.labelled import LabelledText
from gpt2_pl.datamodules.rows import LabelError, Row, RowSource, parse_label
from gpt2_pl.errors import InputError, listing, shorten
from gpt2_pl.tasks.protocols import WordClassifier

if TYPE_CHECKING:
    from datasets import Dataset

_MAX_LABEL, _MAX_LISTED = 60, 8  # characters of a value, and number of values, in an error message
_EXAMPLE_END = "\n"  # after the label word of an example in the prompt


class TextClassification(LabelledText):
    """Datamodule of rows with one or more texts and a class.

    Batches contain ``input_ids`` and ``attention_mask`` (B, T), padded on the right, ``labels`` (B,) and ``row`` (B,).

    Args:
        labels: class names in the order of their indices; defaults to negative, positive. The labels of rows are class
            names or class indices.
        balance: how to make the training classes equally frequent: ``undersample`` drops rows of the larger classes,
            ``oversample`` repeats rows of the smaller classes. ``split_seed`` seeds the sample.
        shots: number of training rows of each class, drawn with ``seed_everything``: the same in all runs with one
            seed, and among those of more shots. Defaults to all rows.
        demonstrations: number of training rows with their label words that precede every evaluated text in its prompt
            (Brown et al. 2020), or ``all``: of the classes in turn, drawn with ``seed_everything``. They need a
            verbalizer, and no training. If the prompt is too long for the model, the last of them are left out.
        predict_labels: how ``gpt2-pl predict`` writes a class: its name, or its number from 0.
        **kwargs: arguments of :class:`~gpt2_pl.datamodules.labelled.LabelledText`.

    Raises:
        InputError: an argument is out of range; in ``prepare_data``, a file, column, label or text is invalid, a class
            has fewer training rows than ``shots``, or there are fewer than ``demonstrations`` training rows.
    """

    def __init__(
        self,
        labels: list[str] | None = None,
        balance: Literal["oversample", "undersample"] | None = None,
        shots: int | None = None,
        demonstrations: int | Literal["all"] | None = None,
        predict_labels: Literal["names", "numbers"] = "names",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labels = list(labels or ("negative", "positive"))
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise InputError(key="data.labels", value=self.labels, expected="at least two different names")
        if shots is not None and shots < 1:
            raise InputError(key="data.shots", value=shots, expected="at least 1")
        if shots is not None and balance is not None:
            expected = "null with data.shots, which draws equally many rows of each class"
            raise InputError(key="data.balance", value=balance, expected=expected)
        if isinstance(demonstrations, int) and demonstrations < 1:
            raise InputError(key="data.demonstrations", value=demonstrations, expected="at least 1, or all")
        self.balance, self.shots, self.demonstrations = balance, shots, demonstrations
        self.predict_labels = predict_labels
        self.mean_demonstrations: dict[str, float] = {}  # mean number of examples in a prompt, by split

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.labels)

    def _written_columns(self) -> list[str]:
        return [*super()._written_columns(), *(f"p({label})" for label in self.labels)]

    @property
    def _label_values(self) -> list[Any]:
        return self.labels

    def _parse_label(self, row: Row, column: str, source: str, number: int) -> int:
        return parse_label(row, column, self.labels, source, number)

    def _encode_source(
        self, source: RowSource, permutation: dict[str, str], labeled: bool
    ) -> tuple[TokenDataset, Dataset]:
        try:
            return super()._encode_source(source, permutation, labeled)
        except LabelError as error:
            column = self.column(self.label_column, source.columns)
            rows = (row for _, row in source.read([column], skip_bad=True) if isinstance(row, dict))
            found = {str(row[column]).strip()[:_MAX_LABEL] for row in rows if row[column] is not None}
            values = listing(map(shorten, found), _MAX_LISTED)
            advice = f"data.labels must name the classes, and data.label_column their column, whose values are {values}"
            raise InputError(f"{error}; {advice}", key="data.labels", value=self.labels) from None

    def _chosen_rows(self, labels: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
        """Draw the shots or balance the classes; a row is drawn with its fields in all their orders."""
        if self.shots is not None:
            drawn = draw_shots(labels, rows[rows < num_rows], self.shots, self.labels, run_seed())
            return rows[np.isin(rows % num_rows, drawn)]
        return rows if self.balance is None else rows[balanced(labels[rows], self.balance, self.split_seed)]

    def prompt_spec(self) -> dict[str, Any]:
        """Return the prompt format with the class names, which checkpoints store to classify new rows."""
        return {**super().prompt_spec(), "labels": self.labels}

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record, with the numbers of rows of each class and of demonstrations."""
        labels = {split: rows.labels for split, rows in self.encoded.items() if rows.labels is not None}
        counts = {split: np.bincount(one, minlength=self.num_classes).tolist() for split, one in labels.items()}
        used = {"demonstrations": self.mean_demonstrations} if self.mean_demonstrations else {}
        return {**super().description(), "class_counts": counts, **used}

    # Demonstrations

    def prepare_data(self) -> None:
        """Check and encode all data of the run, and whether the model can use demonstrations."""
        if self.demonstrations is not None:
            self._check_demonstrations()
        super().prepare_data()

    def _check_demonstrations(self) -> None:
        key, trainer = "data.demonstrations", self.trainer
        if self._label_words() is None:
            message = f"{key} requires model.head verbalizer, whose label words answer the examples"
            raise InputError(message, key=key, value=self.demonstrations)
        if not self.has_split("train"):
            raise InputError(f"{key} requires data.train_file, whose rows are the examples", key=key)
        if trainer is not None and trainer.state.fn == "fit" and trainer.max_epochs != 0:
            message = f"{key} requires an evaluation without training: trainer.max_epochs 0, or gpt2-pl validate"
            raise InputError(message, key=key, value=self.demonstrations)

    def _label_words(self) -> list[str] | None:
        """Return the words of the classes of the trainer's task; None if it has none."""
        task = None if self.trainer is None else self.trainer.lightning_module
        return task.label_words if isinstance(task, WordClassifier) else None

    def _encode(self, split: str) -> TokenDataset:
        encoded = super()._encode(split)
        if self.demonstrations is None or split == "train":
            return encoded
        encoded, self.mean_demonstrations[split] = prepend(encoded, self._examples(), self._max_length())
        return encoded

    def _examples(self) -> list[list[int]]:
        """Return the token ids of the examples in the order of the prompt.

        Raises:
            InputError: there are too few training rows.
        """
        if "train" not in self.encoded:
            self.encoded["train"] = self._encode("train")
        labels: np.ndarray = np.asarray(self.encoded["train"].labels)
        order = in_turn(shuffled_classes(labels, np.arange(len(labels)), self.num_classes, run_seed()))
        if isinstance(self.demonstrations, int):
            if self.demonstrations > len(order):
                expected = f"at most {len(order)}, the number of training rows, or all"
                raise InputError(key="data.demonstrations", value=self.demonstrations, expected=expected)
            order = order[: self.demonstrations]
        words, rows = self._label_words(), self.rows["train"]
        assert words is not None  # checked before
        texts = [f"{self.template.fill(rows[int(n)])}{words[labels[n]]}{_EXAMPLE_END}" for n in order]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]


def balanced(labels: np.ndarray, how: Literal["oversample", "undersample"], seed: int) -> np.ndarray:
    """Resample rows so that all classes that occur are equally frequent.

    Args:
        labels: class index of each row.
        how: ``undersample`` samples as many rows of each class as the smallest class has. ``oversample`` repeats rows
            until each class has as many as the largest; how often two rows of a class occur differs by at most one.
        seed: seed of the sample.

    Returns:
        Row indices (N,) in ascending order.
    """
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    n = (max if how == "oversample" else min)(map(len, classes))
    samples = [np.resize(generator.permutation(rows), n) for rows in classes]
    return np.sort(np.concatenate(samples))
