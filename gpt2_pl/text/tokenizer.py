"""Byte-level BPE tokenizers: loading them from Hugging Face folders, training small ones on the spot."""

from __future__ import annotations

import json
import os
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TextIO, cast

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.models import Model

END_OF_TEXT = "<|endoftext|>"
_WINDOW, _OVERLAP = 1 << 17, 1 << 10  # characters of a long text that are encoded at a time, and again with the next
_MAX_GROWTH = 1000  # characters that a tokenizer may make of one
# Texts that a tokenizer is tried with: several scripts, white space, and what drives a careless regex into its limit.
_PROBES = (
    "a",
    "hello world, it's 1.5 o'clock\n\n\tand so on  ",
    " Zé Привет 漢字 😀",
    *(f"{character * 40}{end}" for character in "aA1 .\n" for end in ("b!", "\0")),
)


class GuardedTokenizer:
    """A ``tokenizers.Tokenizer`` that raises InputError where the library fails, also where its Rust code panics.

    A panic is a BaseException in Python: it passes every ``except Exception``.

    Args:
        tokenizer: the tokenizer; everything but encoding and decoding is its own.
        name: what messages call it.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> Encoding:
        """Encode a text."""
        with _failures(f"{self._name} cannot encode a text"):
            return self._tokenizer.encode(text, **options)

    def encode_batch(self, texts: Sequence[str], **options: Any) -> list[Encoding]:
        """Encode several texts."""
        with _failures(f"{self._name} cannot encode a text"):
            return self._tokenizer.encode_batch(cast(Any, texts), **options)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """Decode the ids of a text."""
        with _failures(f"{self._name} cannot decode ids"):
            return self._tokenizer.decode(ids, **options)

    def decode_batch(self, batch: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Decode the ids of several texts."""
        with _failures(f"{self._name} cannot decode ids"):
            return self._tokenizer.decode_batch(cast(Any, batch), **options)


@contextmanager
def _failures(message: str) -> Iterator[None]:
    """Turn what the Rust library raises into an InputError of one line that begins with ``message``."""
    try:
        yield
    except (InputError, MemoryError, TypeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt and the like
        raise InputError(f"{message}: {' '.join(str(error).split())[:300]}") from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what is written to standard error's file descriptor: a panic of Rust code writes there by itself."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _byte_level(model: Model) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(path_or_id: str | os.PathLike[str], key: str = "tokenizer") -> Tokenizer:
    """Load GPT-2's tokenizer, or one of its kind, from a Hugging Face folder or hub id.

    Special tokens that its post-processor puts around a text are part of a text that is classified. Language models,
    whose texts end with ``<|endoftext|>``, are trained, scored and prompted without them.

    Truncation, padding, BPE dropout and sampling are off, whatever the file says. The tokenizer is tried on a few
    texts.

    Args:
        path_or_id: a folder with tokenizer.json, or with vocab.json and merges.txt; or a hub id.
        key: the option that held it, for the error message.

    Returns:
        A tokenizer that raises InputError where the library fails on a text.

    Raises:
        InputError: nothing there, an unreadable file, an empty vocabulary, two tokens with one id, ids far beyond the
            number of tokens, a tokenizer that fails on a text or makes no token of any.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.models import BPE

    from gpt2_pl.filesystem import resolve_checkpoint_dir

    folder = resolve_checkpoint_dir(path_or_id, key)
    name = f"{key}: the tokenizer in {folder}"
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    with _without_stderr():
        with _failures(f"{name} cannot be read"):
            if whole.is_file():
                text = whole.read_text(encoding="utf-8")
                tokenizer = RustTokenizer.from_str(text)
                _check_settings(json.loads(text), tokenizer, name)
            elif vocab.is_file() and merges.is_file():
                tokenizer = _byte_level(BPE.from_file(str(vocab), str(merges)))
                tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
                _check_ids(json.loads(vocab.read_text(encoding="utf-8")), name)
            else:
                raise InputError(f"{key}: {folder} has neither tokenizer.json nor vocab.json with merges.txt")
            _make_deterministic(tokenizer)
        entries = tokenizer.get_vocab(with_added_tokens=True)
        if not entries:
            raise InputError(f"{name} has an empty vocabulary")
        if (greatest := max(entries.values())) > 2 * len(entries) + 1000:  # tables by id would be as long
            raise InputError(f"{name} has {len(entries)} tokens and one with the id {greatest}")
        with _failures(f"{name} cannot be used"):
            _try(tokenizer, name)
    return cast("Tokenizer", GuardedTokenizer(tokenizer, name))


def _make_deterministic(tokenizer: Tokenizer) -> None:
    """Turn off what cuts, pads or randomises an encoding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model: Any = tokenizer.model
    for setting in ("dropout", "alpha", "nbest_size"):  # of BPE; of Unigram's sampling
        if getattr(model, setting, None) is not None:
            setattr(model, setting, None)


def _check_settings(settings: dict[str, Any], tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer.json that loads as something other than it states.

    Raises:
        InputError: two tokens with one id, an added token with an id that it does not get, or a normalizer or decoder
            that makes text grow without a sensible limit.
    """
    if isinstance(entries := settings["model"].get("vocab"), dict):
        _check_ids(entries, name)
    for token in settings.get("added_tokens") or ():
        if token["content"] and tokenizer.token_to_id(token["content"]) != token["id"]:
            raise InputError(
                f"{name} states the id {token['id']} for the added token {token['content'][:100]!r}, which gets "
                f"{tokenizer.token_to_id(token['content'])}; an id must be free, or the token's own in the vocabulary"
            )
    for part in ("normalizer", "decoder"):
        if (growth := _growth(settings.get(part))) > _MAX_GROWTH:
            raise InputError(
                f"{name} has a {part} that can make text {growth:.3g} times as long; at most {_MAX_GROWTH} times is "
                "allowed"
            )


def _check_ids(entries: dict[str, int], name: str) -> None:
    """Refuse a vocabulary in which two tokens share an id: one of them is lost when it is saved."""
    seen: dict[int, str] = {}
    for token, number in entries.items():
        if seen.setdefault(number, token) != token:
            raise InputError(f"{name} has the id {number} for two tokens, {seen[number][:100]!r} and {token[:100]!r}")


def _growth(component: Any) -> float:
    """How many times as long as a text the output of a normalizer or decoder can be."""
    if not isinstance(component, dict):
        return 1.0
    growth = max(1.0, len(str(component.get("content", "")))) if component.get("type") == "Replace" else 1.0
    for part in (*(component.get("normalizers") or ()), *(component.get("decoders") or ())):
        growth *= _growth(part)
    return growth


def _try(tokenizer: Tokenizer, name: str) -> None:
    """Encode and decode a few texts.

    Raises:
        InputError: no text gets a token.
    """
    found = [tokenizer.encode(text) for text in _PROBES]
    for encoding in (*found, *tokenizer.encode_batch(list(_PROBES))):
        tokenizer.decode(encoding.ids, skip_special_tokens=False)
    if not any(end > start for encoding in found for start, end in encoding.offsets):  # special tokens cover no text
        raise InputError(f"{name} makes no token of any text")


def validate_vocab_size(tokenizer: Tokenizer, vocab_size: int, where: str, key: str) -> None:
    """Refuse a tokenizer with tokens that a model does not have.

    Args:
        tokenizer: of the option ``key``.
        vocab_size: the model's, which ``where`` states.
        where: for the error message.
        key: the same.

    Raises:
        InputError: its greatest token id, or one that it adds to every text, is beyond ``vocab_size``.
    """
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if needed > vocab_size:
        raise InputError(
            f"the tokenizer has {needed} tokens and {where} has vocab_size {vocab_size}: "
            f"{key} must be the one that the base was trained with"
        )
    if (greatest := max(tokenizer.encode("a").ids, default=0)) >= vocab_size:  # one that is put around every text
        raise InputError(
            f"the tokenizer gives a text the id {greatest} and {where} has vocab_size {vocab_size}: "
            f"{key} must be the one that the base was trained with"
        )


_Token = tuple[int, tuple[int, int]]  # its id, and where it starts and ends in the text


def encode_stream(
    tokenizer: Tokenizer, file: TextIO, window: int = _WINDOW, overlap: int = _OVERLAP
) -> Iterator[list[int]]:
    """Encode a text of any length in bounded memory, without the special tokens that a tokenizer puts around a text.

    The text is encoded in overlapping windows. Two windows are joined between two tokens that both of them have at the
    same place. For a byte-level BPE the result equals the encoding of the whole text: a sequence of tokens is the
    encoding of its text exactly if every two neighbours are the encoding of theirs, and GPT-2's pre-tokenizer never
    looks back. The two can differ only where the windows have no such tokens in common: in a run without a boundary of
    hundreds of characters, or a single token as long.

    Args:
        tokenizer: the tokenizer.
        file: the text, open for reading.
        window: characters encoded at a time.
        overlap: characters of a window that are encoded with the next one too, at most half of ``window``.

    Yields:
        The ids of one part of the text after the other.
    """
    text, pending = file.read(window), list[_Token]()  # tokens of the window before, from the start of `text` on
    while True:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
        before, after = _common_boundary(pending, tokens)
        more = file.read(window - overlap)
        if not more:
            yield [token for token, _ in (*pending[:before], *tokens[after:])]
            return
        cut, place = _restart(encoding, len(text) - overlap, len(text) - overlap // 2)
        yield [token for token, _ in (*pending[:before], *tokens[after:cut])]
        pending = [(token, (start - place, end - place)) for token, (start, end) in tokens[cut:]]
        text = text[place:] + more


def _common_boundary(left: list[_Token], right: list[_Token]) -> tuple[int, int]:
    """Find the first two neighbouring tokens that two encodings have at the same place.

    Returns:
        The number of tokens before the boundary between them in each encoding; 0 and 0 where there is none.
    """
    numbers: dict[int, int] = {}  # of the first token of `right` that starts at each place
    for j, (_, (start, _)) in enumerate(right):
        if not left or start > left[-1][1][0]:
            break
        numbers.setdefault(start, j)
    for i in range(1, len(left)):
        start = left[i][1][0]
        j = numbers.get(start, 0)
        if j and left[i - 1][1][1] <= start and left[i - 1 : i + 1] == right[j - 1 : j + 1]:
            return i, j
    return 0, 0


def _restart(encoding: Encoding, first: int, last: int) -> tuple[int, int]:
    """Choose where the next window starts: at the start of a word, else between two tokens, else at ``first``.

    Args:
        encoding: of this window.
        first: the first character that may be chosen.
        last: the last one.

    Returns:
        The number of tokens and of characters before it.
    """
    offsets, boundary = encoding.offsets, None
    for i in range(max(1, bisect_left(offsets, first, key=itemgetter(1))), len(offsets)):
        place = offsets[i - 1][1]  # a token may start, by its offsets, behind a space that belongs to it
        if place > last:
            break
        if first <= place <= offsets[i][0]:
            if encoding.token_to_word(i) != encoding.token_to_word(i - 1):
                return i, place
            boundary = boundary or (i, place)
    return boundary or (sum(end <= first for _, end in offsets), first)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` entries; ``<|endoftext|>`` is token 0."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size < 257:
        raise InputError(
            f"vocab_size is {vocab_size}; a byte-level BPE needs 256 bytes and {END_OF_TEXT}: at least 257"
        )
    tokenizer = _byte_level(BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
