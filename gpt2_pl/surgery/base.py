"""What every surgery is: settings, and a change made to a GPT-2 before it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2


class Surgery(ABC):
    """Adds trainable parameters to a GPT-2 and freezes its own. Subclasses are dataclasses of their settings."""

    @abstractmethod
    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Change ``model`` in place and return it.

        Args:
            model: the GPT-2; its published parameters no longer require gradients afterwards.
            tokenizer: reads a text that initialises something; by default the one in the model's own folder.

        Raises:
            InputError: a setting that does not fit the model, or what another surgery has changed already.
        """

    def load_head(self, head: nn.Module) -> None:
        """Copy the classification head that an adapter was saved with; without one, nothing."""
        return

    def settings(self) -> dict[str, Any]:
        """Its class and settings as plain values; :func:`build` reads them."""
        return {"class_path": f"gpt2_pl.surgery.{type(self).__name__}", "init_args": asdict(self)}  # type: ignore[call-overload]


def build(settings: Surgery | dict[str, Any]) -> Surgery:
    """The surgery that :meth:`Surgery.settings` describes. Only this library's classes are built.

    Raises:
        InputError: another class, or settings that it does not have.
    """
    from gpt2_pl import surgery

    if isinstance(settings, Surgery):
        return settings
    package, _, name = str(settings.get("class_path")).rpartition(".")
    if package != surgery.__name__ or name not in surgery.SURGERIES:
        raise InputError(
            f"surgery: there is no {settings.get('class_path')!r}; it must be one of "
            + ", ".join(f"{surgery.__name__}.{name}" for name in surgery.SURGERIES)
        )
    try:
        return getattr(surgery, name)(**(settings.get("init_args") or {}))
    except TypeError as error:
        raise InputError(f"surgery {name}: {error}") from None


def freeze_base(model: GPT2) -> None:
    """The published parameters no longer require gradients; what surgery added keeps its own."""
    for name, parameter in model.named_parameters():
        if name in model.base_names:
            parameter.requires_grad_(False)


def token_ids(text: str, length: int, model: GPT2, tokenizer: Tokenizer | None) -> Tensor:
    """The first ``length`` tokens (length,) of ``text``, which is repeated where it is shorter (as in peft)."""
    if tokenizer is None:
        if model.source is None:
            raise InputError(f"init_text {text!r} needs a tokenizer: give apply() one, or load the model from a folder")
        from gpt2_pl.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model.source, "init_text")
    ids: Sequence[int] = tokenizer.encode(text).ids
    if not ids:
        raise InputError(f"init_text is {text!r}; it must hold text")
    return torch.tensor([ids[i % len(ids)] for i in range(length)])


def check_length(name: str, length: int, model: GPT2) -> None:
    """Refuse virtual tokens that the context has no room for."""
    if length < 1:
        raise InputError(f"{name}: length is {length}; it must be at least 1")
    room = model.config.n_positions - model.n_virtual - 1
    if length > room:
        others = f", {model.n_virtual} of which are virtual tokens already" if model.n_virtual else ""
        raise InputError(
            f"{name}: length is {length}; the model has n_positions = {model.config.n_positions}{others}: "
            f"at most {room} leave room for text"
        )
