"""GPT-2 (Radford et al. 2019), from token ids to hidden states.

Shape letters, used everywhere in this library:
    B batch, T tokens, C width (n_embd), H heads, hd = C / H, L blocks, V vocabulary, R positions read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2_pl.attention import attention
from gpt2_pl.dropout import add_dropout, dropout
from gpt2_pl.gelu import gelu
from gpt2_pl.packing import Linear

if TYPE_CHECKING:
    from os import PathLike

    from gpt2_pl.generation import KeyValueCache, LayerCache


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
        self.c_attn = Linear(n_embd, 3 * n_embd)  # q, k and v, in this order
        self.c_proj = Linear(n_embd, n_embd)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        at: Tensor | None = None,
        prefix: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, R, C) when only the positions ``at`` (B, R) ask.

        ``prefix`` (2, H, P, hd) holds keys and values that stand in front of the tokens' own; ``cache`` those of the
        tokens read before. Of all N keys, ``mask`` (B or 1, 1, T or R, N) is True where a query may look; without it
        attention is causal, and there are no keys but the tokens' own, or one query, which is the last.
        """
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        if at is not None:
            q = read_at(q, at)  # (B, R, C)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, hd)
        if prefix is not None:
            k, v = (
                torch.cat((front.to(t.dtype).expand(len(t), -1, -1, -1), t), dim=2)
                for front, t in zip(prefix, (k, v), strict=True)
            )  # (B, H, P + T, hd)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(q, k, v, mask, self.dropout, self.training)  # (B, H, T, hd)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GPT-2's tanh form of the GELU between them."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = gelu(self.c_fc(x), self.training)  # (B, T, 4C)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention and MLP, each normalised first and added to the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config.n_embd, config.n_head, config.dropout)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config.n_embd)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        at: Tensor | None = None,
        prefix: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, R, C) when only the positions ``at`` (B, R) are wanted."""
        attended = self.attn(self.ln_1(x), mask, at, prefix, cache)
        x = add_dropout(x if at is None else read_at(x, at), attended, self.dropout, self.training)
        return add_dropout(x, self.mlp(self.ln_2(x)), self.dropout, self.training)


class GPT2(nn.Module):
    """GPT-2 without a task: token ids in, hidden states out; ``logits`` turns those into next-token scores.

    The parameters carry the published names (wte, wpe, h.0.attn.c_attn, ..., ln_f); the language-model head is the
    token embedding itself. A new model starts from the published initialisation: N(0, 0.02), the projections that
    end a residual branch divided by sqrt(2 L).

    Attributes:
        activation_checkpointing: recompute every block in the backward pass instead of keeping its activations.
        dropout: probability for the embeddings; see :meth:`set_dropout`.
        prompt: gives P embeddings (P, C) that stand in front of every row's token embeddings (a soft prompt).
        prefix: gives keys and values (L, 2, H, P, hd) that stand in front of every row's own in each block.
        base_names: the published parameters' names; whatever else there is, surgery added.
        source: the folder that the weights were loaded from.
    """

    prompt: nn.Module | None
    prefix: nn.Module | None

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.prompt = self.prefix = None
        self.base_names = frozenset(name for name, _ in self.named_parameters())
        self.source: str | None = None
        self._init_weights()

    @property
    def n_virtual(self) -> int:
        """How many positions the prefix and the soft prompt take in front of every row's text."""
        added: list[Any] = [self.prefix, self.prompt]
        return sum(module.length for module in added if module is not None)

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        at: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the last layer norm.

        Args:
            input_ids: (B, T) integers in [0, V).
            attention_mask: (B, T), 1 for text and 0 for padding, on either side. Positions count text only and
                padding is never attended to, so that a row's text gives what it gives alone. Batches padded on the
                right can leave it out: a causal model's text never sees what follows it.
            at: (B, R) the positions whose hidden state is wanted. The last block is computed there only.
            cache: what the blocks keep of the tokens read before; ``input_ids`` are then those that follow, and
                ``attention_mask`` covers all of them, (B, read before + T).

        Returns:
            (B, T, C), or (B, R, C) with ``at``: one state for every token of the text, none for a prefix or a soft
            prompt. What stands at padding has no meaning.

        Raises:
            ValueError: more tokens than ``n_positions``, virtual ones and those read before included.
        """
        x = self.wte(input_ids)  # (B, T, C)
        first = cache is None or cache.length == 0
        if self.prompt is not None and first:
            x = torch.cat((self.prompt().to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        prefix = self.prefix() if self.prefix is not None and first else None  # (L, 2, H, P, hd)
        new = x.size(1)
        before = cache.length if cache is not None and not first else self.n_virtual - (new - input_ids.size(1))
        N = before + new  # keys: virtual tokens, then text
        if self.config.n_positions < N:
            virtual = f", {self.n_virtual} of them virtual" if self.n_virtual else ""
            raise ValueError(
                f"the input has {N} tokens{virtual}; this GPT-2 has n_positions = {self.config.n_positions}"
            )
        keys = torch.arange(N, device=x.device)
        text = None if attention_mask is None else F.pad(attention_mask.bool(), (self.n_virtual, 0), value=True)
        position_ids = keys if text is None else (text.cumsum(-1) - 1).clamp(min=0)
        x = dropout(x + self.wpe(position_ids[..., before:]), self.dropout, self.training)
        mask = None if text is None and new in (1, N) else self._mask(keys[before:].unsqueeze(0), keys, text)
        *blocks, last = range(len(self.h))
        for i in blocks:
            x = self._run(i, x, mask, None, prefix, cache)
        skipped = new - input_ids.size(1)  # the soft prompt's places
        if at is not None:
            mask = self._mask(at + before + skipped, keys, text)
            return self.ln_f(self._run(last, x, mask, at + skipped, prefix, cache))
        return self.ln_f(self._run(last, x, mask, None, prefix, cache)[:, skipped:])

    def set_dropout(self, p: float) -> None:
        """Set the dropout probability of the embeddings, the attention weights and both residual branches.

        ``config.dropout``, and the dropout of adapters, stay as they are.
        """
        self.dropout = p
        for module in self.modules():
            if isinstance(module, Block | CausalSelfAttention):
                module.dropout = p

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token scores (..., V) of hidden states (..., C), through the tied token embedding."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The token embedding (V, C) as the language-model head: with its adapter, where it has one."""
        wte: Any = self.wte
        return wte.merged_weight() if hasattr(wte, "merged_weight") else wte.weight

    def _run(
        self,
        i: int,
        x: Tensor,
        mask: Tensor | None,
        at: Tensor | None,
        prefix: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        inputs = (x, mask, at, None if prefix is None else prefix[i], None if cache is None else cache.layers[i])
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.h[i], *inputs, use_reentrant=False)
        return self.h[i](*inputs)

    @staticmethod
    def _mask(queries: Tensor, keys: Tensor, text: Tensor | None) -> Tensor:
        """Who may look at whom: queries (B or 1, Q), keys (N,), text (B, N) -> (B or 1, 1, Q, N)."""
        mask = keys <= queries.unsqueeze(-1)
        if text is not None:
            itself = keys == queries.unsqueeze(-1)  # a softmax over nothing would be NaN
            mask = (mask & text.unsqueeze(1)) | itself
        return mask.unsqueeze(1)

    @classmethod
    def from_pretrained(cls, path_or_id: str | PathLike[str], dropout: float | None = None) -> GPT2:
        """Load a Hugging Face folder or hub id; see :func:`gpt2_pl.pretrained.load`."""
        from gpt2_pl import pretrained

        return pretrained.load(path_or_id, dropout=dropout)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write a folder that ``transformers`` loads; see :func:`gpt2_pl.pretrained.save`."""
        from gpt2_pl import pretrained

        pretrained.save(self, folder)
