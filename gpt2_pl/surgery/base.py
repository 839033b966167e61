"""What every surgery is: settings, and a change made to a GPT-2 before it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError
from gpt2_pl.kernels.prepacked_linear import Linear, MergeableLayer
from gpt2_pl.utils.registry import Registered, class_path
from gpt2_pl.utils.user_code import find_fault

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2


class Surgery(Registered, ABC):
    """A change to a GPT-2 before it trains: adapters, virtual tokens, or the choice of what trains.

    Subclasses are usually dataclasses of their settings, which must be plain values. The smallest one trains the
    biases alone::

        @dataclass
        class BitFit(Surgery):
            def apply(self, model, tokenizer=None):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name.endswith("bias"))
                return model

    A task sets ``requires_grad`` of the published parameters to its ``train_base``, then applies its surgery in order.
    What requires a gradient after that trains and is saved; frozen published parameters are taken from the base again.

    Attributes:
        freezes_base: whether ``apply`` ends by freezing the published parameters, for use outside of a task. A task
            restores their ``requires_grad``, so that such surgery combines with other surgery and ``train_base``.
    """

    freezes_base = False

    @abstractmethod
    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Change ``model`` in place and return it.

        A task calls this twice: first on a model without weights (on the meta device), so that settings that do not
        fit are refused early, then on the loaded one. The change must follow from the settings and the base alone.

        Args:
            model: the GPT-2.
            tokenizer: reads a text that initialises something; by default the one in the model's own folder.

        Raises:
            InputError: a setting that does not fit the model, or what another surgery has changed already.
        """

    def load_head(self, head: nn.Module) -> None:
        """Copy the classification head that an adapter was saved with; without one, nothing."""
        return

    def settings(self) -> dict[str, Any]:
        """Return class path and arguments as plain values, from which :func:`build` makes an equal surgery.

        Raises:
            InputError: an argument that is not a plain value, or that the surgery does not keep.
        """
        cls = type(self)
        if is_dataclass(self):
            arguments = asdict(self)
        else:
            names = [name for name in signature(cls).parameters if name not in ("args", "kwargs")]
            if missing := [name for name in names if not hasattr(self, name)]:
                raise InputError(
                    f"surgery {class_path(cls)} does not keep its argument {missing[0]!r}; make it a dataclass, or set "
                    f"self.{missing[0]} in __init__"
                )
            arguments = {name: getattr(self, name) for name in names}
        for name, value in arguments.items():
            if not is_plain(value):
                raise InputError(
                    f"surgery {class_path(cls)}: {name} must be text, a number, a boolean, None, or a list or dict of "
                    f"these, because a checkpoint holds it; got {value!r:.100}"
                )
        return {"class_path": class_path(cls), "init_args": arguments}


def is_plain(value: Any) -> bool:
    """Return whether a checkpoint can hold ``value`` without pickled classes."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(type(key) in (str, int, float, bool) and is_plain(one) for key, one in value.items())
    return value is None or type(value) in (str, int, float, bool)


def build(settings: Surgery | dict[str, Any]) -> Surgery:
    """Make the surgery that :meth:`Surgery.settings` describes, of a class that has been imported.

    Raises:
        InputError: a class that is neither this library's nor imported, or arguments that it does not take.
    """
    if isinstance(settings, Surgery):
        return settings
    path = settings.get("class_path")
    cls = Surgery.find(path)
    if cls is None:
        ours = [class_path(one) for one in Surgery._classes.values()]
        known = ", ".join(name for name in ours if name.startswith("gpt2_pl."))
        raise InputError(
            f"surgery: there is no {str(path)[:200]!r}; this library has {known}. Code of your own is imported by "
            "--plugin MODULE, or by a configuration that names it"
        )
    try:
        return cls(**(settings.get("init_args") or {}))
    except InputError:
        raise
    except Exception as error:  # whatever the class makes of arguments from a file
        fault = find_fault(error)
        reason = fault.text if fault is not None else " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"surgery {cls.__name__}: {reason}") from error


def freeze_base(model: GPT2) -> None:
    """The published parameters no longer require gradients; what surgery added keeps its own."""
    for name, parameter in model.named_parameters():
        if name in model.base_names:
            parameter.requires_grad_(False)


def plain_layer(model: GPT2, path: str, surgery: str) -> nn.Module:
    """Return the linear layer or token embedding at ``path``, if no other surgery has taken its place.

    Args:
        model: the GPT-2.
        path: such as ``h.0.mlp.c_fc`` or ``wte``.
        surgery: the name of the surgery that is to adapt it, for error messages.

    Raises:
        InputError: a layer of another class, which computes something else, or none.
    """
    modules = dict(model.named_modules())
    layer = modules.get(path)
    if layer is not None and type(layer) in (nn.Linear, Linear, nn.Embedding):
        return layer
    where, rest = path, ""
    while where not in modules:
        where, _, rest = where.rpartition(".")
    fault = f"which has no {rest}" if rest else f"which {surgery} cannot adapt"
    raise InputError(
        f"{surgery}: {where} is a {class_path(type(modules[where]))}, {fault}; put {surgery} before the surgery that "
        "made it, or choose other targets"
    )


def merge(model: GPT2) -> GPT2:
    """Fold every adapter into its layer, which is then a plain one: nothing of an adapter is computed any more.

    An adapter is a module in the place of a linear layer or of the token embedding, with a ``weight`` and a method
    ``merged() -> (weight, bias)``; see :class:`~gpt2_pl.surgery.MergeableLayer`. The adapters are kept for
    :func:`unmerge`, outside ``parameters()`` and ``state_dict()``.
    """
    merged: list[str] = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Module) or not isinstance(module, MergeableLayer):
            continue
        if merged and name.startswith(f"{merged[-1]}."):  # a part of that adapter, which has merged it
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
    """Undo :func:`merge`: the adapters, and bitwise the weights, from before."""
    for name, module in list(model.named_modules()):
        if "_unmerged" in module.__dict__:
            adapted = module.__dict__["_unmerged"].to(module.weight.device)
            model.set_submodule(name, adapted.train(module.training))
    return model


def token_ids(text: str, length: int, model: GPT2, tokenizer: Tokenizer | None) -> Tensor:
    """The first ``length`` tokens (length,) of ``text``, which is repeated where it is shorter (as in peft)."""
    if tokenizer is None:
        if model.source is None:
            raise InputError(f"init_text {text!r} needs a tokenizer: give apply() one, or load the model from a folder")
        from gpt2_pl.text.tokenizer import load_tokenizer

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
