"""Tokenised rows in flat arrays, batches of similar length, and a loader that resumes in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = dict[str, Any]
Rows = NDArray[np.int64]

MEGABATCH_MULT = 400  # batches whose rows are sorted by length together; larger pads less and mixes less


class TokenDataset:
    """Token ids of all rows of a split, one after the other, with where each row ends.

    Args:
        values: all token ids, flat.
        offsets: (N + 1,) row n is ``values[offsets[n]:offsets[n + 1]]``.
        labels: (N,) class indices, or None where nothing is known.

    Attributes:
        lengths: (N,) tokens in each row.
        n_targets: (N,) tokens of each row that are to be predicted; None where rows have no ``targets``.
    """

    n_targets: NDArray[Any] | None = None

    def __init__(self, values: NDArray[Any], offsets: NDArray[Any], labels: NDArray[Any] | None = None) -> None:
        self.values, self.offsets, self.labels = values, offsets, labels
        self.lengths = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, n: int) -> NDArray[Any]:
        """The token ids of a row."""
        return self.values[self.offsets[n] : self.offsets[n + 1]]

    def select(self, rows: Rows) -> TokenDataset:
        """Some of the rows, in the order given, each as often as it is given."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], lengths.cumsum()])
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return TokenDataset(self.values[index], offsets, None if self.labels is None else self.labels[rows])

    @staticmethod
    def concatenate(parts: Sequence[TokenDataset]) -> TokenDataset:
        """All rows of several, which have labels all or none."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        values = np.concatenate([part.values[part.offsets[0] : part.offsets[-1]] for part in parts])
        labels = [part.labels for part in parts if part.labels is not None]
        return TokenDataset(values, np.concatenate([[0], lengths.cumsum()]), np.concatenate(labels) if labels else None)

    def batch(self, rows: Rows) -> Batch:
        """Rows as tensors, padded on the right to the longest of them.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T), ``row`` (B,) and, where known, ``labels`` (B,).
        """
        lengths = self.lengths[rows]
        text = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        input_ids = np.zeros(text.shape, dtype=np.int64)
        input_ids[text] = np.concatenate([self.row(n) for n in rows])
        batch: Batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(text.astype(np.int64)),
            "row": torch.from_numpy(rows),
        }
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch


def training_batches(lengths: NDArray[Any], batch_size: int, seed: int, epoch: int, world_size: int = 1) -> list[Rows]:
    """The global batches of one epoch, rows of similar length together: a function of the seed and the epoch.

    Rows are shuffled, sorted by length within pools of ``POOL`` batches, cut into batches, and the batches shuffled.
    Those that make no whole batch are any rows.

    Args:
        lengths: (N,) tokens in each row.
        batch_size: rows per process.
        seed: any integer.
        epoch: 0, 1, ...
        world: number of processes; process r takes every ``world``-th row of each batch, from r on.

    Returns:
        Arrays of ``batch_size * world`` rows, and a smaller one of what remains, which is left out where it is smaller
        than ``world``. Without that, every row occurs exactly once.
    """
    generator = np.random.default_rng([seed % 2**63, epoch])
    size = batch_size * world_size
    order, rest = np.split(generator.permutation(len(lengths)), [len(lengths) // size * size])
    batches = [rest] if len(rest) >= world_size else []
    for start in range(0, len(order), size * MEGABATCH_MULT):
        pool = order[start : start + size * MEGABATCH_MULT]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def evaluation_batches(
    lengths: NDArray[Any], batch_size: int, rank: int = 0, world_size: int = 1, limit: int | float = 1.0
) -> list[Rows]:
    """The batches of process ``rank``: every row in one batch of one process, rows of similar length together.

    Without a limit the longest rows come first. With one, the batches that will be evaluated hold a sample of the rows
    in which all lengths are represented evenly, whatever their order in the file. It is the same for any number of
    processes that evaluate as many rows.

    All processes have equally many batches, because those that share the weights gather them in step. For that a batch
    may be smaller, or one row larger, than ``batch_size``.

    Args:
        lengths: (N,) tokens in each row.
        batch_size: rows per process.
        rank: the process.
        world: number of processes.
        limit: the batches that will be evaluated: a number, or a share of all batches (a float), as for Lightning's
            ``limit_val_batches``.
    """
    sizes = _global_batch_sizes(len(lengths), batch_size, world_size)
    n = int(len(sizes) * limit) if isinstance(limit, float) else limit
    if n >= len(sizes):
        order = np.argsort(-lengths, kind="stable")
    else:
        shuffled = np.random.default_rng(0).permutation(len(lengths))
        by_length = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
        n_rows = sum(sizes[:n])
        sample = ((np.arange(n_rows) + 0.5) * (len(lengths) / max(n_rows, 1))).astype(np.int64)  # evenly spaced
        order = np.concatenate([by_length[sample], np.delete(by_length, sample)])
    return [rows[rank::world_size] for rows in np.split(order, np.cumsum(sizes)[:-1])] if sizes else []


def _global_batch_sizes(n_rows: int, batch_size: int, world_size: int) -> list[int]:
    """Rows in the batches of all processes together, of which each process has one or more."""
    n_full, rest = divmod(n_rows, batch_size * world_size)
    if rest == 0 or rest >= world_size:
        return [batch_size * world_size] * n_full + ([rest] if rest else [])
    return [len(part) for part in np.array_split(np.empty(n_rows), min(n_full + 1, n_rows // world_size))]


class PackedTokenDataset(TokenDataset):
    """A stream of tokens cut into contexts of T, each token predicting the next; the last context may be shorter.

    Args:
        tokens: (N,) the stream, in memory or mapped from disk.
        context: T.
        stride: tokens from the start of one context to the next. With less than T contexts overlap, and the targets
            that a context shares with the one before are not predicted again: every token but the first of the stream
            is predicted once, from T - stride + 1 or more tokens before it unless it is in the first context.
    """

    def __init__(self, tokens: NDArray[Any], context: int, stride: int | None = None) -> None:
        n_inputs, stride = len(tokens) - 1, stride or context
        n_rows = 1 + max(0, -(-(n_inputs - context) // stride))
        self.values = tokens
        self.starts = np.arange(n_rows) * stride
        self.ends = np.minimum(self.starts + context, n_inputs)
        self.lengths = self.ends - self.starts
        self.n_targets: NDArray[Any] = np.diff(self.ends, prepend=0)
        self.labels = None

    def row(self, n: int) -> NDArray[Any]:
        """The input tokens of a context."""
        return self.values[self.starts[n] : self.ends[n]]

    def batch(self, rows: Rows) -> Batch:
        """Return contexts as tensors: those of :class:`TokenDataset`, and ``targets`` (B, T), -100 where ignored."""
        batch = super().batch(rows)
        targets = np.full(batch["input_ids"].shape, -100, dtype=np.int64)
        for i, n in enumerate(rows):
            end, length, new = self.ends[n], self.lengths[n], self.n_targets[n]
            targets[i, length - new : length] = self.values[end - new + 1 : end + 1]
        return {**batch, "targets": torch.from_numpy(targets)}


class EvaluationLoader:
    """Every row once, in :func:`evaluation_batches`.

    Args:
        rows: the tokenised rows.
        batch_size: rows per process.
        rank: this process.
        world: number of processes.
        limit: how many batches will be evaluated, or (a float) which share of them.
    """

    def __init__(
        self, rows: TokenDataset, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | float = 1.0
    ) -> None:
        self.rows = rows
        self.batches = evaluation_batches(rows.lengths, batch_size, rank, world_size, limit)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield self.rows.batch(batch)


class TrainingLoader:
    """One epoch after the other of :func:`training_batches`, resumable within an epoch.

    Lightning calls ``set_epoch`` on ``sampler`` when an epoch begins. Each batch also states how many rows and tokens,
    and with a language model's data targets, all processes have in it (``global_rows``, ``global_tokens``,
    ``global_targets``), and how many rows and targets in all batches of its optimizer step (``step_rows``,
    ``step_targets``).

    Args:
        rows: the tokenised rows.
        batch_size: rows per process.
        seed: decides the order, together with the epoch.
        rank: this process.
        world: number of processes.
        next_batch: the number, from 0, of the batch that an iteration begins with; above 0 where training resumes.
        step_batches: the numbers of the batches that share an optimizer step with the batch of the number given.
    """

    def __init__(
        self,
        rows: TokenDataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        next_batch: Callable[[], int] = lambda: 0,
        step_batches: Callable[[int], slice] = lambda i: slice(i, i + 1),
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.next_batch, self.step_batches = rank, world_size, next_batch, step_batches
        self.epoch = 0
        self.reshuffles = True  # in every epoch; otherwise each has the batches of the first

    @property
    def sampler(self) -> TrainingLoader:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch if self.reshuffles else 0

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        whole, rest = divmod(len(self.rows), size)
        return whole + (rest >= self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing is read before the first `next`, by when `set_epoch` has been called.
        batches = training_batches(self.rows.lengths, self.batch_size, self.seed, self.epoch, self.world_size)
        for i in range(self.next_batch(), len(batches)):
            rows, step = batches[i], np.concatenate(batches[self.step_batches(i)])
            counts = {"global_rows": len(rows), "step_rows": len(step)}
            counts["global_tokens"] = int(self.rows.lengths[rows].sum())
            if (n_targets := self.rows.n_targets) is not None:
                counts.update(global_targets=int(n_targets[rows].sum()), step_targets=int(n_targets[step].sum()))
            yield {**self.rows.batch(rows[self.rank :: self.world_size]), **counts}


def padding_share(batches: list[Tensor]) -> float:
    """The share of padding in attention masks (B, T) of several batches."""
    text = sum(int(mask.sum()) for mask in batches)
    return 1.0 - text / sum(mask.numel() for mask in batches)
