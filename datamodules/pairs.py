"""Pairs of a preferred and a rejected continuation of a prompt, for preference optimization."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import IO, Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from gpt2_pl import __version__
from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import Batch, EvaluationLoader, Rows, TargetTokenDataset, TokenDataset
from gpt2_pl.datamodules.cache import cached_file
from gpt2_pl.datamodules.prompt_template import Truncation
from gpt2_pl.datamodules.readers import read_file
from gpt2_pl.datamodules.rows import parse_text, require_columns
from gpt2_pl.errors import InputError

Continuation = tuple[list[int], list[int]]
"""Token ids of a prompt, and of the text after it."""

Pair = tuple[list[int], list[int], list[int]]
"""Token ids of a prompt, of its preferred continuation, and of its rejected continuation."""

COLUMNS = ("prompt", "chosen", "rejected")


class PairDataset(TokenDataset):
    """Pairs of continuations of a prompt; a row is a pair.

    Args:
        pairs: the pairs.

    Attributes:
        sides: the texts: rows 2 n and 2 n + 1 are the preferred and the rejected text of pair n.
        lengths: (N,) number of tokens of both texts of each pair.
        reference: (N, 2) log-probabilities of both continuations under the reference model.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        ids, targets = [], []
        for prompt, *answers in pairs:
            for answer in answers:
                ids.append(np.array([*prompt, *answer][:-1], dtype=np.int64))
                targets.append(np.array([-100] * (len(prompt) - 1) + list(answer), dtype=np.int64))
        offsets = np.cumsum([0, *map(len, ids)])
        self.sides = TargetTokenDataset(np.concatenate(ids), offsets, np.concatenate(targets))
        super().__init__(self.sides.values, offsets[::2])
        self.reference: NDArray[np.float32] = np.zeros((len(pairs), 2), dtype=np.float32)

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the token ids, the lengths and the targets of both texts."""
        sha = hashlib.sha256()
        for array in (self.sides.values, self.sides.lengths, self.sides.targets):
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()[:16]

    def batch(self, rows: Rows) -> Batch:
        """Collate pairs to tensors, padded on the right.

        Args:
            rows: (B,) indices of pairs.

        Returns:
            ``input_ids``, ``attention_mask`` and ``targets`` (2 B, T), the preferred and the rejected text of each
            pair, with targets of -100 in the prompt; ``target_positions`` (n,); ``row`` (B,); and ``reference`` (B, 2).
        """
        batch = self.sides.batch(np.stack([2 * rows, 2 * rows + 1], axis=1).ravel())
        return {**batch, "row": batch["row"][::2] // 2, "reference": torch.from_numpy(self.reference[rows])}


class PairData(TextData):
    """Base class of datamodules whose texts can be divided into a prompt and a continuation.

    Training batches are those of the pairs of :meth:`use_pairs`, if it was called for ``train``. Validation and test
    batches are always those of the texts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pairs: dict[str, PairDataset] = {}
        self._truncated_pairs: dict[str, int] = {}  # number of pairs with a truncated text, by option of the file

    @abstractmethod
    def continuations(self, split: str, prompt_tokens: int, max_tokens: int) -> list[Continuation]:
        """Divide the texts of a split; texts without a continuation are left out.

        Args:
            split: train or val.
            prompt_tokens: number of tokens of a prompt, for data that do not define prompts.
            max_tokens: largest number of tokens of a continuation, for data that do not define their ends.

        Returns:
            The tokens of the prompt and of the continuation of each text.
        """

    def read_pairs(self, file: str, key: str) -> list[Pair]:
        """Read pairs from a file with the columns ``prompt``, ``chosen`` and ``rejected``.

        The end of text is appended to both continuations. Texts that exceed the context are cut at their end.

        Args:
            file: path of a CSV, TSV, JSON lines or Parquet file.
            key: option that named the file, for error messages.

        Raises:
            InputError: the file cannot be read, lacks a column, or has a row whose texts are missing, equal, or have a
                prompt that leaves no room in the context.
        """
        source, limit, end = read_file(file, key), self._max_length(), self._end_of_text
        require_columns(source, COLUMNS, keys=key)
        pairs: list[Pair] = []
        lengths: list[int] = []  # of both texts of a pair, each with the prompt
        lost: list[int] = []
        for number, row in source.read(COLUMNS):
            assert isinstance(row, dict)
            texts = [parse_text(row, column, source.name, number) for column in COLUMNS]
            prompt, *answers = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
            if not 1 <= len(prompt) <= limit:
                raise source.error(f", row {number}: prompt must have 1 to {limit} tokens, got {len(prompt)}")
            chosen, rejected = ([*answer, end][: limit + 1 - len(prompt)] for answer in answers)
            if chosen == rejected:
                raise source.error(f", row {number}: chosen and rejected must differ within {limit} tokens")
            n_tokens = [len(prompt) + len(answer) for answer in answers]
            lengths.append(sum(min(n, limit) for n in n_tokens))
            lost.append(sum(n_tokens) - lengths[-1])
            pairs.append((prompt, chosen, rejected))
        counts = Truncation.of(lengths, lost)
        self._truncated_pairs[key.rpartition(".")[2]] = counts.n_truncated
        if counts.n_truncated:
            self._warn_once(counts.sentence(limit, f"pairs of {source.name}"))
        return pairs

    def use_pairs(self, split: str, pairs: Sequence[Pair]) -> PairDataset:
        """Set the pairs of a split.

        Raises:
            InputError: there are fewer pairs than processes.
        """
        n_processes = self._rank_and_world_size()[1]
        if len(pairs) < n_processes:
            got = f"{len(pairs)} pairs for {n_processes} processes"
            raise InputError(f"the {split} split must have at least one pair per process, got {got}", key="model.dpo")
        self.pairs[split] = PairDataset(pairs)
        return self.pairs[split]

    def cached_texts(self, key: Any, draw: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Return token ids of drawn texts from a cache file, and draw them if they are not cached.

        Args:
            key: JSON-serializable value of everything that the texts depend on.
            draw: draws the texts.
        """

        def write(file: IO[bytes]) -> None:
            file.write(json.dumps(draw()).encode())

        versions = [__version__, tokenizers.__version__]
        contents, _ = cached_file("samples.json", [*versions, key], write)
        texts: list[list[int]] = json.loads(contents.to_pybytes())
        return texts

    def pair_dataloader(self, split: str) -> EvaluationLoader:
        """Return batches with every pair of a split once, on exactly one process."""
        return EvaluationLoader(self.pairs[split], self.eval_batch_size, *self._rank_and_world_size())

    def _loaded_rows(self) -> TokenDataset:
        return self.pairs.get("train", super()._loaded_rows())

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record, with the number and the digest of the pairs of each split."""
        pairs = {split: {"rows": len(pairs), "digest": pairs.digest} for split, pairs in self.pairs.items()}
        return {**super().description(), **({"pairs": pairs} if pairs else {})}

    @property
    def truncated(self) -> dict[str, int]:
        """Number of truncated texts of each split, and of pairs with a truncated text of each file of pairs."""
        return {**super().truncated, **self._truncated_pairs}
