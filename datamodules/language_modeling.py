"""Text for language modeling: one token stream, cut into contexts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gpt2_pl import __version__
from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import PackedTokenDataset
from gpt2_pl.datamodules.cache import cached_file
from gpt2_pl.datamodules.readers import LocalFile, read_file, read_hub
from gpt2_pl.datamodules.rows import RowSource, require_columns
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.text.tokenizer import encode_stream, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CHUNK_CHARACTERS = 1 << 17  # characters in memory at a time, which bounds the memory of their encodings
_BATCH_TEXTS = 1000  # maximum number of texts that are tokenized together
_CACHE_FORMAT = 2  # part of every cache key; increment it when the cached contents change


class TextFile(LocalFile):
    """UTF-8 file with one text; arguments as in :class:`~gpt2_pl.datamodules.readers.LocalFile`."""

    @contextmanager
    def open(self) -> Iterator[TextIO]:
        r"""Open the text for reading; all line ends are read as ``\n``.

        Raises:
            InputError: the file is not UTF-8, or has changed since this object was created.
        """
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                yield file
        except UnicodeDecodeError as error:
            raise InputError(f"{self.key}: {self.path} is not UTF-8 text: {error}", key=self.key) from None
        self.check_unchanged()


class TextCorpus(TextData):
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
        self._check_stride(max_length)

    def _check_stride(self, max_length: int | None) -> None:
        if self.stride is None or 1 <= self.stride <= (max_length or self.stride):
            return
        limit = "data.max_length" if max_length is None else f"{max_length} (data.max_length)"
        raise InputError(key="data.stride", value=self.stride, expected=f"between 1 and {limit}")

    def _make_tokenizer(self) -> Tokenizer:
        if self.vocab_size is None:
            return super()._make_tokenizer()
        if self.hub_id is None and not self.files["train"]:
            message = "data.train_file is missing; data.vocab_size trains a tokenizer on it"
            raise InputError(message, key="data.train_file")
        return train_tokenizer(self._texts("train"), self.vocab_size)

    def _texts(self, split: str) -> Iterator[str]:
        """Yield the texts of a split's files or hub dataset, long texts in chunks."""
        for source in self._sources(split):
            if isinstance(source, TextFile):
                with source.open() as file:
                    yield from _chunks(file)
            else:
                for text in self._row_texts(source):
                    yield from _chunks(io.StringIO(text))

    def _encode(self, split: str) -> PackedTokenDataset:
        source = self._source_split(split)
        tokens = self._tokens(source)
        if not self._has_own_val() and source == "train":
            n_train = round(len(tokens) * (1.0 - self.val_fraction))
            tokens = tokens[:n_train] if split == "train" else tokens[n_train:]
        if len(tokens) < 2:
            reason = f"must have at least 2 tokens, got {len(tokens)}; give more text or change data.val_fraction"
            raise InputError(f"the {split} text {reason}", key=f"data.{source}_file")
        self._check_stride(self._max_length())
        return PackedTokenDataset(tokens, self._max_length(), None if split == "train" else self.stride)

    def _tokens(self, split: str) -> NDArray[Any]:
        """Return all tokens of a split's files or hub dataset, memory-mapped from a cache file."""
        sources = self._sources(split)
        dtype = np.dtype(np.uint16 if max(self.tokenizer.get_vocab().values()) < 1 << 16 else np.int32)

        def write(file: IO[bytes]) -> None:
            for source in sources:
                for ids in self._token_chunks(source):
                    file.write(np.asarray(ids, dtype).tobytes())

        key = [_CACHE_FORMAT, __version__, tokenizers.__version__, [source.fingerprint for source in sources]]
        contents, _ = cached_file("tokens.bin", [*key, self.column, self.tokenizer.to_str()], write)
        return np.frombuffer(contents, dtype)

    def _sources(self, split: str) -> list[TextFile | RowSource]:
        """Open the files or the hub dataset of a split."""
        if self.hub_id is not None:
            return [self._with_column(read_hub(self.hub_id, self.HUB_SPLITS[split], "data.hub_id"))]
        key = f"data.{split}_file"
        return [
            TextFile(file, key) if file.lower().endswith(".txt") else self._with_column(read_file(file, key))
            for file in self.files[split] or ()
        ]

    def _with_column(self, source: RowSource) -> RowSource:
        require_columns(source, [self.column], keys="data.column")
        return source

    def _token_chunks(self, source: TextFile | RowSource) -> Iterator[list[int]]:
        """Yield the tokens of a source in chunks.

        ``<|endoftext|>`` is appended to every text that has tokens. Special tokens of the tokenizer's post-processor
        are omitted.

        Raises:
            InputError: the tokenizer has no ``<|endoftext|>``, or the source cannot be read.
        """
        end = self._end_of_text
        if isinstance(source, TextFile):
            with source.open() as file:
                yield from encode_stream(self.tokenizer, file)
            yield [end]
            return
        for texts in _batches(text.strip() for text in self._row_texts(source)):
            if len(texts) == 1:
                yield from _append_end(encode_stream(self.tokenizer, io.StringIO(texts[0])), end)
                continue
            for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
                yield from _append_end([encoding.ids], end)

    def _row_texts(self, source: RowSource) -> Iterator[str]:
        """Yield the texts of all rows whose text is neither missing nor empty.

        Raises:
            InputError: a value is not text.
        """
        for number, row in source.read([self.column]):
            text = row[self.column] if isinstance(row, dict) else None
            if not isinstance(text, str | None):
                reason = f"must be text, got {shorten(text)} (data.column is the column to read)"
                raise source.error(f", row {number}: {shorten(self.column)} {reason}")
            if text:
                yield text

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


def _append_end(chunks: Iterable[list[int]], end: int) -> Iterator[list[int]]:
    """Yield the chunks of a text and, unless they are all empty, ``[end]``."""
    n_tokens = 0
    for ids in chunks:
        n_tokens += len(ids)
        yield ids
    if n_tokens:
        yield [end]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield batches of at most ``_BATCH_TEXTS`` texts and ``_CHUNK_CHARACTERS`` characters, or of one longer text."""
    batch: list[str] = []
    n_characters = 0
    for text in texts:
        if batch and (len(batch) == _BATCH_TEXTS or n_characters + len(text) > _CHUNK_CHARACTERS):
            yield batch
            batch, n_characters = [], 0
        batch.append(text)
        n_characters += len(text)
    if batch:
        yield batch


def _chunks(file: TextIO) -> Iterator[str]:
    """Yield a text in chunks that are cut after a word, so that the chunks have the same words as the text.

    A chunk without white space is cut at its end.
    """
    rest = ""
    while chunk := file.read(_CHUNK_CHARACTERS):
        text = rest + chunk
        words = text.rsplit(None, 1)
        cut = len(words[0]) if len(words) == 2 else len(text)
        yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest
