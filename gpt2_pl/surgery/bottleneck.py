"""Bottleneck adapters behind the attention and the MLP of a block (Houlsby et al. 2019; Pfeiffer et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_pl.errors import InputError, require
from gpt2_pl.kernels.prepacked_linear import Linear
from gpt2_pl.model import MLP, CausalSelfAttention
from gpt2_pl.surgery.base import Surgery, freeze_base
from gpt2_pl.surgery.targets import Layers, chosen_blocks
from gpt2_pl.utils.registry import class_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2

Placement = Literal["houlsby", "pfeiffer"]
Activation = Literal["relu", "gelu", "silu", "tanh"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
_DEFAULT_REDUCTION = 16


class Bottleneck(nn.Module):
    """Bottleneck with a residual connection, x + W_up f(W_down x + b_down) + b_up.

    W_down is initialized as the weights of GPT-2, from N(0, 0.02^2), and W_up by zeros, so that nothing changes at
    first.

    Args:
        width: size C of the inputs and outputs.
        size: size m of the bottleneck.
        activation: f.
    """

    def __init__(self, width: int, size: int, activation: Activation) -> None:
        super().__init__()
        self.down, self.up, self.activation = Linear(width, size), Linear(size, width), activation
        nn.init.normal_(self.down.weight, std=0.02)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the adapter: (..., C) -> (..., C)."""
        return x + self.up(_ACTIVATIONS[self.activation](self.down(x)))


class AdaptedMLP(MLP):
    """MLP with an adapter behind it; its layers keep their names.

    Args:
        mlp: the MLP; its layers are reused.
        adapter: the adapter.
    """

    def __init__(self, mlp: MLP, adapter: Bottleneck) -> None:
        nn.Module.__init__(self)  # MLP.__init__ would create new layers
        self.c_fc, self.c_proj, self.adapter = mlp.c_fc, mlp.c_proj, adapter

    def forward(self, x: Tensor) -> Tensor:
        """Compute the adapted MLP: (B, T, C) -> (B, T, C)."""
        return self.adapter(super().forward(x))


class AdaptedAttention(CausalSelfAttention):
    """Attention with an adapter behind it; its layers keep their names.

    Args:
        attention: the attention; its layers are reused.
        adapter: the adapter.
    """

    def __init__(self, attention: CausalSelfAttention, adapter: Bottleneck) -> None:
        nn.Module.__init__(self)  # CausalSelfAttention.__init__ would create new layers
        self.n_head, self.dropout = attention.n_head, attention.dropout
        self.c_attn, self.c_proj, self.adapter = attention.c_attn, attention.c_proj, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the adapted attention output; see :meth:`CausalSelfAttention.forward`."""
        return self.adapter(super().forward(*args, **kwargs))


@dataclass
class BottleneckAdapter(Surgery):
    """Bottleneck adapters at the end of residual branches: x + W_up f(W_down x), before the branch's dropout.

    Args:
        placement: ``houlsby``, behind the attention and the MLP (Houlsby et al. 2019), or ``pfeiffer``, behind the MLP
            (Pfeiffer et al. 2021).
        size: size m of the bottleneck, at least 1; by default C // ``reduction``.
        reduction: C divided by m, at least 1; 16 by default. Only one of ``size`` and ``reduction`` can be set.
        activation: f: ``relu``, ``gelu`` (the tanh approximation), ``silu`` or ``tanh``.
        layers: the blocks to adapt, as numbers from 0 or as ranges such as ``"0-2,9-11"``; by default all.

    Raises:
        InputError: a value is out of range; in ``apply``, a block does not exist, the bottleneck would have no units,
            or other surgery has replaced the attention or the MLP.
    """

    freezes_base = True

    placement: Placement = "pfeiffer"
    size: int | None = None
    reduction: int | None = None
    activation: Activation = "relu"
    layers: Layers = None

    def __post_init__(self) -> None:
        name = "BottleneckAdapter"
        for key, kind in (("placement", Placement), ("activation", Activation)):
            require(getattr(self, key) in get_args(kind), key, getattr(self, key), f"one of {get_args(kind)}", name)
        for key in ("size", "reduction"):
            value = getattr(self, key)
            is_valid = value is None or (type(value) is int and value >= 1)
            require(is_valid, key, value, "a whole number of at least 1", name)
        require(self.size is None or self.reduction is None, "reduction", self.reduction, "null with size", name)

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Add adapters to the chosen blocks and freeze the published parameters; see :class:`Surgery`."""
        width, reduction = model.config.n_embd, self.reduction or _DEFAULT_REDUCTION
        require(self.size is not None or reduction <= width, "reduction", reduction, f"at most n_embd = {width}")
        size = self.size or width // reduction
        blocks: dict[int, Any] = {i: model.h[i] for i in chosen_blocks(self.layers, len(model.h), "BottleneckAdapter")}
        for i, block in blocks.items():
            self._check_plain(f"h.{i}.mlp", block.mlp, MLP)
            if self.placement == "houlsby":
                self._check_plain(f"h.{i}.attn", block.attn, CausalSelfAttention)
        with model.ln_f.weight.device:
            for block in blocks.values():
                block.mlp = AdaptedMLP(block.mlp, Bottleneck(width, size, self.activation)).train(block.training)
                if self.placement == "houlsby":
                    adapter = Bottleneck(width, size, self.activation)
                    block.attn = AdaptedAttention(block.attn, adapter).train(block.training)
        freeze_base(model)
        return model

    @staticmethod
    def _check_plain(path: str, module: nn.Module, kind: type) -> None:
        """Check that no surgery has replaced a module, except its layers."""
        if isinstance(module, AdaptedMLP | AdaptedAttention):
            raise InputError(f"BottleneckAdapter: {path} has an adapter of BottleneckAdapter already; use only one")
        if type(module) is not kind:
            cause = f"must be a plain {kind.__name__}, got a {class_path(type(module))}"
            raise InputError(f"BottleneckAdapter: {path} {cause}")
