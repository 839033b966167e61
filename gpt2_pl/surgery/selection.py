"""Surgery that trains a part of the base and adds no parameters: BitFit and LayerNorm tuning."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2_pl.surgery.base import Surgery, freeze_base

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2


def select(model: GPT2, is_selected: Callable[[str], bool]) -> None:
    """Train the selected parameters of the base, in addition to those that an earlier selection trains.

    As long as all parameters of the base train, nothing was selected, and the others are frozen. Parameters that
    surgery added do not change.

    Args:
        model: the GPT-2.
        is_selected: returns whether the published parameter of a name is selected.
    """
    published = {name: parameter for name, parameter in model.named_parameters() if name in model.base_names}
    if all(parameter.requires_grad for parameter in published.values()):
        freeze_base(model)
    for name, parameter in published.items():
        if is_selected(name):
            parameter.requires_grad_(True)


class Selection(Surgery):
    """Surgery that selects parameters of the base by their names; several selections train the union of them."""

    selects_base = True

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Train the selected parameters of the base; see :class:`Surgery`."""
        select(model, self.selects)
        return model

    @abstractmethod
    def selects(self, name: str) -> bool:
        """Return whether the published parameter ``name``, such as ``h.0.ln_1.bias``, trains."""


@dataclass
class BitFit(Selection):
    """Train all biases of the base (Ben Zaken et al. 2022)."""

    def selects(self, name: str) -> bool:
        """Return whether ``name`` is a bias."""
        return name.endswith(".bias")


@dataclass
class LayerNormTuning(Selection):
    """Train the weight and the bias of every layer norm (Zhao et al. 2024), as ``LNTuningConfig`` of peft does."""

    def selects(self, name: str) -> bool:
        """Return whether ``name`` belongs to a layer norm."""
        return name.rpartition(".")[0].endswith(("ln_1", "ln_2", "ln_f"))
