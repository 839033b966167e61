"""Text of any length for language modelling, as one stream of tokens cut into full contexts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.base import TextData
from datamodules.batching import PackedRows
from datamodules.rows import Source, read_file, read_hub, require_columns
from gpt2_pl.errors import InputError
from gpt2_pl.files import existing_file, whole_file
from gpt2_pl.tokenizer import END_OF_TEXT, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PIECE = 1 << 20  # characters of a text file that are tokenised at a time
_CACHE_FORMAT = 1  # part of every cache key; raised when what is cached changes


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

    def has(self, split: str) -> bool:
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
        for file in self.files[split] or [None]:
            source = self._source(split, file)
            if isinstance(source, Path):
                yield from _pieces(source)
            else:
                yield from (text for texts in self._row_texts(source) for text in texts)

    def _encode(self, split: str) -> PackedRows:
        source = "train" if split == "val" and not self._has_own_val() else split
        tokens = self._tokens(source)
        if not self._has_own_val() and source == "train":
            n_train = round(len(tokens) * (1.0 - self.val_fraction))
            tokens = tokens[:n_train] if split == "train" else tokens[n_train:]
        if len(tokens) < 2:
            raise InputError(f"the {split} text has {len(tokens)} tokens; it needs two or more (data.val_fraction?)")
        self._check_stride(self._max_length())
        return PackedRows(tokens, self._max_length(), None if split == "train" else self.stride)

    def _tokens(self, split: str) -> NDArray[Any]:
        """All tokens of a split's own files, mapped from a cache file."""
        import datasets

        sources = [self._source(split, file) for file in (self.files[split] or [None])]
        identity = [source.fingerprint if not isinstance(source, Path) else _identity(source) for source in sources]
        key = json.dumps([_CACHE_FORMAT, identity, self.column, self.tokenizer.to_str()])
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "gpt2_pl"
        file = folder / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if not file.is_file():
            _write_tokens(file, (ids for source in sources for ids in self._token_pieces(source)), self.tokenizer)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def _source(self, split: str, file: str | None) -> Path | Source:
        if file is None:
            assert self.hub_id is not None
            source = read_hub(self.hub_id, self.HUB_SPLITS[split], "data.hub_id")
        elif Path(file).suffix.lower() == ".txt":
            return existing_file(file, f"data.{split}_file")
        else:
            source = read_file(file, f"data.{split}_file")
        require_columns(source, [self.column], keys="data.column")
        return source

    def _token_pieces(self, source: Path | Source) -> Iterator[list[int]]:
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise InputError(f"data.tokenizer has no {END_OF_TEXT}, which stands between texts")
        if isinstance(source, Path):
            for piece in _pieces(source):
                yield self.tokenizer.encode(piece).ids
            yield [end]
            return
        for texts in self._row_texts(source):
            texts = [text.strip() for text in texts]
            for encoding in self.tokenizer.encode_batch([text for text in texts if text]):
                yield [*encoding.ids, end]

    def _row_texts(self, source: Source) -> Iterator[list[str]]:
        """The texts of rows, a thousand at a time; those without a value are empty."""
        rows = source.read([self.column])
        while texts := [row[self.column] for _, row in islice(rows, 1000) if isinstance(row, dict)]:
            if wrong := [text for text in texts if not isinstance(text, str | None)]:
                raise InputError(f"data.column: {self.column!r} holds {wrong[0]!r}; it must hold text")
            yield [text or "" for text in texts]

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
            "tokens": {split: int(cast(PackedRows, rows).n_targets.sum()) for split, rows in self.encoded.items()},
            "context": self._max_length(),
            "stride": self.stride or self._max_length(),
            "batch_size": self.batch_size,
        }


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces that tokenise as the whole does.

    GPT-2 splits a run of white space before its last character; pieces are cut there, where that is a line end.
    """
    held = ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while read := file.read(_PIECE):
                held += read
                cut = len(held) - 1
                while (cut := held.rfind("\n", 1, cut)) > 0:
                    if not held[cut + 1].isspace():
                        yield held[:cut]
                        held = held[cut:]
                        break
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    if held:
        yield held


def _write_tokens(file: Path, pieces: Iterator[list[int]], tokenizer: Tokenizer) -> None:
    """Write all ids one after the other as a .npy file: beside its place, then renamed."""
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    length = 0
    with whole_file(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {**header, "shape": (10**15,)})  # as wide as the final one will be
        start = out.tell()
        for ids in pieces:
            out.write(np.asarray(ids, dtype).tobytes())
            length += len(ids)
        out.seek(0)
        np.lib.format.write_array_header_1_0(out, {**header, "shape": (length,)})
        if out.tell() != start:
            raise RuntimeError("the header of the token cache changed its size")
