"""Few training rows: the same number of every class, or examples that precede a text in its prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.datamodules.batching import Rows, TokenDataset
from gpt2_pl.errors import InputError


def run_seed() -> int:
    """Return the seed of the run, ``seed_everything``; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) % 2**63


def shuffled_classes(labels: NDArray[np.integer], rows: Rows, num_classes: int, seed: int) -> list[Rows]:
    """Return the rows of each class in a random order, which depends on the seed and the rows of the class only.

    Args:
        labels: label of each row of the source.
        rows: indices of the rows, in ascending order.
        num_classes: number of classes K.
        seed: seed of the order.

    Returns:
        K arrays of row indices.
    """
    of_rows = labels[rows]
    return [np.random.default_rng([seed, k]).permutation(rows[of_rows == k]) for k in range(num_classes)]


def draw_shots(labels: NDArray[np.integer], rows: Rows, shots: int, names: Sequence[str], seed: int) -> Rows:
    """Draw the same number of rows of every class; the rows of fewer shots are among those of more.

    Args:
        labels: label of each row of the source.
        rows: indices of the training rows, in ascending order.
        shots: number of rows of each class.
        names: names of the classes.
        seed: seed of the draw.

    Returns:
        Row indices in ascending order.

    Raises:
        InputError: a class has fewer rows.
    """
    classes = shuffled_classes(labels, rows, len(names), seed)
    counts = [len(of_class) for of_class in classes]
    smallest = int(np.argmin(counts))
    if counts[smallest] < shots:
        expected = f"at most {counts[smallest]}, the number of training rows of {names[smallest]!r}"
        raise InputError(key="data.shots", value=shots, expected=expected)
    return np.sort(np.concatenate([of_class[:shots] for of_class in classes]))


def in_turn(classes: Sequence[Rows]) -> Rows:
    """Return the first row of every class, then the second row of every class, and so on."""
    order = [(i, k) for k, of_class in enumerate(classes) for i in range(len(of_class))]
    return np.array([classes[k][i] for i, k in sorted(order)], dtype=np.int64)


def prepend(queries: TokenDataset, examples: Sequence[Sequence[int]], max_length: int) -> tuple[TokenDataset, float]:
    """Prepend to every row the first examples that fit, each of them whole.

    Args:
        queries: the rows.
        examples: token ids of each example, in the order of the prompt.
        max_length: maximum number of tokens in a row.

    Returns:
        The rows with examples, and the mean number of examples of a row.
    """
    ends = np.cumsum([0, *map(len, examples)])
    tokens = np.array([token for example in examples for token in example], dtype=queries.values.dtype)
    counts = np.searchsorted(ends, max_length - queries.lengths, side="right") - 1
    parts = [part for n, count in enumerate(counts) for part in (tokens[: ends[count]], queries.row(n))]
    offsets = np.concatenate([[0], np.cumsum(queries.lengths + ends[counts])])
    rows = TokenDataset(np.concatenate(parts), offsets, queries.labels, queries.lost)
    return rows, float(counts.mean())
