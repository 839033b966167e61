"""Tokenizers: loading from Hugging Face folders, and training of small byte-level BPEs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import Model

END_OF_TEXT = "<|endoftext|>"
_MAX_GROWTH = 1000  # maximum factor by which a normalizer or decoder may lengthen a text
_GUARDED = {  # methods that may fail, and what they do
    **dict.fromkeys(("encode", "encode_batch"), "encode a text"),
    **dict.fromkeys(("decode", "decode_batch"), "decode ids"),
}
# Test texts for tokenizers: several scripts, whitespace, and runs that make some regular expressions hit their limit.
_PROBES = (
    "a",
    "hello world, it's 1.5 o'clock\n\n\tand so on  ",
    " Zé Привет 漢字 😀",
    *(f"{character * 40}{end}" for character in "aA1 .\n" for end in ("b!", "\0")),
)


class GuardedTokenizer:
    """Wrapper of a ``tokenizers.Tokenizer`` that raises InputError if the library fails or its Rust code panics.

    A Rust panic is a BaseException in Python, which ``except Exception`` does not catch.

    Args:
        tokenizer: the tokenizer; all attributes other than encoding and decoding are delegated to it.
        name: the name of the tokenizer in messages.
        key: the option that holds the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, key: str) -> None:
        self._tokenizer, self._name, self._key = tokenizer, name, key

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        attribute = getattr(self._tokenizer, name)
        return attribute if name not in _GUARDED else self._guard(attribute, _GUARDED[name])

    def _guard(self, method: Callable[..., Any], action: str) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            with _failures(f"{self._name} cannot {action}", self._key):
                return method(*args, **options)

        return guarded


@contextmanager
def _failures(message: str, key: str) -> Iterator[None]:
    """Convert exceptions, also of the Rust library, to an InputError of one line that starts with ``message``."""
    try:
        yield
    except (InputError, MemoryError, TypeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt and the like
        raise InputError(f"{message}: {' '.join(str(error).split())[:500]}", key=key) from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard output to the file descriptor of standard error, where Rust panics are printed."""
    try:
        stderr = os.dup(2)
    except OSError:  # the descriptor is closed
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _byte_level(model: Model) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(path_or_id: str | os.PathLike[str], key: str = "tokenizer") -> Tokenizer:
    """Load the tokenizer of a GPT-2 from a Hugging Face folder or hub id.

    Special tokens that the post-processor adds to a text are used in classification. Language models, whose texts end
    with ``<|endoftext|>``, are trained, evaluated and prompted without them.

    Truncation, padding, BPE dropout and sampling are disabled, regardless of the settings in the file. The tokenizer is
    tested on a few texts.

    Args:
        path_or_id: a folder with tokenizer.json, or with vocab.json and merges.txt; or a hub id.
        key: the option that holds ``path_or_id``, for the error message.

    Returns:
        A tokenizer that raises InputError if the library fails on a text.

    Raises:
        InputError: there is no tokenizer, a file cannot be read, the vocabulary is empty, two tokens have the same id,
            an id is far larger than the number of tokens, or the tokenizer fails on a text or returns no tokens.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.models import BPE

    from gpt2_pl.filesystem import resolve_checkpoint_dir

    folder = resolve_checkpoint_dir(path_or_id, key)
    name = f"{key}: the tokenizer in {folder}"
    file, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    with _without_stderr():
        with _failures(f"{name} cannot be read", key):
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                tokenizer = RustTokenizer.from_str(text)
                _check_settings(json.loads(text), tokenizer)
            elif vocab.is_file() and merges.is_file():
                tokenizer = _byte_level(BPE.from_file(str(vocab), str(merges)))
                tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
                _check_ids(json.loads(vocab.read_text(encoding="utf-8")))
            else:
                message = f"{key}: {folder} has neither tokenizer.json nor vocab.json with merges.txt"
                raise InputError(message, key=key)
            _make_deterministic(tokenizer)
        with _failures(f"{name} cannot be used", key):
            _check_encoding(tokenizer)
    return cast("Tokenizer", GuardedTokenizer(tokenizer, name, key))


def _make_deterministic(tokenizer: Tokenizer) -> None:
    """Disable truncation, padding and random sampling of encodings."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model: Any = tokenizer.model
    for setting in ("dropout", "alpha", "nbest_size"):  # BPE dropout; sampling of Unigram
        if getattr(model, setting, None) is not None:
            setattr(model, setting, None)


def _check_settings(settings: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Check that the tokenizer is the one that its tokenizer.json describes.

    Args:
        settings: the content of tokenizer.json.
        tokenizer: the loaded tokenizer.

    Raises:
        ValueError: two tokens have the same id, an added token does not get its id, or a normalizer or decoder can make
            text more than ``_MAX_GROWTH`` times as long.
    """
    if isinstance(entries := settings["model"].get("vocab"), dict):
        _check_ids(entries)
    for token in settings.get("added_tokens") or ():
        if token["content"] and tokenizer.token_to_id(token["content"]) != token["id"]:
            given = f"the id {token['id']} for the added token {token['content'][:100]!r}"
            rule = "an id must be unused, or the token's id in the vocabulary"
            raise ValueError(f"it has {given}, which gets {tokenizer.token_to_id(token['content'])}; {rule}")
    for part in ("normalizer", "decoder"):
        if (growth := _growth(settings.get(part))) > _MAX_GROWTH:
            raise ValueError(f"its {part} must make text at most {_MAX_GROWTH} times as long, got {growth:.3g}")


def _check_ids(entries: dict[str, int]) -> None:
    """Raise a ValueError if two tokens share an id, because one of them would be lost on saving."""
    seen: dict[int, str] = {}
    for token, number in entries.items():
        if seen.setdefault(number, token) != token:
            raise ValueError(f"it has the id {number} for two tokens, {seen[number][:100]!r} and {token[:100]!r}")


def _growth(component: Any) -> float:
    """Return the maximum factor by which a normalizer or decoder can lengthen a text."""
    component = component if isinstance(component, dict) else {}
    growth = max(1.0, len(str(component.get("content", "")))) if component.get("type") == "Replace" else 1.0
    for part in (*(component.get("normalizers") or ()), *(component.get("decoders") or ())):
        growth *= _growth(part)
    return growth


def _check_encoding(tokenizer: Tokenizer) -> None:
    """Check the ids of the vocabulary, and encode and decode a few texts.

    Raises:
        ValueError: the vocabulary is empty, an id is far too large, or no text is encoded to a token.
    """
    entries = tokenizer.get_vocab(with_added_tokens=True)
    if not entries:
        raise ValueError("it has an empty vocabulary")
    if (max_id := max(entries.values())) > 2 * len(entries) + 1000:  # tables indexed by id would be as long
        raise ValueError(f"it has {len(entries)} tokens and one with the id {max_id}, which is too large")
    encodings = [tokenizer.encode(text) for text in _PROBES]
    for encoding in (*encodings, *tokenizer.encode_batch(list(_PROBES))):
        tokenizer.decode(encoding.ids, skip_special_tokens=False)
    if not any(end > start for encoding in encodings for start, end in encoding.offsets):  # ignores special tokens
        raise ValueError("it makes no token of any text")


def validate_vocab_size(tokenizer: Tokenizer, vocab_size: int, where: str, key: str, rule: str | None = None) -> None:
    """Check that a model has all tokens of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        vocab_size: vocabulary size of the model.
        where: the source of ``vocab_size``, for the error message.
        key: the option of the tokenizer, for the error message.
        rule: what must be changed; by default, that the tokenizer must be that of the base.

    Raises:
        InputError: a token id of the vocabulary, or of a special token that is added to texts, is not below
            ``vocab_size``.
    """
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    max_id = max(tokenizer.encode("a").ids, default=0)  # of a special token of every text
    if max(needed, max_id + 1) > vocab_size:
        found = f"has {needed} tokens" if needed > vocab_size else f"gives a text the id {max_id}"
        rule = rule or f"{key} must be the tokenizer that the base was trained with"
        raise InputError(f"the tokenizer {found} and {where} has vocab_size {vocab_size}: {rule}", key=key)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; ``<|endoftext|>`` is token 0.

    Args:
        texts: the training texts.
        vocab_size: maximum number of tokens, at least 257.

    Returns:
        The tokenizer.

    Raises:
        InputError: ``vocab_size`` is below 257.
    """
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size < 257:
        raise InputError(key="vocab_size", value=vocab_size, expected=f"at least 257, for 256 bytes and {END_OF_TEXT}")
    tokenizer = _byte_level(BPE())
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
