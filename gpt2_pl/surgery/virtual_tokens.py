"""Virtual tokens in front of the text: prefix-tuning and prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gpt2_pl.errors import InputError, require
from gpt2_pl.kv_cache import KVCache
from gpt2_pl.surgery.base import Surgery, check_length, freeze_base, token_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2_pl.model import GPT2, GPT2Config


class Prefix(nn.Module):
    """Trainable keys and values of P virtual tokens in every block.

    Args:
        config: the architecture of the GPT-2.
        length: P.
        hidden: width of the reparameterization network that computes the keys and values: Embedding (P, C), Linear,
            tanh, Linear (Li & Liang 2021, section 4.3); None to train them directly as a table.
    """

    def __init__(self, config: GPT2Config, length: int, hidden: int | None = None) -> None:
        super().__init__()
        self.length, self.n_layer, self.n_head = length, config.n_layer, config.n_head
        width = 2 * config.n_layer * config.n_embd
        if hidden is None:
            self.table = nn.Parameter(torch.empty(length, width))
            nn.init.normal_(self.table, std=0.02)
        else:
            self.embedding = nn.Parameter(torch.empty(length, config.n_embd))
            nn.init.normal_(self.embedding)
            self.network = nn.Sequential(nn.Linear(config.n_embd, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def prompt_embeddings(self) -> Tensor:
        """Return the table (P, 2 L C): for every token, key and value of block 0, key and value of block 1, ..."""
        return self.table if hasattr(self, "table") else self.network(self.embedding)

    def forward(self) -> Tensor:
        """Return the keys and values (L, 2, H, P, hd)."""
        table = self.prompt_embeddings().view(self.length, self.n_layer, 2, self.n_head, -1)
        return table.permute(1, 2, 3, 0, 4)


class Prompt(nn.Module):
    """Trainable embeddings of P virtual tokens.

    Args:
        embedding: the initial embeddings (P, C).
    """

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)

    @property
    def length(self) -> int:
        """Number P of virtual tokens."""
        return len(self.embedding)

    def forward(self) -> Tensor:
        """Return the embeddings (P, C)."""
        return self.embedding


@dataclass
class PrefixTuning(Surgery):
    """Trainable keys and values in front of those of the text in every block (prefix-tuning or P-tuning v2).

    The text starts at position P. A table is initialized with the keys and values of real tokens: those of
    ``init_text``, or of tokens drawn from the vocabulary. Random vectors perform worse (Li & Liang 2021, section 7.4).

    Args:
        length: number P of virtual tokens, at least 1.
        hidden: width of the reparameterization network (prefix-tuning, Li & Liang 2021), at least 1; None trains keys
            and values directly (P-tuning v2, Liu et al. 2022).
        init_text: a text, cut or repeated to ``length`` tokens, whose keys and values initialize the table. It requires
            ``hidden`` = None.

    Raises:
        InputError: a value is out of range; in ``apply``, the virtual tokens exceed the context, or the model has a
            prefix already.
    """

    freezes_base = True

    length: int = 10
    hidden: int | None = None
    init_text: str | None = None

    def __post_init__(self) -> None:
        require(self.hidden is None or self.hidden >= 1, "hidden", self.hidden, "at least 1", "PrefixTuning")
        has_table = self.hidden is None
        require(has_table or self.init_text is None, "init_text", self.init_text, "null with hidden", "PrefixTuning")

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Prepend a prefix to every row and freeze the published parameters; see :class:`Surgery`."""
        if model.prefix is not None:
            raise InputError("PrefixTuning: the model has a prefix already; there must not be two PrefixTuning")
        check_length("PrefixTuning", self.length, model)
        device = model.wte.weight.device
        prefix = Prefix(model.config, self.length, self.hidden).to(device).train(model.training)
        if self.hidden is None:
            ids = token_ids(self.init_text, self.length, model, tokenizer)
            with torch.no_grad():
                prefix.table.copy_(_keys_and_values(model, ids.to(device)))
        model.prefix = prefix
        freeze_base(model)
        return model


def _keys_and_values(model: GPT2, ids: Tensor) -> Tensor:
    """Return the keys and values of the tokens (P,) in every block, as a prefix table (P, 2 L C)."""
    prompt, model.prompt = model.prompt, None
    training = model.training
    cache = KVCache(model.config.n_layer, len(ids))
    model.eval()(ids.unsqueeze(0), cache=cache)
    model.train(training).prompt = prompt
    layers = [torch.stack(layer.keys_and_values()) for layer in cache.layers]  # (2, 1, H, P, hd) each
    return torch.stack(layers)[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1)


@dataclass
class PromptTuning(Surgery):
    """Soft prompt (Lester et al. 2021): trainable embeddings in front of those of the text, at positions 0 to P - 1.

    The embeddings are initialized with those of ``init_text``, or of tokens drawn from the vocabulary. If ``length`` is
    the number of tokens of ``init_text``, the soft prompt is at first equal to that text as a hard prompt.

    Args:
        length: number P of virtual tokens, at least 1.
        init_text: a text, cut or repeated to ``length`` tokens.

    Raises:
        InputError: in ``apply``, ``length`` is below 1, the virtual tokens exceed the context, or the model has a soft
            prompt already.
    """

    freezes_base = True

    length: int = 20
    init_text: str | None = None

    def apply(self, model: GPT2, tokenizer: Tokenizer | None = None) -> GPT2:
        """Prepend a soft prompt to every row and freeze the published parameters; see :class:`Surgery`."""
        if model.prompt is not None:
            raise InputError("PromptTuning: the model has a soft prompt already; there must not be two PromptTuning")
        check_length("PromptTuning", self.length, model)
        ids = token_ids(self.init_text, self.length, model, tokenizer)
        weight = model.wte.weight.detach()
        model.prompt = Prompt(weight[ids.to(weight.device)].clone()).train(model.training)
        freeze_base(model)
        return model
