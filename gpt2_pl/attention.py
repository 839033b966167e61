"""Attention (Vaswani et al. 2017, eq. 1), in the form that is quickest on the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gpt2_pl.dropout import dropout

SHORT = 256  # keys, up to which the CPU's fused kernel loses in training
LONG = 256  # keys, above which the weights are computed again in the backward pass
ROWS = 128  # queries at a time
CACHED = 2**18  # float32 values that stay in the cache


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float = 0.0, training: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v, with dropout of the weights.

    On a CPU PyTorch's fused kernel has no dropout, and in 16 bits its backward pass takes two to seven times as long as
    plain matrix products while texts are short; these two cases are computed plainly, some rows of the weights at a
    time. Causal rows leave out the keys behind them. Of long texts the weights are computed again in the backward pass,
    so that memory grows with N and not with its square. Scores and softmax are float32 whatever q is.

    Args:
        q: queries (B, H, Q, hd).
        k: keys (B, H, N, hd), of q's dtype, or without gradients of another, in which the weights are then computed.
        v: values (B, H, N, hd), of k's dtype.
        mask: (B or 1, 1, Q, N), True where a query may look; None for causal attention, with Q = N or a last Q = 1.
        p: probability, in [0, 1).
        training: whether weights are dropped, and a backward pass is to come.

    Returns:
        (B, H, Q, hd).
    """
    p = p if training else 0.0
    Q, N = q.size(2), k.size(2)
    assert mask is not None or Q in (1, N)
    if k.dtype != q.dtype:  # from a cache
        if torch.is_autocast_enabled(q.device.type):  # which would undo it; to enter the context takes time
            with torch.autocast(q.device.type, enabled=False):
                return attention(q, k, v, mask)
        return _kernel(q.to(k.dtype), k, v, mask).to(q.dtype)
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return _kernel(q, k, v, mask, p)
    if p == 0.0 and not (training and q.requires_grad and q.element_size() == 2 and N <= SHORT):
        return _kernel(q, k, v, mask)
    parts = []
    for start in range(0, Q, ROWS):
        rows = slice(start, start + ROWS)
        keys = slice(N if mask is not None else N - Q + start + ROWS)
        inputs = (q[:, :, rows], k[:, :, keys], v[:, :, keys], None if mask is None else mask[..., rows, :], p)
        parts.append(checkpoint(_plain, *inputs, use_reentrant=False) if N > LONG else _plain(*inputs))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def use_cudnn(wanted: bool) -> bool:
    """Whether a GPU's attention may be cuDNN's, which makes a plan for every new shape: that takes longer than a step.

    Returns:
        Whether it might be before.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(wanted)
    return before


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float = 0.0) -> Tensor:
    """The device's fused kernel."""
    causal = mask is None
    if q.size(2) == 1:  # the last one, which sees all keys; the kernel would take it for the first
        causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention of some rows by matrix products; without a mask they are the last ones of causal attention."""
    if mask is None:
        Q, N = q.size(2), k.size(2)
        mask = torch.ones(Q, N, dtype=torch.bool).tril(N - Q)
    scores = _Scores.apply(q, k)  # (B, H, Q, N)
    weights = (scores + mask.float().log()).softmax(-1).to(v.dtype)
    return dropout(weights, p, training=True) @ v


class _Scores(torch.autograd.Function):
    """q k^T / sqrt(hd) in float32 or above; q and k may be of 16 bits, as their gradients' products then are."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale = q.size(-1) ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.empty(*q.shape[:-1], k.size(2), dtype=wide)
        n = max(1, CACHED // k.shape[1:].numel())  # batch rows at a time
        for of_scores, of_q, of_k in zip(scores.split(n), q.split(n), k.split(n), strict=True):
            torch.matmul(of_q.to(wide) * ctx.scale, of_k.to(wide).transpose(-1, -2), out=of_scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        grad = (grad * ctx.scale).to(q.dtype)
        return grad @ k, grad.transpose(-1, -2) @ q
