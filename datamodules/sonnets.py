"""Sonnets: poems in the numbered file format, to continue from their first lines."""

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
    """The poems of a text file: each a number on a line of its own, then its lines. What precedes them is a notice.

    Args:
        file: UTF-8 text with any line ends.
        key: the option that held it, for error messages.

    Raises:
        InputError: no such file, not UTF-8, no numbered poem, a number twice, or a poem without lines.
    """
    lines = read_text(file, key).splitlines()
    poems: dict[int, Poem] = {}
    current: Poem | None = None
    for place, line in enumerate((line.strip() for line in lines), start=1):
        if re.fullmatch(r"[0-9]{1,6}", line):
            if int(line) in poems:
                raise InputError(f"{key}: {file}, line {place}: poem {line} occurs twice")
            current = poems[int(line)] = Poem(int(line), [])
        elif line and current is not None:
            current.lines.append(line)
    if not poems:
        raise InputError(f"{key}: {file} has no poem; each begins with its number on a line of its own")
    for poem in poems.values():
        if not poem.lines:
            raise InputError(f"{key}: {file}: poem {poem.number} has no lines")
    return list(poems.values())


class PoemDataset(TokenDataset):
    """Tokens of poems and, for each, the token that follows it, or -100 where nothing is predicted.

    Args:
        values: all token ids, flat.
        offsets: (N + 1,) where each poem begins, and the end.
        targets: as many as there are values.
    """

    def __init__(self, values: NDArray[Any], offsets: NDArray[Any], targets: NDArray[Any]) -> None:
        super().__init__(values, offsets)
        self.targets = targets
        self.n_targets = np.diff(np.append(0, (targets != -100).cumsum())[self.offsets])

    def batch(self, rows: Rows) -> Batch:
        """Poems as tensors; beside those of :class:`TokenDataset`, ``targets`` (B, T), -100 at padding."""
        batch = super().batch(rows)
        targets = TokenDataset(self.targets, self.offsets).batch(rows)["input_ids"]
        return {**batch, "targets": targets.masked_fill(batch["attention_mask"] == 0, -100)}


class Sonnets(TextData):
    """Poems, each to be continued from its first lines. Scores are those of the lines after them.

    Files hold poems, each with its number on a line of its own before it. Batches hold ``input_ids``,
    ``attention_mask`` and ``targets`` (B, T), padded on the right, and ``row`` (B,).

    Args:
        train_file: whole poems to train on, every line of them.
        val_file: whole poems to choose the model by; without one, a share of the training poems is set aside.
        test_file: whole poems to score on.
        prompt_lines: first lines that are given, and not scored.
        tokenizer: folder or hub id; on the command line the base's own by default.
        max_length: tokens in a poem; by default what the model has room for. What is longer is cut at its end.
        batch_size: poems per process and step.
        eval_batch_size: poems per process in validation and test.
        val_fraction: share of the training poems to validate on where there is no validation file.
        train_fraction: share of the remaining training poems to use.
        split_seed: decides which poems these are.

    Raises:
        InputError: at ``prepare_data``, a file that cannot be used, or a poem that is too short to be scored.
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
            raise InputError(f"data.prompt_lines is {prompt_lines}; it must be at least 1")
        if not 0.0 < train_fraction <= 1.0:
            raise InputError(f"data.train_fraction is {train_fraction}; it must be above 0 and at most 1")
        self.prompt_lines, self.train_fraction, self.split_seed = prompt_lines, train_fraction, split_seed
        self.poems: dict[str, list[Poem]] = {}

    def _encode(self, split: str) -> PoemDataset:
        source = "train" if split == "val" and not self._has_own_val() else split
        poems = read_poems(str(self.files[source]), f"data.{source}_file")
        self.poems[split] = poems = [poems[i] for i in self._split_indices(split, len(poems))]
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise InputError(f"data.tokenizer has no {END_OF_TEXT}, which stands behind a poem")
        room = self._max_length()
        values, targets, lengths = [], [], [0]
        for poem in poems:
            if split != "train" and len(poem.lines) <= self.prompt_lines:
                raise InputError(
                    f"data.{source}_file: {self.files[source]}: poem {poem.number} has {len(poem.lines)} lines; to be "
                    f"scored it needs more than the {self.prompt_lines} that are given (data.prompt_lines)"
                )
            opening, rest = poem.opening(self.prompt_lines), poem.text[len(poem.opening(self.prompt_lines)) :]
            given, following = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (opening, rest))
            if not given or (split != "train" and not following):
                raise InputError(
                    f"data.{source}_file: {self.files[source]}: the tokenizer makes no token of the "
                    f"{'lines after the ' if given else ''}first {self.prompt_lines} lines of poem {poem.number}"
                )
            ids = [*given, *following, end][: room + 1]
            wanted = np.array(ids[1:])
            if split != "train":
                wanted[: len(given) - 1] = -100
                if (wanted == -100).all():
                    raise InputError(
                        f"data.{source}_file: {self.files[source]}: the {self.prompt_lines} lines given of poem "
                        f"{poem.number} take {len(given)} tokens, and there is room for {room} (data.max_length)"
                    )
            values += ids[:-1]
            targets.append(wanted)
            lengths.append(len(ids) - 1)
        return PoemDataset(np.array(values), np.cumsum(lengths), np.concatenate(targets))

    def _split_indices(self, split: str, n: int) -> list[int]:
        """Which of the n poems read belong to the split."""
        if split == "test" or (split == "val" and self._has_own_val()):
            return list(range(n))
        order = np.random.default_rng(self.split_seed).permutation(n)
        n_val = 0 if self._has_own_val() else max(1, round(n * self.val_fraction))
        n_train = max(1, round((n - n_val) * self.train_fraction))
        if n_val + n_train > n:
            raise InputError(f"data.train_file has {n} poems, too few to set some aside; give data.val_file")
        return sorted((order[:n_val] if split == "val" else order[n_val : n_val + n_train]).tolist())

    @property
    def perplexity_note(self) -> str:
        """What perplexity is of, for where it is shown."""
        return (
            f"Perplexity of validation and test: of the tokens after the first {self.prompt_lines} lines of each poem, "
            "its end included, predicted from all tokens before them in the poem."
        )

    def description(self) -> dict[str, Any]:
        """What a run says of its data: files, the numbers of the poems validated on, poems in each split read."""
        return {
            "class": type(self).__name__,
            "files": {split: file for split, file in self.files.items() if file is not None},
            "prompt_lines": self.prompt_lines,
            "validated_on": [poem.number for poem in self.poems.get("val", [])],
            "rows": {split: len(rows) for split, rows in self.encoded.items()},
            "batch_size": self.batch_size,
        }
