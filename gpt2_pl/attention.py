"""Attention (Vaswani et al. 2017, eq. 1), in the form that is quickest on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_pl.dropout import dropout

SHORT = 256  # keys, up to which the CPU's fused kernel loses in training


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float = 0.0, training: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v, with dropout of the weights.

    On a CPU PyTorch's fused kernel has no dropout, and in 16 bits its backward pass takes two to seven times as long as
    plain matrix products while texts are short; these two cases are computed plainly. Scores then have the precision
    of q, the softmax is taken in float32.

    Args:
        q: queries (B, H, Q, hd).
        k: keys (B, H, N, hd).
        v: values (B, H, N, hd).
        mask: (B or 1, 1, Q, N), True where a query may look; None for causal attention, with Q = N.
        p: probability, in [0, 1).
        training: whether weights are dropped, and a backward pass is to come.

    Returns:
        (B, H, Q, hd).
    """
    p = p if training else 0.0
    N = k.size(2)
    slow = p > 0.0 or (training and q.requires_grad and q.element_size() == 2 and N <= SHORT)
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not slow:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(N, N, dtype=torch.bool).tril()
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)  # (B, H, Q, N)
    weights = (scores + mask.float().log()).softmax(-1).to(v.dtype)
    return dropout(weights, p, training) @ v
