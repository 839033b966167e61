"""(IA)3: trained vectors that scale keys, values and the inner activations of the MLP (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt2_pl.errors import require
from gpt2_pl.surgery.base import Surgery, freeze_base
from gpt2_pl.surgery.targets import AdaptedLinear, Layers, chosen_blocks, plain_layer, target_layers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2

_TARGETS = ("q", "k", "v", "c_attn", "mlp.c_proj")


class IA3Linear(AdaptedLinear):
    """Linear layer whose inputs or outputs are multiplied by a trained vector l, which starts at 1.

    y = W (l * x) + b with l (in,), or y = l * (W x + b) with l (out',), where out' is the size of the scaled slices.

    Args:
        linear: the layer to adapt; its parameters are reused.
        scales_input: whether l scales the inputs instead of the outputs.
        qkv_slices: the slices of the output (0: q, 1: k, 2: v) that are scaled; None for the whole output.
    """

    surgery = "IA3"

    def __init__(self, linear: nn.Linear, scales_input: bool = False, qkv_slices: list[int] | None = None) -> None:
        super().__init__(linear)
        self.scales_input, self.qkv_slices = scales_input, qkv_slices
        size = self.in_features if scales_input else self.out_features
        if qkv_slices is not None:
            size = len(qkv_slices) * self.out_features // 3
        self.ia3_l = nn.Parameter(self.weight.new_ones(size))

    def scale(self) -> Tensor:
        """Return the factors of all inputs (in,) or outputs (out,); those of other slices are 1."""
        if self.qkv_slices is None:
            return self.ia3_l
        factors = list(self.ia3_l.new_ones(self.out_features).chunk(3))
        for index, slice_ in zip(self.qkv_slices, self.ia3_l.chunk(len(self.qkv_slices)), strict=True):
            factors[index] = slice_
        return torch.cat(factors)

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias (out,) of the equivalent plain layer."""
        if self.scales_input:
            return self.weight * self.ia3_l, self.bias
        scale = self.scale()
        return self.weight * scale.unsqueeze(1), self.bias * scale

    def forward(self, input: Tensor) -> Tensor:
        """Compute the scaled layer: (..., in) -> (..., out)."""
        if self.scales_input:
            # In bfloat16, l itself would be rounded to multiples of 2^-8 around 1.
            return self.affine((input * self.ia3_l).to(input.dtype), self.bias)
        output = self.affine(input, self.bias)
        return (output * self.scale()).to(output.dtype)


@dataclass
class IA3(Surgery):
    """Trained vectors that scale keys, values and the inner activations of the MLP (Liu et al. 2022, section 3.3).

    Args:
        targets: what is scaled: the outputs ``q``, ``k``, ``v`` or all of them, ``c_attn``, and the inputs of
            ``mlp.c_proj``, which are the inner activations. The default is that of the paper; the default of peft is
            ``[c_attn, mlp.c_proj]``.
        layers: the blocks to adapt, as numbers from 0 or as ranges such as ``"0-2,9-11"``; by default all.

    Raises:
        InputError: a target is unknown; in ``apply``, a block does not exist, or a layer has an adapter already.
    """

    freezes_base = True

    targets: list[str] = field(default_factory=lambda: ["k", "v", "mlp.c_proj"])
    layers: Layers = None

    def __post_init__(self) -> None:
        are_targets = isinstance(self.targets, list) and all(target in _TARGETS for target in self.targets)
        require(are_targets and bool(self.targets), "targets", self.targets, f"a list of {', '.join(_TARGETS)}", "IA3")
        target_layers(self.targets, "IA3")

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Add scaling vectors to the target layers and freeze the published parameters; see :class:`Surgery`."""
        blocks, layers = chosen_blocks(self.layers, len(model.h), "IA3"), target_layers(self.targets, "IA3")
        paths = {f"h.{i}.{name}": qkv_slices for i in blocks for name, qkv_slices in layers.items()}
        plain: dict[str, Any] = {path: plain_layer(model, path, "IA3") for path in paths}
        for path, linear in plain.items():
            adapted = IA3Linear(linear, path.endswith("mlp.c_proj"), paths[path])
            model.set_submodule(path, adapted.train(linear.training))
        freeze_base(model)
        return model
