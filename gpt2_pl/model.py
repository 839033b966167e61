"""GPT-2 (Radford et al. 2019), from token ids to hidden states.

Shape letters, used everywhere in this library:
    B batch, T tokens, C width (n_embd), H heads, hd = C / H, L blocks, V vocabulary, R positions read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. The defaults are those of the smallest published one ("gpt2", 124 M parameters).

    Args:
        vocab_size: number of token ids, V.
        n_positions: the longest sequence, in tokens.
        n_embd: width C of the residual stream; a multiple of ``n_head``.
        n_layer: number of blocks, L.
        n_head: number of attention heads, H.
        dropout: probability for the embeddings, the attention weights and both residual branches.

    Raises:
        ValueError: a size below 1, a width the heads do not divide, or a dropout outside [0, 1).
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, which n_head = {self.n_head} does not divide")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


def read_at(x: Tensor, at: Tensor) -> Tensor:
    """Take from every row of ``x`` (B, T, C) the positions ``at`` (B, R): (B, R, C)."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.size(-1)))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # q, k and v, in this order
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, R, C) when only the positions ``at`` (B, R) ask.

        ``mask`` (B, 1, T or R, T) is True where a query may look; without it attention is causal.
        """
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        if at is not None:
            q = read_at(q, at)  # (B, R, C)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, hd)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class MLP(nn.Module):
    """Two layers with GPT-2's tanh form of the GELU between them."""

    def __init__(self, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each normalised first and added to the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config.n_embd, config.n_head, config.dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config.n_embd, config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, R, C) when only the positions ``at`` (B, R) are wanted."""
        attended = self.attn(self.ln_1(x), mask, at)
        x = (x if at is None else read_at(x, at)) + attended
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 without a task: token ids in, hidden states out; ``logits`` turns those into next-token scores.

    The parameters carry the published names (wte, wpe, h.0.attn.c_attn, ..., ln_f); the language-model head is the
    token embedding itself. A new model starts from the published initialisation: N(0, 0.02), the projections that
    end a residual branch divided by sqrt(2 L).

    Attributes:
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Hidden states after the last layer norm.

        Args:
            input_ids: (B, T) integers in [0, V).
            attention_mask: (B, T), 1 for text and 0 for padding, on either side. Positions count text only and
                padding is never attended to, so that a row's text gives what it gives alone. Batches padded on the
                right can leave it out: a causal model's text never sees what follows it.
            at: (B, R) the positions whose hidden state is wanted. The last block is computed there only.

        Returns:
            (B, T, C), or (B, R, C) with ``at``. What stands at padding has no meaning.

        Raises:
            ValueError: more tokens than ``n_positions``.
        """
        T = input_ids.size(1)
        if self.config.n_positions < T:
            raise ValueError(f"the input has {T} tokens; this GPT-2 has n_positions = {self.config.n_positions}")
        position_ids, mask = self._positions_and_mask(input_ids, attention_mask)
        x = self.wte(input_ids) + self.wpe(position_ids)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        *blocks, last = self.h
        for block in blocks:
            x = self._run(block, x, mask)
        if at is not None:
            mask = self._mask_at(T, mask, at)
        return self.ln_f(self._run(last, x, mask, at))

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token scores (..., V) of hidden states (..., C), through the tied token embedding."""
        return F.linear(hidden, self.wte.weight)

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @staticmethod
    def _positions_and_mask(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Position ids (T,) or (B, T), and who may look at whom, (B, 1, T, T), or None for plain causal attention."""
        T, device = input_ids.size(1), input_ids.device
        if attention_mask is None:
            return torch.arange(T, device=device), None
        text = attention_mask.bool()
        position_ids = (text.cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        itself = torch.eye(T, dtype=torch.bool, device=device)  # a softmax over nothing would be NaN
        return position_ids, (causal & text[:, None, None, :]) | itself

    @staticmethod
    def _mask_at(T: int, mask: Tensor | None, at: Tensor) -> Tensor:
        """The rows ``at`` (B, R) of the attention mask: (B, 1, R, T)."""
        if mask is None:
            return (torch.arange(T, device=at.device) <= at.unsqueeze(-1)).unsqueeze(1)
        return mask.gather(2, at[:, None, :, None].expand(-1, 1, -1, T))

    @classmethod
    def from_pretrained(cls, path_or_id: str | PathLike[str], dropout: float | None = None) -> GPT2:
        """Load a Hugging Face folder or hub id; see :func:`gpt2_pl.pretrained.load`."""
        from gpt2_pl import pretrained

        return pretrained.load(path_or_id, dropout=dropout)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write a folder that ``transformers`` loads; see :func:`gpt2_pl.pretrained.save`."""
        from gpt2_pl import pretrained

        pretrained.save(self, folder)
