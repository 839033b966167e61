"""Text of any length for language modelling, as one stream of tokens cut into full contexts."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gpt2_pl import __version__
from gpt2_pl.datamodules.base import TextData
from gpt2_pl.datamodules.batching import PackedTokenDataset
from gpt2_pl.datamodules.cache import cached_file
from gpt2_pl.datamodules.readers import RowSource, read_file, read_hub, require_columns
from gpt2_pl.errors import InputError, shorten
from gpt2_pl.filesystem import require_file
from gpt2_pl.text.tokenizer import END_OF_TEXT, encode_stream, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECE = 1 << 17  # characters of texts that are in memory at a time, with all that is made of them
_BATCH = 1000  # texts that are tokenised at a time
_CACHE_FORMAT = 2  # part of every cache key; raised when what is cached changes


class TextFile:
    """A UTF-8 file that is one text; its contents decide its fingerprint, whatever its name and its time.

    Args:
        path: the file.
        key: the option that named it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._status = self._find_status()

    def _find_status(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the contents."""
        with self._failures(), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def open(self) -> Iterator[TextIO]:
        """Open the text, with line ends as one character.

        Raises:
            InputError: it cannot be read, is not UTF-8, or was written to since its name was read.
        """
        with self._failures(), self.path.open(encoding="utf-8-sig") as file:
            yield file
            if self._find_status() != self._status:
                raise InputError(f"{self.key}: {self.path} changed while it was being read; wait until it is complete")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise InputError(f"{self.key}: {self.path} is not UTF-8 text: {error}") from None
        except OSError as error:
            raise InputError(f"{self.key}: {self.path} cannot be read: {error.strerror}") from None


class TextCorpus(TextData):
    """Text files, or a column of texts, for :class:`~gpt2_pl.tasks.LanguageModel`.

    A ``.txt`` file is one text; CSV, TSV, JSON lines and Parquet files and hub datasets have one in every row, in the
    column ``column``. Every text ends with ``<|endoftext|>``. Tokens are written once to a cache file, read from there
    through the page cache, and cut into contexts of ``max_length``: only the last one of a split is shorter.

    Args:
        train_file: file, or list of files, to train on.
        val_file: the same, to validate on; without one, the last ``val_fraction`` of the training tokens is set aside.
        test_file: the same, to test on.
        hub_id: dataset on the Hugging Face hub, read when no file is given.
        column: where a row's text is.
        tokenizer: folder or hub id; on the command line the base's own by default.
        vocab_size: train a byte-level BPE with so many entries on the training text, in place of ``tokenizer``.
        max_length: tokens in a context; by default what the model has room for.
        stride: tokens from the start of one context to the next in validation and test, from 1 to ``max_length``, as in
            transformers' "Perplexity of fixed-length models". By default ``max_length``: contexts do not overlap, which
            takes the least time, and the first tokens of each are predicted from few others. With a smaller one every
            token is predicted, once, from the ``max_length - stride + 1`` tokens or more before it.
        batch_size: contexts per process and step.
        eval_batch_size: contexts per process in validation and test.
        val_fraction: share of the training tokens to validate on where there is no validation file.

    Raises:
        InputError: at ``prepare_data``, a file or column that cannot be used, a tokenizer without an end of text, or
            too little text for two tokens.
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
        given = {"train": train_file, "val": val_file, "test": test_file}
        files = {split: [file] if isinstance(file, str) else list(file or []) for split, file in given.items()}
        super().__init__(
            {**files, "predict": []}, hub_id, tokenizer, max_length, batch_size, eval_batch_size, val_fraction
        )
        if vocab_size is not None and tokenizer is not None:
            raise InputError(
                f"data.vocab_size is {vocab_size} and data.tokenizer {tokenizer}: train a tokenizer or give one, "
                "not both (a base brings its own)"
            )
        self.column, self.vocab_size, self.stride = column, vocab_size, stride
        self._check_stride(max_length)

    def _check_stride(self, max_length: int | None) -> None:
        if self.stride is None or 1 <= self.stride <= (max_length or self.stride):
            return
        most = "" if max_length is None else f", which is {max_length}"
        raise InputError(f"data.stride must be between 1 and data.max_length{most}, got {self.stride}")

    def has_split(self, split: str) -> bool:
        """Whether there is text for the split: train, val or test."""
        if self.hub_id is not None:
            return split in self.HUB_SPLITS
        return bool(self.files[split]) or (split == "val" and bool(self.files["train"]))

    def _has_own_val(self) -> bool:
        return self.hub_id is not None or bool(self.files["val"])

    def _make_tokenizer(self) -> Tokenizer:
        if self.vocab_size is None:
            return super()._make_tokenizer()
        if self.hub_id is None and not self.files["train"]:
            raise InputError("data.vocab_size trains a tokenizer on data.train_file, which is not given")
        return train_tokenizer(self._texts("train"), self.vocab_size)

    def _texts(self, split: str) -> Iterator[str]:
        """The texts of a split's own files, long ones in pieces."""
        for source in self._sources(split):
            if isinstance(source, TextFile):
                with source.open() as file:
                    yield from _pieces(file)
            else:
                for text in self._row_texts(source):
                    yield from _pieces(io.StringIO(text))

    def _encode(self, split: str) -> PackedTokenDataset:
        source = "train" if split == "val" and not self._has_own_val() else split
        tokens = self._tokens(source)
        if not self._has_own_val() and source == "train":
            n_train = round(len(tokens) * (1.0 - self.val_fraction))
            tokens = tokens[:n_train] if split == "train" else tokens[n_train:]
        if len(tokens) < 2:
            raise InputError(f"the {split} text has {len(tokens)} tokens; it needs two or more (data.val_fraction?)")
        self._check_stride(self._max_length())
        return PackedTokenDataset(tokens, self._max_length(), None if split == "train" else self.stride)

    def _tokens(self, split: str) -> NDArray[Any]:
        """All tokens of a split's own files, mapped from a cache file."""
        sources = self._sources(split)
        dtype = np.dtype(np.uint16 if max(self.tokenizer.get_vocab().values()) < 1 << 16 else np.int32)

        def write(file: IO[bytes]) -> None:
            for source in sources:
                for ids in self._token_pieces(source):
                    file.write(np.asarray(ids, dtype).tobytes())

        key = [_CACHE_FORMAT, __version__, tokenizers.__version__, [source.fingerprint for source in sources]]
        contents, _ = cached_file("tokens.bin", [*key, self.column, self.tokenizer.to_str()], write)
        return np.frombuffer(contents, dtype)

    def _sources(self, split: str) -> list[TextFile | RowSource]:
        """A split's own files or hub dataset."""
        if self.hub_id is not None:
            return [self._with_column(read_hub(self.hub_id, self.HUB_SPLITS[split], "data.hub_id"))]
        key = f"data.{split}_file"
        return [
            TextFile(require_file(file, key), key)
            if Path(file).suffix.lower() == ".txt"
            else self._with_column(read_file(file, key))
            for file in self.files[split]
        ]

    def _with_column(self, source: RowSource) -> RowSource:
        require_columns(source, [self.column], keys="data.column")
        return source

    def _token_pieces(self, source: TextFile | RowSource) -> Iterator[list[int]]:
        """The tokens of a source, a part at a time; every text that has tokens ends with ``<|endoftext|>``.

        Special tokens that the tokenizer's post-processor puts around a text are left out.
        """
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise InputError(f"data.tokenizer has no {END_OF_TEXT}, which stands between texts")
        if isinstance(source, TextFile):
            with source.open() as file:
                yield from encode_stream(self.tokenizer, file)
            yield [end]
            return
        for texts in _batches(text.strip() for text in self._row_texts(source)):
            if len(texts) == 1:
                encoded = encode_stream(self.tokenizer, io.StringIO(texts[0]))
                yield from _ended(encoded, end)
            else:
                for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
                    yield from _ended([encoding.ids], end)

    def _row_texts(self, source: RowSource) -> Iterator[str]:
        """The texts of rows that have one."""
        for number, row in source.read([self.column]):
            text = row[self.column] if isinstance(row, dict) else None
            if not isinstance(text, str | None):
                raise InputError(
                    f"{source.key}: {source.name}, row {number}: {shorten(self.column)} is {shorten(text)}; it must "
                    "hold text (data.column says which column to read)"
                )
            if text:
                yield text

    @property
    def perplexity_note(self) -> str:
        """What perplexity is of, for where it is shown."""
        context, stride = self._max_length(), self.stride or self._max_length()
        start = "" if stride == context else ", the next ones from what there is before them"
        return (
            f"Perplexity of validation and test: tokens are predicted from the {context - stride + 1} to {context} "
            f"tokens before them (contexts of {context}, stride {stride}); the first token of a split is not "
            f"predicted{start}."
        )

    def description(self) -> dict[str, Any]:
        """What a run says of its data: sources, tokens and contexts in each split read."""
        return {
            "class": type(self).__name__,
            "files": {split: files for split, files in self.files.items() if files},
            "hub_id": self.hub_id,
            "column": self.column,
            "rows": {split: len(rows) for split, rows in self.encoded.items()},
            "tokens": {
                split: int(cast(PackedTokenDataset, rows).n_targets.sum()) for split, rows in self.encoded.items()
            },
            "context": self._max_length(),
            "stride": self.stride or self._max_length(),
            "batch_size": self.batch_size,
        }


def _ended(parts: Iterable[list[int]], end: int) -> Iterator[list[int]]:
    """Put ``end`` behind the parts of a text, unless they are all empty."""
    empty = True
    for ids in parts:
        empty = empty and not ids
        yield ids
    if not empty:
        yield [end]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts that are tokenised together: at most ``_BATCH`` of them and ``_PIECE`` characters, or a long one alone."""
    batch: list[str] = []
    n_characters = 0
    for text in texts:
        if batch and (len(batch) == _BATCH or n_characters + len(text) > _PIECE):
            yield batch
            batch, n_characters = [], 0
        batch.append(text)
        n_characters += len(text)
    if batch:
        yield batch


def _pieces(file: TextIO) -> Iterator[str]:
    """A text in pieces that have the words of the whole: each but the first begins with white space behind a word.

    A run without white space that is longer than a piece is cut where the piece ends.
    """
    rest = ""
    while read := file.read(_PIECE):
        text = rest + read
        words = text.rsplit(None, 1)
        cut = len(words[0]) if len(words) == 2 else len(text)
        yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest
