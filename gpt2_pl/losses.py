"""Losses over the vocabulary, without its logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that counts for nothing, as in torch


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies, with both gradients computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # Under autocast a matrix product is made in its dtype; the softmax always in float32 or above.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        table = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                states, target = hidden[part].to(dtype), targets[part]
                logits = (states @ table.T).to(total.dtype)  # (n, V)
                normaliser = logits.logsumexp(-1, keepdim=True)
                at = target.unsqueeze(-1)
                total += (normaliser - logits.gather(-1, at)).sum()
                if not (need_hidden or need_weight):
                    continue
                gradient = logits.sub_(normaliser).exp_()  # softmax
                gradient.scatter_add_(-1, at, gradient.new_full((1, 1), -1.0).expand_as(at))
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ table
                if grad_weight is not None:
                    grad_weight += gradient.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy from hidden states, never holding all logits (B, T, V).

    Equal to ``F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")``. Hidden states where
    nothing is predicted are left out before the vocabulary is multiplied in.

    Args:
        hidden: (B, T, C).
        weight: the tied token embedding (V, C).
        targets: (B, T) token ids, or -100 where nothing is predicted.
        chunk: positions whose logits are held at a time.

    Returns:
        The sum of the losses, in nats, and the number of targets.
    """
    counted = targets != IGNORED
    total = _ChunkedCrossEntropy.apply(hidden[counted], weight, targets[counted], chunk)
    return total, counted.sum()
