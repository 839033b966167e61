"""Dropout (Srivastava et al. 2014), with masks that are cheap to draw on a CPU.

PyTorch draws one number an element from a serial generator there, which in a small GPT-2 takes as long as half of its
matrix products. Here 16 bits decide an element, so p is rounded to a multiple of 2^-16; elements that are kept are
scaled by the rounded rate, so that the expectation stays exact. Every mask comes from an SFC64 generator, whose seed is
drawn from torch's default one, is applied to the bits of the numbers, and is kept for the backward pass in one byte an
element. On other devices, and in compiled code, dropout is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEVELS = 2**16  # as many rates of dropout are told apart

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def _kept(p: float) -> int:
    """How many of the ``LEVELS`` keep an element: at least one, and not all."""
    return min(max(round((1.0 - p) * LEVELS), 1), LEVELS - 1)


def _draw(like: Tensor, kept: int) -> Tensor:
    """An int16 mask in the shape of ``like``: all bits set where an element is kept, none where it is dropped."""
    n = like.numel()
    seed = int(torch.randint(2**63 - 1, (), device=like.device))
    words = torch.from_numpy(np.random.SFC64(seed).random_raw((n + 3) // 4).view(np.int64))
    # lt_ writes 0 and 1 into the integers that it compares, which is far quicker than a comparison that makes booleans
    return words.view(torch.int16)[:n].view(like.shape).lt_(kept - LEVELS // 2).neg_()


def _apply(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the mask is set, zero elsewhere, also in the place of a NaN."""
    integers = _INTEGERS[x.element_size()]
    return (x.view(integers) & mask.to(integers)).view(x.dtype)


class _Masked(torch.autograd.Function):
    """x m."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: int) -> Tensor:
        mask = _draw(x, kept)
        ctx.save_for_backward(mask.to(torch.int8))
        return _apply(x, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _apply(grad, mask), None


class _AddDropout(torch.autograd.Function):
    """residual + x m / keep."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, kept: int) -> Tensor:
        mask = _draw(x, kept)
        ctx.scale, ctx.dtypes = LEVELS / kept, (residual.dtype, x.dtype)
        ctx.save_for_backward(mask.to(torch.int8))
        if residual.element_size() == 2:  # the addition would round the scale to 16 bits
            return residual + _apply(x * ctx.scale, mask)
        return torch.add(residual, _apply(x, mask), alpha=ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (mask,) = ctx.saved_tensors
        of_residual, of_x = ctx.dtypes
        needs_residual, needs_x, _ = ctx.needs_input_grad
        return (
            grad.to(of_residual) if needs_residual else None,
            _apply((grad * ctx.scale).to(of_x), mask) if needs_x else None,
            None,
        )


def _ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero elements with probability ``p`` and divide the others by 1 - p; outside training, ``x`` itself.

    Args:
        x: any shape, floating point.
        p: probability, in [0, 1).
        training: whether anything is dropped.

    Returns:
        The shape of ``x``.
    """
    kept, scale = masked(x, p, training)
    return kept if scale == 1.0 else kept * scale


def masked(x: Tensor, p: float, training: bool) -> tuple[Tensor, float]:
    """Dropout in two factors, of which the second can be left for something smaller than ``x``.

    Args:
        x: any shape, floating point.
        p: probability, in [0, 1).
        training: whether anything is dropped.

    Returns:
        A tensor in the shape of ``x``, and by what to multiply it.
    """
    if not training or p == 0.0:
        return x, 1.0
    if not _ours(x):
        return F.dropout(x, p), 1.0
    kept = _kept(p)
    return _Masked.apply(x, kept), LEVELS / kept


def add_dropout(residual: Tensor, x: Tensor, p: float, training: bool) -> Tensor:
    """``residual + dropout(x)``, in one step.

    Args:
        residual: any shape.
        x: the shape of ``residual``.
        p: probability, in [0, 1).
        training: whether anything is dropped.

    Returns:
        The shape of ``residual``.
    """
    if training and p > 0.0 and _ours(x):
        return _AddDropout.apply(residual, x, _kept(p))
    return residual + dropout(x, p, training)
