"""Adapters as users write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gpt2_pl.surgery import Surgery


class Bottleneck(nn.Module):
    """A layer behind another (Houlsby et al. 2019), with a fixed random projection that is not trained."""

    def __init__(self, inner: nn.Module, width: int, size: int):
        super().__init__()
        self.inner, self.up = inner, nn.Linear(size, width)
        self.down = nn.Parameter(torch.randn(size, width), requires_grad=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        y = self.inner(x)
        return y + self.up(torch.relu(y @ self.down.T))


class Houlsby(Surgery):
    """Bottleneck adapters; not a dataclass."""

    def __init__(self, size: int = 4):
        self.size = size

    def apply(self, model, tokenizer=None):
        for block in model.h:
            block.mlp = Bottleneck(block.mlp, model.config.n_embd, self.size)
        return model


@dataclass
class OutputScale(Surgery):
    """A tensor of the GPT-2 itself, read by a hook."""

    def apply(self, model, tokenizer=None):
        model.scale = nn.Parameter(model.ln_f.weight.new_ones(model.config.n_embd))
        model.ln_f.register_forward_hook(lambda module, args, output: output * model.scale)
        return model


@dataclass
class Unfreeze(Surgery):
    def apply(self, model, tokenizer=None):
        return model.requires_grad_(True)
