"""Text for language modeling: one token stream, cut into contexts."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gpt2_pl import __version__
from gpt2_pl.datamodules.batching import PackedTokenDataset
from gpt2_pl.datamodules.cache import cached_file
from gpt2_pl.datamodules.pairs import Continuation, PairData
from gpt2_pl.datamodules.readers import FileRows, read_file, read_hub
from gpt2_pl.datamodules.rows import Row, RowSource, batches, require_columns
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.losses import IGNORE_INDEX
from gpt2_pl.text.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECE_CHARACTERS = 1 << 17  # characters in memory at a time, which bounds the memory of their encodings
_BATCH_PIECES = 2000  # maximum number of pieces of text that are tokenized together
_BOUNDARY = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)  # a text up to its last word before white space
_MAX_TEXT_TOKENS = 1024  # of the text of a context
_CACHE_FORMAT = 3  # part of every cache key; increment it when the cached contents change


class TextFile(FileRows):
    """UTF-8 file with one text, whose rows are consecutive pieces of it in a column ``text``."""

    columns = ("text",)

    def _rows(self, columns: Sequence[str]) -> Iterator[Row | str]:
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                yield from ({"text": piece} for piece in _pieces(file))
        except UnicodeDecodeError as error:
            raise self.error(f" is not UTF-8 text: {error}") from None


class TextCorpus(PairData):
    """Datamodule of text files or of a column of texts, for :class:`~gpt2_pl.tasks.LanguageModel`.

    A ``.txt`` file is one text. CSV, TSV, JSON lines and Parquet files and hub datasets have one text per row, in
    ``column``. ``<|endoftext|>`` is appended to every text. Tokens are written to a cache file once, memory-mapped, and
    cut into contexts of ``max_length`` tokens; only the last context of a split is shorter.

    Args:
        train_file: training file or list of files.
        val_file: validation file or list of files; by default, the last ``val_fraction`` of the training tokens.
        test_file: test file or list of files.
        hub_id: dataset on the Hugging Face hub; ignored if a file is given.
        column: column of the texts in files and datasets with rows.
        tokenizer: folder or hub id of the tokenizer; on the command line it defaults to that of the pretrained base.
        vocab_size: number of entries of a byte-level BPE that is trained on the training text and replaces
            ``tokenizer``.
        max_length: number of tokens in a context; defaults to the context length of the model.
        stride: number of tokens from the start of one context to the start of the next in validation and test, in
            [1, ``max_length``], as in transformers' "Perplexity of fixed-length models". It defaults to ``max_length``:
            contexts do not overlap, which is fastest, but the first tokens of each context are predicted from few
            tokens. With a smaller stride, every token after the first context is predicted once from at least
            ``max_length - stride + 1`` preceding tokens.
        batch_size: contexts per process and step.
        eval_batch_size: contexts per process and step in validation and test.
        val_fraction: fraction of the training tokens used for validation if there is no validation file, in (0, 1).

    Raises:
        InputError: an argument is out of range; in ``prepare_data``, a file or column is invalid, the tokenizer has no
            ``<|endoftext|>``, or a split has fewer than two tokens.
    """

    def __init__(
        self,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        hub_id: str | None = None,
        column: str = "text",
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        val_fraction: float = 0.05,
        stride: int | None = None,
    ) -> None:
        files = {"train": train_file, "val": val_file, "test": test_file, "predict": None}
        lists = {split: [file] if isinstance(file, str) else file or None for split, file in files.items()}
        super().__init__(lists, hub_id, tokenizer, max_length, batch_size, eval_batch_size, val_fraction)
        if vocab_size is not None and tokenizer is not None:
            both = f"data.vocab_size ({vocab_size}) and data.tokenizer ({tokenizer})"
            message = f"{both} must not be used together (a pretrained base sets data.tokenizer)"
            raise InputError(message, key="data.vocab_size")
        self.column, self.vocab_size, self.stride = column, vocab_size, stride

    def _make_tokenizer(self) -> Tokenizer:
        if self.vocab_size is None:
            return super()._make_tokenizer()
        if self.hub_id is None and not self.files["train"]:
            message = "data.train_file is missing; data.vocab_size trains a tokenizer on it"
            raise InputError(message, key="data.train_file")
        return train_tokenizer(chain.from_iterable(self._texts(self._sources("train"))), self.vocab_size)

    def _texts(self, sources: Iterable[RowSource], strip: bool = False) -> Iterator[Iterable[str]]:
        """Yield the texts of sources, each in pieces.

        Args:
            sources: files or datasets of :meth:`_sources`.
            strip: whether to strip texts in rows of surrounding white space. Empty texts are omitted.
        """
        for source in sources:
            if isinstance(source, TextFile):
                yield _row_texts(source, "text")
                continue
            for text in _row_texts(source, self.column):
                if stripped := text.strip() if strip else text:
                    yield _pieces(io.StringIO(stripped))

    def _encode(self, split: str) -> PackedTokenDataset:
        source, max_length, stride = self._source_split(split), self._max_length(), self.stride
        if stride is not None and not 1 <= stride <= max_length:
            expected = f"between 1 and {max_length} (data.max_length)"
            raise InputError(key="data.stride", value=stride, expected=expected)
        tokens = self._tokens(source)
        if not self._has_own_val() and source == "train":
            n_train = round(len(tokens) * (1.0 - self.val_fraction))
            tokens = tokens[:n_train] if split == "train" else tokens[n_train:]
        if len(tokens) < 2:
            reason = f"must have at least 2 tokens, got {len(tokens)}; give more text or change data.val_fraction"
            raise InputError(f"the {split} text {reason}", key=f"data.{source}_file")
        return PackedTokenDataset(tokens, max_length, None if split == "train" else stride)

    def _tokens(self, split: str) -> NDArray[Any]:
        """Return all tokens of a split's files or hub dataset, memory-mapped from a cache file.

        ``<|endoftext|>`` is appended to every text. Special tokens of the tokenizer's post-processor are omitted.

        Raises:
            InputError: the tokenizer has no ``<|endoftext|>``, or a source cannot be read.
        """
        sources, end = self._sources(split), self._end_of_text
        dtype = np.dtype(np.uint16 if max(self.tokenizer.get_vocab().values()) < 1 << 16 else np.int32)

        def marked_pieces() -> Iterator[tuple[str, bool]]:
            for text in self._texts(sources, strip=True):
                yield from ((piece, False) for piece in text)
                yield "", True  # the end of the text

        def write(file: IO[bytes]) -> None:
            for batch in batches(marked_pieces(), lambda piece: len(piece[0]), _BATCH_PIECES, _PIECE_CHARACTERS):
                encodings = self.tokenizer.encode_batch([piece for piece, _ in batch], add_special_tokens=False)
                for encoding, (_, is_end) in zip(encodings, batch, strict=True):
                    ids = [end] if is_end else encoding.ids
                    file.write(np.asarray(ids, dtype).tobytes())

        key = [_CACHE_FORMAT, __version__, tokenizers.__version__, [source.fingerprint for source in sources]]
        contents, _ = cached_file("tokens.bin", [*key, self.column, self.tokenizer.to_str()], write)
        return np.frombuffer(contents, dtype)

    def _sources(self, split: str) -> list[RowSource]:
        """Open the files or the hub dataset of a split."""
        if self.hub_id is not None:
            return [read_hub(self.hub_id, self.HUB_SPLITS[split], "data.hub_id")]
        key = f"data.{split}_file"
        return [
            TextFile(file, key) if file.lower().endswith(".txt") else read_file(file, key)
            for file in self.files[split] or ()
        ]

    # Rows

    def row_number(self, split: str, row: int) -> int:
        """Return the number of a context in its split, counted from 1."""
        return row + 1

    def text(self, split: str, row: int) -> str:
        """Return the text of the predicted tokens of a context, at most its first 1,024 tokens."""
        targets = self.encoded[split].batch(np.array([row]))["targets"][0]
        tokens = targets[targets != IGNORE_INDEX][:_MAX_TEXT_TOKENS].tolist()
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def clusters(self, split: str) -> list[int] | None:
        """Return for every context the index of the text in which the middle of its predicted tokens is.

        A text that has more than half of these tokens contains their middle.

        Returns:
            None if the split is of one text, or its contexts are not cut from a stream of texts.
        """
        rows = self.encoded[split]
        if not isinstance(rows, PackedTokenDataset):
            return None
        ends = np.flatnonzero(np.asarray(rows.values) == self._end_of_text)
        middles = rows.ends - rows.n_targets // 2  # the targets of a context are the tokens up to its end, included
        clusters: list[int] = np.searchsorted(ends, middles).tolist()
        return clusters if len(set(clusters)) > 1 else None

    def continuations(self, split: str, prompt_tokens: int, max_tokens: int) -> list[Continuation]:
        """Return the first tokens of every context and those after them; shorter contexts are left out."""
        dataset = cast(PackedTokenDataset, self.encoded[split])
        ends = np.minimum(dataset.ends + 1, dataset.starts + prompt_tokens + max_tokens)
        contexts = (dataset.values[start:end].tolist() for start, end in zip(dataset.starts, ends, strict=True))
        return [(ids[:prompt_tokens], ids[prompt_tokens:]) for ids in contexts if len(ids) > prompt_tokens]

    @property
    def perplexity_note(self) -> str:
        """Definition of the perplexity in validation and test, displayed with its values."""
        context, stride = self._max_length(), self.stride or self._max_length()
        start = "" if stride == context else ", and the following ones are predicted from all tokens before them"
        return (
            f"Perplexity of validation and test: tokens are predicted from the {context - stride + 1} to {context} "
            f"tokens before them (contexts of {context}, stride {stride}); the first token of a split is not "
            f"predicted{start}."
        )

    def description(self) -> dict[str, Any]:
        """Return the data section of the run record, with the number of tokens and the contexts in each split."""
        datasets = {split: cast(PackedTokenDataset, rows) for split, rows in self.encoded.items()}
        return {
            **super().description(),
            "hub_id": self.hub_id,
            "column": self.column,
            "tokens": {split: int(rows.n_targets.sum()) for split, rows in datasets.items()},
            "context": self._max_length(),
            "stride": self.stride or self._max_length(),
        }


def _row_texts(source: RowSource, column: str) -> Iterator[str]:
    """Yield the texts of all rows whose text is not missing.

    Raises:
        InputError: there is no such column, or a value is not text.
    """
    require_columns(source, [column], keys="data.column")
    for number, row in source.read([column]):
        text = row[column] if isinstance(row, dict) else None
        if not isinstance(text, str | None):
            reason = f"must be text, got {shorten(text)} (data.column is the column to read)"
            raise source.error(f", row {number}: {shorten(column)} {reason}")
        if text is not None:
            yield text


def _pieces(file: TextIO) -> Iterator[str]:
    """Yield a text in pieces that GPT-2's tokenizer encodes as it encodes the complete text.

    A piece ends after its last word that is followed by white space, where the tokenizer always separates tokens.
    Only a piece without such a boundary is cut within a word or within white space.
    """
    text = ""
    while chunk := file.read(_PIECE_CHARACTERS - len(text)):
        text += chunk
        boundary = _BOUNDARY.match(text)
        end = boundary.end() if boundary else len(text)
        yield text[:end]
        text = text[end:]
    yield text
