"""Base class of all surgery (PEFT methods), and functions to build, merge and unmerge it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError, require
from gpt2_pl.kernels.prepacked_linear import Linear, MergeableLayer
from gpt2_pl.utils.registry import Registered, class_path
from gpt2_pl.utils.user_code import find_fault

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2


class Surgery(Registered, ABC):
    """Change of a GPT-2 before training: adapters, virtual tokens, or the selection of trainable parameters.

    Subclasses are usually dataclasses of their settings, which must be plain values. A minimal example trains only the
    last block::

        @dataclass
        class LastBlock(Surgery):
            def apply(self, model, tokenizer=None):
                model.h[-1].requires_grad_(True)
                return model

    A task sets ``requires_grad`` of the published parameters to its ``train_base``, then applies its surgery in order.
    Parameters that then require a gradient are trained and saved. Frozen published parameters are not saved; they are
    loaded from the base again.

    Attributes:
        freezes_base: whether ``apply`` freezes all parameters of the base, so that it also works without a task. A task
            undoes this freezing, so that such surgery can be combined with other surgery and ``train_base``. It must
            be False in surgery that selects which parameters of the base train.
        selects_base: whether ``apply`` selects which parameters of the base train, and freezes the others. A task does
            not combine it with ``train_base``.
        loads_weights: whether ``apply`` adds weights that were trained before. The reference of
            :class:`~gpt2_pl.tasks.DPO` then includes them.
    """

    freezes_base = False
    selects_base = False
    loads_weights = False

    @abstractmethod
    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Change ``model`` in place and return it.

        A task calls this twice: first on a model without weights (on the meta device), to reject invalid settings
        early, then on the loaded model. The change must depend only on the settings and the base.

        Args:
            model: the GPT-2.
            tokenizer: encodes an initial text; by default the tokenizer in the model's folder.

        Returns:
            ``model``.

        Raises:
            InputError: a setting does not fit the model or the surgery that was applied before.
        """

    def load_head(self, head: nn.Module) -> None:
        """Copy the classification head that an adapter was saved with, if there is one."""
        return

    def settings(self) -> dict[str, Any]:
        """Return class path and arguments as plain values, from which :func:`build` creates an equal surgery.

        Raises:
            InputError: an argument is not a plain value, or is not stored as an attribute.
        """
        path, arguments = class_path(type(self)), {}
        for name in (name for name in signature(type(self)).parameters if name not in ("args", "kwargs")):
            if not hasattr(self, name):
                raise InputError(f"surgery {path} must store its argument {name!r} as an attribute", key=name)
            value = arguments[name] = getattr(self, name)
            expected = "text, a number, a boolean, None, or a list or dict of these, for checkpoints"
            require(is_plain(value), name, value, expected, f"surgery {path}")
        return {"class_path": path, "init_args": arguments}


def is_plain(value: Any) -> bool:
    """Return whether ``value`` can be stored in a checkpoint without pickled classes."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(type(key) in (str, int, float, bool) and is_plain(one) for key, one in value.items())
    return value is None or type(value) in (str, int, float, bool)


def build(settings: Surgery | dict[str, Any]) -> Surgery:
    """Create a surgery from the settings that :meth:`Surgery.settings` returns.

    Args:
        settings: class path and arguments, or a surgery, which is returned unchanged. The class must be imported.

    Raises:
        InputError: the class is unknown, or does not accept the arguments.
    """
    if isinstance(settings, Surgery):
        return settings
    path = settings.get("class_path")
    cls = Surgery.find(path)
    if cls is None:
        advice = "import your own code with --plugin MODULE, or name it in a configuration"
        raise InputError(f"surgery: there is no {str(path)[:200]!r}; {advice}", key="class_path")
    try:
        return cls(**(settings.get("init_args") or {}))
    except InputError:
        raise
    except Exception as error:  # any error of the class from arguments in a file
        fault = find_fault(error)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(reason if fault is None else fault.text, source=f"surgery {cls.__name__}") from error


def freeze_base(model: GPT2) -> None:
    """Set ``requires_grad`` of the published parameters to False; parameters added by surgery do not change."""
    for name, parameter in model.named_parameters():
        if name in model.base_names:
            parameter.requires_grad_(False)


def merge(model: GPT2) -> GPT2:
    """Merge every adapter into its layer, which becomes a plain layer without additional computation.

    An adapter is a module that replaces a linear layer or the token embedding, with a ``weight`` and a method
    ``merged() -> (weight, bias)``; see :class:`~gpt2_pl.surgery.MergeableLayer`. The adapters are kept for
    :func:`unmerge`, outside ``parameters()`` and ``state_dict()``.

    Args:
        model: the GPT-2, changed in place.

    Returns:
        ``model``.
    """
    merged: list[str] = []
    for name, module in list(model.named_modules()):
        is_inside_adapter = bool(merged) and name.startswith(f"{merged[-1]}.")
        if is_inside_adapter or not isinstance(module, nn.Module) or not isinstance(module, MergeableLayer):
            continue
        merged.append(name)
        with torch.no_grad():
            weight, bias = module.merged()
        trains = bool(getattr(module, "weight", weight).requires_grad)
        plain: Linear | nn.Embedding
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                plain = nn.Embedding(*weight.shape)
            else:
                plain = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
                if bias is not None:
                    plain.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=trains)
        plain.weight = nn.Parameter(weight, requires_grad=trains)
        plain.train(module.training)
        plain.__dict__["_unmerged"] = module.eval()
        model.set_submodule(name, plain)
    return model


def unmerge(model: GPT2) -> GPT2:
    """Undo :func:`merge`: restore the adapters, and the weights bitwise."""
    for name, module in list(model.named_modules()):
        if "_unmerged" in module.__dict__:
            adapted = module.__dict__["_unmerged"].to(module.weight.device)
            model.set_submodule(name, adapted.train(module.training))
    return model


def token_ids(text: str | None, length: int, model: GPT2, tokenizer: Tokenizer | None) -> Tensor:
    """Encode ``text`` as exactly ``length`` tokens: cut, or repeated if it is shorter, as in peft.

    Args:
        text: the text; None for tokens drawn from the vocabulary.
        length: number of tokens.
        model: the GPT-2, whose folder contains the tokenizer if ``tokenizer`` is None.
        tokenizer: the tokenizer.

    Returns:
        Token ids (length,).

    Raises:
        InputError: there is no tokenizer, or the text has no tokens.
    """
    if text is None:
        return torch.randint(model.config.vocab_size, (length,), device="cpu")
    if tokenizer is None:
        if model.source is None:
            remedy = "pass one to apply(), or load the model from a folder"
            raise InputError(f"init_text {text!r} needs a tokenizer; {remedy}", key="init_text")
        from gpt2_pl.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(model.source, "init_text")
    ids: Sequence[int] = tokenizer.encode(text).ids
    require(bool(ids), "init_text", text, "a text with at least one token")
    return torch.tensor([ids[i % len(ids)] for i in range(length)])


def check_length(name: str, length: int, model: GPT2) -> None:
    """Check that ``length`` more virtual tokens fit the context and leave at least one position for text.

    Args:
        name: the name of the surgery, for the error message.
        length: number of virtual tokens.
        model: the GPT-2.

    Raises:
        InputError: ``length`` is out of range.
    """
    limit = model.config.n_positions - model.n_virtual - 1
    room = f"n_positions = {model.config.n_positions}, {model.n_virtual} of them virtual tokens already"
    expected = f"at least 1 and at most {limit} to leave a position for text ({room})"
    require(1 <= length <= limit, "length", length, expected, name)
