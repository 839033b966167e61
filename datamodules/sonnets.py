"""Sonnets: poems from numbered text files, to be continued from their first lines."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import Batch, Rows, TokenDataset
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import read_text
from gpt2_pl.text.poems import Poem
from gpt2_pl.text.tokenizer import END_OF_TEXT


def read_poems(file: str, key: str) -> list[Poem]:
    """Read the numbered poems of a text file.

    A poem starts with its number on a separate line. Lines before the first poem are ignored.

    Args:
        file: path of a UTF-8 text file with any line ends.
        key: option that named the file, for error messages.

    Returns:
        The poems in the order of the file.

    Raises:
        InputError: the file is missing, is not UTF-8, has no poem, has a number twice, or has a poem without lines.
    """
    lines = read_text(file, key).splitlines()
    poems: dict[int, Poem] = {}
    current: Poem | None = None
    for line_number, line in enumerate((line.strip() for line in lines), start=1):
        if re.fullmatch(r"[0-9]{1,6}", line):
            if int(line) in poems:
                raise InputError(f"{key}: {file}, line {line_number}: poem {line} occurs twice")
            current = poems[int(line)] = Poem(int(line), [])
        elif line and current is not None:
            current.lines.append(line)
    if not poems:
        raise InputError(f"{key}: {file} has no poem; a poem must start with its number on a separate line")
    for poem in poems.values():
        if not poem.lines:
            raise InputError(f"{key}: {file}: poem {poem.number} has no lines")
    return list(poems.values())


class PoemDataset(TokenDataset):
    """Token ids of poems and the target of each token.

    Args:
        values: token ids of all poems, concatenated.
        offsets: (N + 1,); poem n is ``values[offsets[n]:offsets[n + 1]]``.
        targets: the next token of each value; -100 where it is not predicted.
    """

    def __init__(self, values: NDArray[Any], offsets: NDArray[Any], targets: NDArray[Any]) -> None:
        super().__init__(values, offsets)
        self.targets = targets
        self.n_targets = np.diff(np.append(0, (targets != -100).cumsum())[self.offsets])

    def batch(self, rows: Rows) -> Batch:
        """Collate poems as :class:`TokenDataset` does, with ``targets`` (B, T), -100 at padding."""
        batch = super().batch(rows)
        targets = TokenDataset(self.targets, self.offsets).batch(rows)["input_ids"]
        return {**batch, "targets": targets.masked_fill(batch["attention_mask"] == 0, -100)}


class Sonnets(TextData):
    """Datamodule of poems that are continued from their first lines.

    In a file, the number of a poem is on a separate line before it. Training predicts every line; validation and test
    predict the lines after the prompt. Batches contain ``input_ids``, ``attention_mask`` and ``targets`` (B, T), padded
    on the right, and ``row`` (B,).

    Args:
        train_file: file with complete poems for training.
        val_file: file with complete poems for validation; by default, a fraction of the training poems.
        test_file: file with complete poems for testing.
        prompt_lines: number of lines at the start of a poem that are the prompt.
        tokenizer: folder or hub id of the tokenizer; on the command line it defaults to that of the pretrained base.
        max_length: maximum number of tokens in a poem; defaults to the context length of the model. Longer poems are
            truncated at their end.
        batch_size: poems per process and step.
        eval_batch_size: poems per process and step in validation and test.
        val_fraction: fraction of the training poems used for validation if there is no validation file, in (0, 1).
        train_fraction: fraction of the remaining training poems to use, in (0, 1].
        split_seed: seed of ``val_fraction`` and ``train_fraction``.

    Raises:
        InputError: an argument is out of range; in ``prepare_data``, a file is invalid, or a poem has no lines after
            the prompt.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        prompt_lines: int = 3,
        tokenizer: str | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        val_fraction: float = 0.1,
        train_fraction: float = 1.0,
        split_seed: int = 0,
    ) -> None:
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": None}
        super().__init__(files, None, tokenizer, max_length, batch_size, eval_batch_size, val_fraction)
        if prompt_lines < 1:
            raise InputError(f"data.prompt_lines must be at least 1, got {prompt_lines}")
        if not 0.0 < train_fraction <= 1.0:
            raise InputError(f"data.train_fraction must be in (0, 1], got {train_fraction}")
        self.prompt_lines, self.train_fraction, self.split_seed = prompt_lines, train_fraction, split_seed
        self.poems: dict[str, list[Poem]] = {}

    def _encode(self, split: str) -> PoemDataset:
        source = "train" if split == "val" and not self._has_own_val() else split
        poems = read_poems(str(self.files[source]), f"data.{source}_file")
        self.poems[split] = poems = [poems[i] for i in self._split_indices(split, len(poems))]
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise InputError(f"data.tokenizer must have the token {END_OF_TEXT}, which ends a poem; it is missing")
        values, targets, lengths = [], [], [0]
        for poem in poems:
            ids, poem_targets = self._encode_poem(poem, split, f"data.{source}_file: {self.files[source]}", end)
            values += ids
            targets.append(poem_targets)
            lengths.append(len(ids))
        return PoemDataset(np.array(values), np.cumsum(lengths), np.concatenate(targets))

    def _encode_poem(self, poem: Poem, split: str, source: str, end: int) -> tuple[list[int], NDArray[Any]]:
        """Encode a poem.

        Args:
            poem: the poem.
            split: split of the poem; in training every line is predicted, else the lines after the prompt.
            source: option and file of the poem, for error messages.
            end: id of the token that ends the poem.

        Returns:
            Token ids (T,), and targets (T,), which are -100 where not predicted.

        Raises:
            InputError: nothing of the poem can be predicted.
        """
        if split != "train" and len(poem.lines) <= self.prompt_lines:
            raise InputError(
                f"{source}: poem {poem.number} must have more than {self.prompt_lines} lines (data.prompt_lines), "
                f"got {len(poem.lines)}"
            )
        opening = poem.opening(self.prompt_lines)
        rest = poem.text[len(opening) :]
        prompt, continuation = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (opening, rest))
        if not prompt or (split != "train" and not continuation):
            raise InputError(
                f"{source}: the tokenizer gives no token for the "
                f"{'lines after the ' if prompt else ''}first {self.prompt_lines} lines of poem {poem.number}"
            )
        max_length = self._max_length()
        ids = [*prompt, *continuation, end][: max_length + 1]
        targets = np.array(ids[1:])
        if split != "train":
            targets[: len(prompt) - 1] = -100
            if (targets == -100).all():
                raise InputError(
                    f"{source}: data.max_length must be at least the {len(prompt)} tokens of the first "
                    f"{self.prompt_lines} lines of poem {poem.number}, got {max_length}"
                )
        return ids[:-1], targets

    def _split_indices(self, split: str, n: int) -> list[int]:
        """Return the indices of the split among the ``n`` poems of its file."""
        if split == "test" or (split == "val" and self._has_own_val()):
            return list(range(n))
        order = np.random.default_rng(self.split_seed).permutation(n)
        n_val = 0 if self._has_own_val() else max(1, round(n * self.val_fraction))
        n_train = max(1, round((n - n_val) * self.train_fraction))
        if n_val + n_train > n:
            raise InputError(f"data.train_file must have enough poems to split, got {n}; give data.val_file")
        return sorted((order[:n_val] if split == "val" else order[n_val : n_val + n_train]).tolist())

    @property
    def perplexity_note(self) -> str:
        """Definition of the perplexity in validation and test, displayed with its values."""
        return (
            f"Perplexity of validation and test: the tokens after the first {self.prompt_lines} lines of each poem and "
            "its end token are predicted from all preceding tokens of the poem."
        )

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record: files, validation poems and number of poems in each split."""
        return {
            "class": type(self).__name__,
            "files": {split: file for split, file in self.files.items() if file is not None},
            "prompt_lines": self.prompt_lines,
            "validated_on": [poem.number for poem in self.poems.get("val", [])],
            "rows": {split: len(rows) for split, rows in self.encoded.items()},
            "batch_size": self.batch_size,
        }
