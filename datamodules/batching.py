"""Tokenized rows in flat arrays, batches of rows of similar length, and a loader that resumes in mid-epoch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt2_pl.losses import IGNORE_INDEX

Batch = dict[str, Any]
Rows = NDArray[np.int64]

MEGABATCH_MULT = 400  # number of batches sorted by length together; a larger one pads less and shuffles less


class TokenDataset:
    """Token ids of all rows of a split in one flat array.

    Args:
        values: token ids of all rows, concatenated.
        offsets: (N + 1,); row n is ``values[offsets[n]:offsets[n + 1]]``.
        labels: (N,) class indices; None for unlabeled rows.
        lost: (N,) number of tokens removed from each row, whose text was longer; None for rows that are not texts.

    Attributes:
        lengths: (N,) number of tokens in each row.
        n_targets: (N,) number of tokens to predict in each row; None if rows have no ``targets``.
    """

    n_targets: NDArray[Any] | None = None

    def __init__(
        self,
        values: NDArray[Any],
        offsets: NDArray[Any],
        labels: NDArray[Any] | None = None,
        lost: NDArray[Any] | None = None,
    ) -> None:
        self.values, self.offsets, self.labels, self.lost = values, offsets, labels, lost
        self.lengths = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the token ids, the lengths of the rows and the labels."""
        sha = hashlib.sha256()
        for array in (self.values, self.lengths, self.labels):
            if array is not None:
                sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()[:16]

    def row(self, n: int) -> NDArray[Any]:
        """Return the token ids of a row."""
        return self.values[self.offsets[n] : self.offsets[n + 1]]

    def select(self, rows: Rows) -> TokenDataset:
        """Return a dataset of the rows with the given indices, which may repeat, in the given order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], lengths.cumsum()])
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        labels, lost = (None if array is None else array[rows] for array in (self.labels, self.lost))
        return TokenDataset(self.values[index], offsets, labels, lost)

    @staticmethod
    def concatenate(parts: Sequence[TokenDataset]) -> TokenDataset:
        """Concatenate the rows of several datasets; either all or none of them have labels, or ``lost``."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        values = np.concatenate([part.values[part.offsets[0] : part.offsets[-1]] for part in parts])
        columns = ([part.labels for part in parts], [part.lost for part in parts])
        known = ([array for array in arrays if array is not None] for arrays in columns)
        labels, lost = (np.concatenate(arrays) if arrays else None for arrays in known)
        return TokenDataset(values, np.concatenate([[0], lengths.cumsum()]), labels, lost)

    def batch(self, rows: Rows) -> Batch:
        """Collate rows to tensors, padded on the right to the longest row.

        Args:
            rows: (B,) row indices.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T), ``row`` (B,) and, if the rows have labels, ``labels`` (B,).
        """
        lengths = self.lengths[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        input_ids = np.zeros(mask.shape, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.row(n) for n in rows])
        batch: Batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
            "row": torch.from_numpy(rows),
        }
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch


def training_batches(lengths: NDArray[Any], batch_size: int, seed: int, epoch: int, world_size: int = 1) -> list[Rows]:
    """Return the global batches of one epoch, which depend only on the seed and the epoch.

    Rows are shuffled, sorted by length within megabatches of ``MEGABATCH_MULT`` batches and cut into batches, and the
    batches are shuffled. Rows of a batch therefore have similar lengths, except in the last, smaller batch, whose rows
    are chosen at random.

    Args:
        lengths: (N,) number of tokens in each row.
        batch_size: rows per process.
        seed: any integer.
        epoch: index of the epoch, from 0.
        world_size: number of processes; process r takes rows r, r + ``world_size``, ... of each batch.

    Returns:
        Arrays of ``batch_size * world_size`` row indices and one smaller array of the remaining rows. The smaller array
        is omitted if it has fewer than ``world_size`` rows. Every other row occurs exactly once.
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
    """Return the batches of one process; each row is in exactly one batch of one process.

    The rows of a batch have similar lengths. Without a limit the longest rows come first. With a limit, the first
    ``limit`` batches contain a sample in which all lengths are represented evenly, independent of the order of the
    file. The sample is the same for any number of processes that evaluate the same number of rows.

    All processes have the same number of batches, because processes with sharded weights gather them in every forward
    pass. A batch may therefore be smaller than ``batch_size``, or one row larger.

    Args:
        lengths: (N,) number of tokens in each row.
        batch_size: rows per process.
        rank: index of the process.
        world_size: number of processes.
        limit: batches to evaluate: a number (int) or a fraction of all batches (float), as for Lightning's
            ``limit_val_batches``.

    Returns:
        Arrays of row indices.
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
    """Return the number of rows in each global batch, at least one for each process."""
    n_full, rest = divmod(n_rows, batch_size * world_size)
    if rest == 0 or rest >= world_size:
        return [batch_size * world_size] * n_full + ([rest] if rest else [])
    return [len(part) for part in np.array_split(np.empty(n_rows), min(n_full + 1, n_rows // world_size))]


def with_targets(batch: Batch, targets: Tensor) -> Batch:
    """Add targets to a batch, and their positions, so that the loss need not search for them on a GPU.

    Args:
        batch: a batch of B rows, padded to T tokens.
        targets: (B, T) the token that follows each token, or -100 at positions without a target.

    Returns:
        The batch with ``targets`` (B, T), and ``target_positions`` (n,): the indices, in ascending order, of the n
        targets in the flattened ``targets``.
    """
    positions = np.flatnonzero(targets.numpy() != IGNORE_INDEX)
    return {**batch, "targets": targets, "target_positions": torch.from_numpy(positions)}


class TargetTokenDataset(TokenDataset):
    """Token ids of rows and the target of each token.

    Args:
        values: token ids of all rows, concatenated.
        offsets: (N + 1,); row n is ``values[offsets[n]:offsets[n + 1]]``.
        targets: the next token of each value; -100 where it is not predicted.
        lost: as in :class:`TokenDataset`.
    """

    def __init__(
        self,
        values: NDArray[Any],
        offsets: NDArray[Any],
        targets: NDArray[Any],
        lost: NDArray[Any] | None = None,
    ) -> None:
        super().__init__(values, offsets, lost=lost)
        self.targets = targets
        self.n_targets = np.diff(np.append(0, (targets != IGNORE_INDEX).cumsum())[self.offsets])

    @classmethod
    def of_rows(
        cls, rows: Sequence[tuple[NDArray[Any], NDArray[Any]]], lost: Sequence[int] | None = None
    ) -> TargetTokenDataset:
        """Return a dataset of the token ids and the targets of each row.

        Args:
            rows: token ids (T,) and targets (T,) of each row.
            lost: number of tokens removed from each row; None for rows that are never truncated.
        """
        ids, targets = map(np.concatenate, zip(*rows, strict=True))
        offsets = np.cumsum([0, *(len(row) for row, _ in rows)])
        return cls(ids, offsets, targets, None if lost is None else np.array(lost))

    def batch(self, rows: Rows) -> Batch:
        """Collate rows as :class:`TokenDataset` does, with the keys of :func:`with_targets`; -100 at padding."""
        batch = super().batch(rows)
        targets = TokenDataset(self.targets, self.offsets).batch(rows)["input_ids"]
        return with_targets(batch, targets.masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX))


class PackedTokenDataset(TokenDataset):
    """Contexts of T tokens cut from one token stream, for next-token prediction; the last context may be shorter.

    Args:
        tokens: (N,) token ids, in memory or memory-mapped.
        context: number of tokens T in a context.
        stride: number of tokens from the start of one context to the start of the next; defaults to T. With a stride
            below T contexts overlap, and targets that are in the preceding context are ignored. Every token except the
            first one of the stream is predicted once. Outside the first context, it is predicted from at least
            T - stride + 1 preceding tokens.
    """

    def __init__(self, tokens: NDArray[Any], context: int, stride: int | None = None) -> None:
        n_inputs, stride = len(tokens) - 1, stride or context
        n_rows = 1 + max(0, -(-(n_inputs - context) // stride))
        self.values = tokens
        self.starts = np.arange(n_rows) * stride
        self.ends = np.minimum(self.starts + context, n_inputs)
        self.lengths = self.ends - self.starts
        self.n_targets: NDArray[Any] = np.diff(self.ends, prepend=0)
        self.labels = self.lost = None

    def row(self, n: int) -> NDArray[Any]:
        """Return the input tokens of a context."""
        return self.values[self.starts[n] : self.ends[n]]

    def batch(self, rows: Rows) -> Batch:
        """Collate contexts as :class:`TokenDataset` does, with the keys of :func:`with_targets`; -100 if ignored."""
        batch = super().batch(rows)
        targets = np.full(batch["input_ids"].shape, IGNORE_INDEX, dtype=np.int64)
        for i, n in enumerate(rows):
            end, length, new = self.ends[n], self.lengths[n], self.n_targets[n]
            targets[i, length - new : length] = self.values[end - new + 1 : end + 1]
        return with_targets(batch, torch.from_numpy(targets))


class EvaluationLoader:
    """Loader of the batches of :func:`evaluation_batches`, each row once.

    Args:
        rows: tokenized rows.
        batch_size: rows per process.
        rank: index of this process.
        world_size: number of processes.
        limit: batches to evaluate: a number (int) or a fraction of all batches (float).
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
    """Loader of the batches of :func:`training_batches` that can resume within an epoch.

    Lightning calls ``set_epoch`` on ``sampler`` at the start of an epoch. Each batch also contains counts over all
    processes: ``global_rows`` and ``global_tokens`` of the batch and ``step_rows`` of all batches in its optimizer
    step. If the rows have targets, it contains ``global_targets`` and ``step_targets`` as well. ``full_rows`` is the
    number of rows per process of every batch but the smaller one.

    Args:
        rows: tokenized rows.
        batch_size: rows per process.
        seed: seed of the order, which also depends on the epoch.
        rank: index of this process.
        world_size: number of processes.
        next_batch: returns the index of the first batch of an iteration, above 0 when training resumes.
        step_batches: maps the index of a batch to the indices of the batches in its optimizer step.

    Attributes:
        epoch: epoch of the next iteration.
        reshuffles: whether every epoch has a new order; if False, all epochs have the batches of the first.
        batches_per_epoch: number of batches in an epoch, cut from consecutive passes over the rows; None for one pass.
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
        self.reshuffles = True
        self.batches_per_epoch: int | None = None

    @property
    def sampler(self) -> TrainingLoader:
        """The loader itself, because Lightning calls ``set_epoch`` on a loader's sampler."""
        return self

    @property
    def dataset(self) -> TokenDataset:
        """The rows, whose number Lightning's BatchSizeFinder reads; there is no such attribute with overfit_batches.

        Raises:
            AttributeError: the loader does not reshuffle; Lightning would replace the sampler of its rows.
        """
        if not self.reshuffles:
            raise AttributeError("dataset")
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch if self.reshuffles else 0

    def __len__(self) -> int:
        return self._batches_per_pass if self.batches_per_epoch is None else self.batches_per_epoch

    @property
    def _batches_per_pass(self) -> int:
        size = self.batch_size * self.world_size
        n_full, rest = divmod(len(self.rows), size)
        return n_full + (rest >= self.world_size)

    def _epoch_batches(self) -> list[Rows]:
        """Return the global batches of the current epoch."""
        start, per_pass = self.epoch * len(self), self._batches_per_pass
        first, last = start // per_pass, (start + len(self) - 1) // per_pass
        passes = [
            training_batches(self.rows.lengths, self.batch_size, self.seed, i, self.world_size)
            for i in range(first, last + 1)
        ]
        offset = start - first * per_pass
        return list(itertools.chain(*passes))[offset : offset + len(self)]

    def __iter__(self) -> Iterator[Batch]:
        # This is a generator: the epoch is read at the first `next`, after Lightning has called `set_epoch`.
        batches = self._epoch_batches()
        for i in range(self.next_batch(), len(batches)):
            rows, step = batches[i], np.concatenate(batches[self.step_batches(i)])
            counts = {"global_rows": len(rows), "step_rows": len(step), "full_rows": self.batch_size}
            counts["global_tokens"] = int(self.rows.lengths[rows].sum())
            if (n_targets := self.rows.n_targets) is not None:
                counts.update(global_targets=int(n_targets[rows].sum()), step_targets=int(n_targets[step].sum()))
            yield {**self.rows.batch(rows[self.rank :: self.world_size]), **counts}
