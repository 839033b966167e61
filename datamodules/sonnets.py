"""Sonnets: poems from numbered text files, to be continued from their first lines."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.datamodules.batching import TargetTokenDataset
from gpt2_pl.datamodules.pairs import Continuation, PairData
from gpt2_pl.errors import InputError
from gpt2_pl.filesystem import read_text
from gpt2_pl.text.poems import Poem


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
                raise InputError(f"{key}: {file}, line {line_number}: poem {line} occurs twice", key=key)
            current = poems[int(line)] = Poem(int(line), [])
        elif line and current is not None:
            current.lines.append(line)
    if not poems:
        reason = "has no poem; a poem must start with its number on a separate line"
        raise InputError(f"{key}: {file} {reason}", key=key)
    for poem in poems.values():
        if not poem.lines:
            raise InputError(f"{key}: {file}: poem {poem.number} has no lines", key=key)
    return list(poems.values())


class Sonnets(PairData):
    """Datamodule of poems that are continued from their first lines.

    In a file, the number of a poem is on a separate line before it. Training predicts every line; validation and test
    predict the lines after the prompt. If every poem of the test file is a prompt alone, the poems are completed but
    not scored. Batches contain ``input_ids``, ``attention_mask`` and ``targets`` (B, T), padded
    on the right, and ``row`` (B,).

    Args:
        train_file: file with complete poems for training.
        val_file: file with complete poems for validation; by default, a fraction of the training poems.
        test_file: file with complete poems for testing, or with the first ``prompt_lines`` lines of poems.
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
            the prompt although others have.
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
        sizes = (max_length, batch_size, eval_batch_size)
        super().__init__(files, None, tokenizer, *sizes, val_fraction, train_fraction, split_seed)
        if prompt_lines < 1:
            raise InputError(key="data.prompt_lines", value=prompt_lines, expected="at least 1")
        self.prompt_lines = prompt_lines
        self.poems: dict[str, list[Poem]] = {}
        self.unscored: set[str] = set()  #: splits whose poems have no lines after the prompt

    def sources(self, split: str) -> list[str]:
        """Return the first lines of every poem, the prompt."""
        return [poem.opening(self.prompt_lines) for poem in self.poems[split]]

    def targets(self, split: str) -> list[str]:
        """Return the lines after the prompt of every poem."""
        return [Poem(poem.number, poem.lines[self.prompt_lines :]).text for poem in self.poems[split]]

    def _encode(self, split: str) -> TargetTokenDataset:
        key = f"data.{self._source_split(split)}_file"
        file = str(self.files[self._source_split(split)])
        poems = read_poems(file, key)
        self.poems[split] = [poems[i] for i in self._split_indices(split, len(poems))]
        if split == "test" and all(len(poem.lines) == self.prompt_lines for poem in poems):
            self.unscored.add(split)
        encoded = [self._encode_poem(poem, split, f"{key}: {file}") for poem in self.poems[split]]
        lost = [n for *_, n in encoded]
        return TargetTokenDataset.of_rows([(ids, targets) for ids, targets, _ in encoded], lost)

    def _encode_parts(self, poem: Poem) -> tuple[list[int], list[int]]:
        """Return the tokens of the first lines of a poem, the prompt, and of the lines after them."""
        opening = poem.opening(self.prompt_lines)
        rest = poem.text[len(opening) :]
        prompt, continuation = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in (opening, rest))
        return prompt, continuation

    def _encode_poem(self, poem: Poem, split: str, source: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Encode a poem.

        Args:
            poem: the poem.
            split: split of the poem; in training every line is predicted, else the lines after the prompt.
            source: option and file of the poem, for error messages.

        Returns:
            Token ids (T,), targets (T,), which are -100 where not predicted, and the number of tokens removed.

        Raises:
            InputError: nothing of the poem can be predicted.
        """
        n, name = self.prompt_lines, f"poem {poem.number}"
        is_scored = split not in ("train", *self.unscored)
        if is_scored and len(poem.lines) <= n:
            message = f"{name} must have more than {n} lines (data.prompt_lines), got {len(poem.lines)}"
            raise InputError(message, key="data.prompt_lines", source=source)
        prompt, continuation = self._encode_parts(poem)
        if not prompt or (is_scored and not continuation):
            lines = f"{'lines after the ' if prompt else ''}first {n} lines of {name}"
            raise InputError(f"the tokenizer gives no token for the {lines}", key="data.tokenizer", source=source)
        max_length = self._max_length()
        ids = np.array([*prompt, *continuation, self._end_of_text][: max_length + 1])
        targets = ids[1:].copy()
        if split != "train":
            targets[: len(prompt) - 1] = -100
            if is_scored and (targets == -100).all():
                expected = f"at least the {len(prompt)} tokens of the first {n} lines of {name}"
                raise InputError(key="data.max_length", value=max_length, expected=expected, source=source)
        return ids[:-1], targets, max(0, len(prompt) + len(continuation) - max_length)

    def continuations(self, split: str, prompt_tokens: int, max_tokens: int) -> list[Continuation]:
        """Return the first lines of every poem, and the lines after them with the end of text."""
        found = []
        for poem in self.poems[split]:
            prompt, rest = self._encode_parts(poem)
            if rest:
                room = max(0, self._max_length() + 1 - len(prompt))
                found.append((prompt, [*rest, self._end_of_text][:room]))
        return [(prompt, rest) for prompt, rest in found if rest]

    def prompt_spec(self) -> dict[str, Any]:
        """Return the number of lines of the prompt, which checkpoints store to complete new poems."""
        return {"prompt_lines": self.prompt_lines}

    @property
    def perplexity_note(self) -> str:
        """Definition of the perplexity in validation and test, displayed with its values."""
        return (
            f"Perplexity of validation and test: the tokens after the first {self.prompt_lines} lines of each poem and "
            "its end token are predicted from all preceding tokens of the poem."
        )

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record, with the prompt and the numbers of the validation poems."""
        validated_on = [poem.number for poem in self.poems.get("val", [])]
        return {**super().description(), "prompt_lines": self.prompt_lines, "validated_on": validated_on}
