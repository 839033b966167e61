"""Byte-level BPE tokenizers: loading them from Hugging Face folders, training small ones on the spot."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import Model

END_OF_TEXT = "<|endoftext|>"


def _byte_level(model: Model) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(path_or_id: str | os.PathLike[str], key: str = "tokenizer") -> Tokenizer:
    """Load GPT-2's tokenizer, or one of its kind, from a Hugging Face folder or hub id.

    Args:
        path_or_id: a folder with tokenizer.json, or with vocab.json and merges.txt; or a hub id.
        key: the option that held it, for the error message.

    Raises:
        InputError: nothing there, an unreadable file, an empty vocabulary, or ids far beyond the number of tokens.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    from gpt2_pl.pretrained import resolve

    folder = resolve(path_or_id, key)
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
            tokenizer.no_truncation()
            tokenizer.no_padding()
        elif vocab.is_file() and merges.is_file():
            tokenizer = _byte_level(BPE.from_file(str(vocab), str(merges)))
            tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        else:
            raise InputError(f"{key}: {folder} has neither tokenizer.json nor vocab.json with merges.txt")
    except InputError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise InputError(f"{key}: the tokenizer in {folder} cannot be read: {error}") from None
    if tokenizer.get_vocab_size() == 0 or not tokenizer.encode("a").ids:
        raise InputError(f"{key}: the tokenizer in {folder} has an empty vocabulary")
    entries = tokenizer.get_vocab(with_added_tokens=True)
    if (greatest := max(entries.values())) > 2 * len(entries) + 1000:  # tables by id would be as long
        raise InputError(f"{key}: the tokenizer in {folder} has {len(entries)} tokens and one with the id {greatest}")
    return tokenizer


def check_fits(tokenizer: Tokenizer, vocab_size: int, where: str, key: str) -> None:
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
