"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1), fast for training on short texts on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gpt2_pl import kernels
from gpt2_pl.kernels.dropout import dropout

MAX_MATH_KEYS = 256  # in 16 bits, the fused CPU kernel's backward pass is slower than matrix products up to this length
MIN_RECOMPUTE_KEYS = 256  # above this length the attention weights are recomputed in the backward pass
QUERY_BLOCK = 128  # queries computed at a time
CACHE_FLOATS = 2**18  # float32 values that fit in the CPU cache


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(hd)) v, like :func:`torch.nn.functional.scaled_dot_product_attention`.

    On a CPU, PyTorch's fused kernel does not support dropout, and for short texts in 16 bits its backward pass is two
    to seven times slower than matrix products. Both cases are computed here with matrix products, one block of queries
    at a time; causal blocks skip the keys after them. For long texts the attention weights are recomputed in the
    backward pass, so that memory grows with N instead of N^2. Scores and softmax are float32.

    Args:
        query: (B, H, Q, hd).
        key: (B, H, N, hd). Without gradients its dtype may differ from that of ``query``, for example in a float32
            cache; the attention is then computed in the dtype of ``key``.
        value: (B, H, N, hd), in the dtype of ``key``.
        attn_mask: boolean, broadcastable to (B, H, Q, N), True where attention is allowed.
        dropout_p: dropout probability of the attention weights, applied whenever it is above 0.
        is_causal: attend to keys up to the query's position only; not allowed together with ``attn_mask``.

    Returns:
        (B, H, Q, hd), in the dtype of ``query``.
    """
    if key.dtype != query.dtype:
        if torch.is_autocast_enabled(query.device.type):  # autocast would convert the keys back
            with torch.autocast(query.device.type, enabled=False):
                return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
        output = F.scaled_dot_product_attention(query.to(key.dtype), key, value, attn_mask, dropout_p, is_causal)
        return output.to(query.dtype)
    Q, N = query.size(2), key.size(2)
    if not _use_math(query, N, dropout_p) or (is_causal and Q != N):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
    parts = []
    for start in range(0, Q, QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        keys = slice(start + QUERY_BLOCK if is_causal else N)
        mask = None if attn_mask is None else attn_mask[..., rows, :]
        inputs = (query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, dropout_p, is_causal)
        recompute = N > MIN_RECOMPUTE_KEYS
        parts.append(
            checkpoint(_attention_block, *inputs, use_reentrant=False) if recompute else _attention_block(*inputs)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _use_math(query: Tensor, num_keys: int, dropout_p: float) -> bool:
    """Return whether matrix products are faster than the fused kernel of PyTorch."""
    if not kernels.enabled() or query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    trains = query.requires_grad and torch.is_grad_enabled()
    return dropout_p > 0.0 or (trains and query.element_size() == 2 and num_keys <= MAX_MATH_KEYS)


def _attention_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, is_causal: bool) -> Tensor:
    """Compute the attention of a block of queries; if causal, the queries are at the last positions of the keys."""
    scores = _Scores.apply(q, k)  # (B, H, Q, N)
    if is_causal:
        Q, N = q.size(2), k.size(2)
        mask = torch.ones(Q, N, dtype=torch.bool).tril(N - Q)
    if mask is not None:
        scores = scores + mask.float().log()
    return dropout(scores.softmax(-1).to(v.dtype), p) @ v


class _Scores(torch.autograd.Function):
    """q k^T / sqrt(hd) in float32 or above, also for 16-bit q and k; their gradients are in the dtype of q and k."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = q.size(-1) ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.empty(*q.shape[:-1], k.size(2), dtype=wide)
        n = max(1, CACHE_FLOATS // k.shape[1:].numel())  # batch rows at a time
        for scores_chunk, q_chunk, k_chunk in zip(scores.split(n), q.split(n), k.split(n), strict=True):
            torch.matmul(q_chunk.to(wide) * ctx.scale, k_chunk.to(wide).transpose(-1, -2), out=scores_chunk)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        grad = (grad * ctx.scale).to(q.dtype)
        return grad @ k, grad.transpose(-1, -2) @ q
