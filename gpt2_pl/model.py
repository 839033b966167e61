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

from gpt2_pl.errors import require
from gpt2_pl.kernels.attention import scaled_dot_product_attention
from gpt2_pl.kernels.dropout import dropout, dropout_add
from gpt2_pl.kernels.gelu import gelu
from gpt2_pl.kernels.prepacked_linear import Linear, MergeableLayer
from gpt2_pl.kv_cache import KVCache, KVCacheLayer

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True)
class GPT2Config:
    """Architecture of a GPT-2. The defaults are those of the smallest published model ("gpt2", 124 M parameters).

    Args:
        vocab_size: number of token ids, V.
        n_positions: maximum sequence length, in tokens.
        n_embd: width C of the residual stream; a multiple of ``n_head``.
        n_layer: number of blocks, L.
        n_head: number of attention heads, H.
        dropout: dropout probability of the embeddings, the attention weights and both residual branches.

    Raises:
        InputError: a size is below 1, ``n_embd`` is not a multiple of ``n_head``, or ``dropout`` is outside [0, 1).
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}")
        require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Select positions of every row.

    Args:
        x: (B, T, C).
        positions: (B, R) indices in [0, T).

    Returns:
        (B, R, C).
    """
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.size(-1)))


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention, softmax(q k^T / sqrt(hd)) v for each head (Vaswani et al. 2017, eq. 1).

    Args:
        n_embd: width C.
        n_head: number of heads H.
        dropout: dropout probability of the attention weights.
    """

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
        cache: KVCacheLayer | None = None,
    ) -> Tensor:
        """Compute the attention output of all tokens or of selected ones.

        Args:
            x: (B, T, C).
            mask: boolean (B or 1, 1, T or R, N), True where attention is allowed. If None, attention is causal; this
                requires either T == N or a single query at the last position.
            output_positions: (B, R), indices of the tokens whose output is computed; None for all.
            cache: keys and values of earlier tokens, to which those of ``x`` are appended.

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
    """Two linear layers with GPT-2's GELU, the tanh approximation, between them.

    Args:
        n_embd: width C; the inner width is 4 C.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the MLP: (B, T, C) -> (B, T, C)."""
        x = gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.c_proj(x)


class Block(nn.Module):
    """Pre-norm transformer block: ``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``, with dropout on both branches."""

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
        cache: KVCacheLayer | None = None,
    ) -> Tensor:
        """Compute the block: (B, T, C) -> (B, T, C), or (B, R, C) with ``output_positions``.

        Arguments are those of :meth:`CausalSelfAttention.forward`.
        """
        residual = x if output_positions is None else gather_positions(x, output_positions)
        x = dropout_add(self.attn(self.ln_1(x), mask, output_positions, cache), residual, self.dropout, self.training)
        return dropout_add(self.mlp(self.ln_2(x)), x, self.dropout, self.training)


def attention_mask_4d(queries: Tensor, keys: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Return the boolean attention mask, True where attention is allowed.

    Args:
        queries: (B or 1, Q), the positions of the queries among the keys.
        keys: (N,), 0 to N - 1.
        padding_mask: (B, N), True for text. A query always attends to itself, because an empty softmax is NaN.

    Returns:
        (B or 1, 1, Q, N).
    """
    mask = keys <= queries.unsqueeze(-1)
    if padding_mask is not None:
        mask = (mask & padding_mask.unsqueeze(1)) | (keys == queries.unsqueeze(-1))
    return mask.unsqueeze(1)


class GPT2(nn.Module):
    """GPT-2 backbone: token ids to hidden states; :meth:`logits` computes next-token logits from hidden states.

    The parameters have the published names (wte, wpe, h.0.attn.c_attn, ..., ln_f). The language-model head is tied to
    the token embedding. Weights are initialized as published: N(0, 0.02^2), with the standard deviation of the
    projections that end a residual branch divided by sqrt(2 L), and biases 0.

    Args:
        config: the architecture.

    Attributes:
        activation_checkpointing: whether blocks are recomputed in the backward pass instead of storing activations.
        dropout: dropout probability of the embeddings; see :meth:`set_dropout`.
        prompt: soft prompt, a module that returns P embeddings (P, C), prepended to the token embeddings of every row;
            None without one.
        prefix: module that returns keys and values (L, 2, H, P, hd), prepended to those of every row in each block;
            None without one.
        base_names: names of the published parameters. All other parameters were added by surgery.
        source: folder that the weights were loaded from, or None.
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
        """Number of virtual tokens (prefix and soft prompt) in front of the text of every row."""
        modules: list[Any] = [self.prefix, self.prompt]
        return sum(module.length for module in modules if module is not None)

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
        cache: KVCache | None = None,
    ) -> Tensor:
        """Compute the hidden states after the last layer norm.

        Args:
            input_ids: (B, T) integers in [0, V).
            attention_mask: (B, T), 1 for text and 0 for padding, on either side. Positions count text only and
                padding is never attended to, so that the hidden states of the text do not depend on the padding.
                Batches padded on the right do not need a mask, because a causal model never attends to later tokens.
                Alternatively a boolean mask (B, 1, T, N) over all keys, True where attention is allowed; this requires
                ``position_ids``.
            position_ids: (B, T), the positions of the tokens; computed from ``attention_mask`` by default.
            output_positions: (B, R), indices of the tokens whose hidden states are returned. The last block computes
                only these.
            cache: keys and values of earlier tokens. ``input_ids`` are then the tokens that follow, and
                ``attention_mask`` covers both, (B, earlier tokens + T).

        Returns:
            (B, T, C), or (B, R, C) with ``output_positions``: hidden states of the text tokens, not of virtual tokens.
            Outputs at padding positions are undefined.

        Raises:
            ValueError: there are more than ``n_positions`` tokens, virtual and cached tokens included.
        """
        x = self.wte(input_ids)  # (B, T, C)
        if cache is None or cache.length == 0:
            x, cache = self._prepend_virtual_tokens(x, cache)
        start = 0 if cache is None else cache.length  # cached tokens, virtual tokens included
        mask, position_ids, padding_mask = self._mask_and_positions(start, x, attention_mask, position_ids)
        x = dropout(x + self.wpe(position_ids), self.dropout, self.training)
        for i in range(len(self.h) - 1):
            x = self._block(i, x, mask, None, cache)
        n_prompt = x.size(1) - input_ids.size(1)
        if output_positions is None:
            return self.ln_f(self._block(-1, x, mask, None, cache)[:, n_prompt:])
        output_positions = output_positions + n_prompt
        keys = torch.arange(start + x.size(1), device=x.device)
        mask = attention_mask_4d(output_positions + start, keys, padding_mask)
        return self.ln_f(self._block(-1, x, mask, output_positions, cache))

    def _mask_and_positions(
        self, start: int, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Compute the attention mask and the positions of the tokens that follow the cached ones.

        Args:
            start: number of cached tokens, virtual tokens included.
            x: (B, T, C), the embeddings of the tokens, virtual tokens included.
            attention_mask: as in :meth:`forward`.
            position_ids: as in :meth:`forward`.

        Returns:
            The mask (B, 1, T, N) over all N = start + T keys, None if it is causal; the positions (B, T) or (T,); and
            the padding mask (B, N), None without padding.

        Raises:
            ValueError: N is above ``n_positions``.
        """
        T = x.size(1)
        N = start + T
        if self.config.n_positions < N:
            limit = f"at most n_positions = {self.config.n_positions} tokens"
            raise ValueError(f"the input must have {limit}, got {N}, {self.n_virtual} of them virtual")
        keys = torch.arange(N, device=x.device)  # (N,)
        mask, padding_mask = attention_mask, None
        if attention_mask is not None and attention_mask.dim() != 4:
            padding_mask = F.pad(attention_mask.bool(), (self.n_virtual, 0), value=True)  # (B, N)
        if padding_mask is not None or (mask is None and T not in (1, N)):
            mask = attention_mask_4d(keys[start:].unsqueeze(0), keys, padding_mask)
        if position_ids is None:
            positions = keys if padding_mask is None else (padding_mask.cumsum(-1) - 1).clamp(min=0)
            position_ids = positions[..., start:]
        return mask, position_ids, padding_mask

    def _prepend_virtual_tokens(self, x: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache | None]:
        """Prepend the soft prompt to the embeddings ``x`` (B, T, C) and the prefix to the cache."""
        if self.prompt is not None:
            x = torch.cat((self.prompt().to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        if self.prefix is not None:
            cache = KVCache(len(self.h)) if cache is None else cache
            cache.set_prefix(self.prefix())  # (L, 2, H, P, hd)
        return x, cache

    def _block(
        self, i: int, x: Tensor, mask: Tensor | None, output_positions: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        inputs = (x, mask, output_positions, None if cache is None else cache.layers[i])
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.h[i], *inputs, use_reentrant=False)
        return self.h[i](*inputs)

    def set_dropout(self, p: float) -> None:
        """Set the dropout probability of the embeddings, the attention weights and both residual branches.

        ``config.dropout`` and the dropout of adapters do not change.

        Args:
            p: probability, in [0, 1).
        """
        self.dropout = p
        for module in self.modules():
            if isinstance(module, Block | CausalSelfAttention):
                module.dropout = p

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute next-token logits (..., V) from hidden states (..., C) with the tied token embedding."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """Weight (V, C) of the language-model head: the token embedding, with its adapter merged if it has one."""
        return self.wte.merged()[0] if isinstance(self.wte, MergeableLayer) else self.wte.weight

    @classmethod
    def from_pretrained(cls, path_or_id: str | PathLike[str], dropout: float | None = None) -> GPT2:
        """Load a pretrained model from a Hugging Face folder or hub id; see :func:`gpt2_pl.pretrained.load`."""
        from gpt2_pl import pretrained

        return pretrained.load(path_or_id, dropout=dropout)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Save the model as a folder that ``transformers`` loads; see :func:`gpt2_pl.pretrained.save`."""
        from gpt2_pl import pretrained

        pretrained.save(self, folder)
