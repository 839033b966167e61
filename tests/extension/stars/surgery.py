"""A strategy that trains the last blocks, and an adapter that scales outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gpt2_pl.surgery import Surgery


@dataclass
class TopBlocks(Surgery):
    """Train the last blocks alone."""

    n: int = 1

    def apply(self, model, tokenizer=None):
        for block in model.h[-self.n :]:
            block.requires_grad_(True)
        return model


class ScaledOutput(nn.Module):
    """A linear layer whose outputs are multiplied by a vector that starts at 1."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = nn.Parameter(torch.ones_like(linear.bias))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * self.scale

    def merged(self):
        return self.weight * self.scale.unsqueeze(1), self.bias * self.scale


@dataclass
class SSF(Surgery):
    """Scale the first layer of every feed-forward network (after Lian et al. 2022)."""

    def apply(self, model, tokenizer=None):
        for block in model.h:
            block.mlp.c_fc = ScaledOutput(block.mlp.c_fc)
        return model
