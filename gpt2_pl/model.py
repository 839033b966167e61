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

from gpt2_pl.kernels.attention import scaled_dot_product_attention
from gpt2_pl.kernels.dropout import dropout, dropout_add
from gpt2_pl.kernels.gelu import gelu
from gpt2_pl.kernels.prepacked_linear import Linear, MergeableLayer
from gpt2_pl.kv_cache import KVCache, KVCacheLayer, PrefixCache, PrefixLayer

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


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Take the positions (B, R) from every row of ``x`` (B, T, C): (B, R, C)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.size(-1)))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens before it (Vaswani et al. 2017, eq. 1)."""

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
        output_positions: Tensor | None = None,
        cache: KVCacheLayer | PrefixLayer | None = None,
    ) -> Tensor:
        """Compute the attention of the tokens, or of some of them.

        Args:
            x: (B, T, C).
            mask: boolean (B or 1, 1, T or R, N), True where attention is allowed. If None, attention is causal; this
                requires either T == N or a single query at the last position.
            output_positions: (B, R), the tokens whose output is needed; None for all.
            cache: keys and values in front of those of ``x``.

        Returns:
            (B, T, C), or (B, R, C) with ``output_positions``.
        """
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # (B, T, C) each
        if output_positions is not None:
            q = gather_positions(q, output_positions)  # (B, R, C)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T, hd)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, N, hd)
        is_causal = True if mask is None and q.size(2) > 1 else False  # noqa: SIM210 (a bool under torch.compile)
        dropout_p = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)  # (B, H, T, hd)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GPT-2's tanh form of the GELU between them."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention and MLP, each normalized first and added to the residual stream."""

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
        output_positions: Tensor | None = None,
        cache: KVCacheLayer | PrefixLayer | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, R, C) with ``output_positions``; see :meth:`CausalSelfAttention.forward`."""
        residual = x if output_positions is None else gather_positions(x, output_positions)
        x = dropout_add(self.attn(self.ln_1(x), mask, output_positions, cache), residual, self.dropout, self.training)
        return dropout_add(self.mlp(self.ln_2(x)), x, self.dropout, self.training)


def attention_mask_4d(queries: Tensor, keys: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Return the boolean attention mask, True where attention is allowed.

    Args:
        queries: (B or 1, Q), the positions of the queries among the keys.
        keys: (N,), 0 to N - 1.
        padding_mask: (B, N), True for text. A query always attends to itself, for a softmax over nothing is NaN.

    Returns:
        (B or 1, 1, Q, N).
    """
    mask = keys <= queries.unsqueeze(-1)
    if padding_mask is not None:
        mask = (mask & padding_mask.unsqueeze(1)) | (keys == queries.unsqueeze(-1))
    return mask.unsqueeze(1)


def _block_mask(keys: Tensor, start: int, padding_mask: Tensor | None) -> Tensor | None:
    """Return the attention mask of the queries from ``start`` on; None where causal attention needs none."""
    queries = keys[start:]
    if padding_mask is None and len(queries) in (1, len(keys)):
        return None
    return attention_mask_4d(queries.unsqueeze(0), keys, padding_mask)


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
        position_ids: Tensor | None = None,
        output_positions: Tensor | None = None,
        cache: KVCache | PrefixCache | None = None,
    ) -> Tensor:
        """Compute the hidden states after the last layer norm.

        Args:
            input_ids: (B, T) integers in [0, V).
            attention_mask: (B, T), 1 for text and 0 for padding, on either side. Positions count text only and
                padding is never attended to, so that the hidden states of a row's text do not depend on its padding.
                Batches padded on the right can leave it out: the text of a causal model never sees what follows it.
                Or a ready boolean mask (B, 1, T, N) over all keys, True where attention is allowed, together with
                ``position_ids``.
            position_ids: (B, T), the positions of the tokens; by default they follow from ``attention_mask``.
            output_positions: (B, R), the tokens whose hidden state is needed. The last block computes nothing else.
            cache: keys and values of the tokens read before; ``input_ids`` are then the tokens that follow, and
                ``attention_mask`` covers all of them, (B, read before + T).

        Returns:
            (B, T, C), or (B, R, C) with ``output_positions``: one state for every token of the text, none for a prefix
            or a soft prompt. Outputs at padding positions are undefined.

        Raises:
            ValueError: more tokens than ``n_positions``, virtual ones and those read before included.
        """
        x = self.wte(input_ids)  # (B, T, C)
        if cache is None or cache.length == 0:
            x, cache = self._prepend_virtual_tokens(x, cache)
        start = 0 if cache is None else cache.length  # tokens read before, virtual ones included
        N = start + x.size(1)
        self._check_length(N)
        keys = torch.arange(N, device=x.device)  # (N,)
        mask, padding_mask = attention_mask, None
        if attention_mask is None or attention_mask.dim() != 4:
            padding_mask = self._padding_mask(attention_mask)
            mask = _block_mask(keys, start, padding_mask)
        if position_ids is None:
            counted = keys if padding_mask is None else (padding_mask.cumsum(-1) - 1).clamp(min=0)
            position_ids = counted[..., start:]
        n_prompt = x.size(1) - input_ids.size(1)
        x = dropout(x + self.wpe(position_ids), self.dropout, self.training)
        for i in range(len(self.h) - 1):
            x = self._block(i, x, mask, None, cache)
        if output_positions is None:
            return self.ln_f(self._block(-1, x, mask, None, cache)[:, n_prompt:])
        output_positions = output_positions + n_prompt
        mask = attention_mask_4d(output_positions + start, keys, padding_mask)
        return self.ln_f(self._block(-1, x, mask, output_positions, cache))

    def _check_length(self, N: int) -> None:
        """Refuse more tokens than the context has room for."""
        if self.config.n_positions < N:
            virtual = f", {self.n_virtual} of them virtual" if self.n_virtual else ""
            raise ValueError(
                f"the input has {N} tokens{virtual}; this GPT-2 has n_positions = {self.config.n_positions}"
            )

    def _padding_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """Return ``attention_mask`` as booleans (B, N), with the virtual tokens, which every row has; None for None."""
        if attention_mask is None:
            return None
        return F.pad(attention_mask.bool(), (self.n_virtual, 0), value=True)

    def _prepend_virtual_tokens(
        self, x: Tensor, cache: KVCache | PrefixCache | None
    ) -> tuple[Tensor, KVCache | PrefixCache | None]:
        """Put the soft prompt in front of the embeddings ``x`` (B, T, C) and the prefix in front of the cache."""
        if self.prompt is not None:
            x = torch.cat((self.prompt().to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        if self.prefix is not None:
            prefix = self.prefix()  # (L, 2, H, P, hd)
            if isinstance(cache, KVCache):
                cache.begin_with(prefix)
            else:
                cache = PrefixCache(prefix)
        return x, cache

    def _block(
        self,
        i: int,
        x: Tensor,
        mask: Tensor | None,
        output_positions: Tensor | None,
        cache: KVCache | PrefixCache | None,
    ) -> Tensor:
        inputs = (x, mask, output_positions, None if cache is None else cache.layers[i])
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.h[i], *inputs, use_reentrant=False)
        return self.h[i](*inputs)

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
        return self.wte.merged()[0] if isinstance(self.wte, MergeableLayer) else self.wte.weight

    @classmethod
    def from_pretrained(cls, path_or_id: str | PathLike[str], dropout: float | None = None) -> GPT2:
        """Load a Hugging Face folder or hub id; see :func:`gpt2_pl.pretrained.load`."""
        from gpt2_pl import pretrained

        return pretrained.load(path_or_id, dropout=dropout)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write a folder that ``transformers`` loads; see :func:`gpt2_pl.pretrained.save`."""
        from gpt2_pl import pretrained

        pretrained.save(self, folder)
