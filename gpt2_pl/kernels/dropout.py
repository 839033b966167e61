"""Dropout (Srivastava et al. 2014) with fast random masks on a CPU.

On a CPU, PyTorch draws one random number per element from a serial generator; in a small GPT-2 this takes half as long
as the matrix products. Here an element is decided by 16 random bits, so that p is rounded to a multiple of 2^-16. Kept
elements are scaled by the rounded rate, so that the expectation is exact. Each mask is drawn from an SFC64 generator
whose seed is drawn from torch's default generator. Masks are applied to the bits of the values and stored for the
backward pass in one byte per element. Other devices and compiled code use PyTorch's dropout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2_pl import kernels

LEVELS = 2**16  # the number of distinct dropout rates

_INTEGER_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes


def _num_kept(p: float) -> int:
    """Return the number of the ``LEVELS`` at which an element is kept, in [1, LEVELS - 1]."""
    return min(max(round((1.0 - p) * LEVELS), 1), LEVELS - 1)


def _sample_mask(like: Tensor, num_kept: int) -> Tensor:
    """Draw an int16 mask in the shape of ``like``: -1 (all bits set) for kept elements, 0 for dropped ones."""
    n = like.numel()
    seed = int(torch.randint(2**63 - 1, (), device=like.device))
    words = torch.from_numpy(np.random.SFC64(seed).random_raw((n + 3) // 4).view(np.int64))
    # lt_ writes 0 and 1 into its integer input, which is much faster than a comparison that returns booleans.
    return words.view(torch.int16)[:n].view(like.shape).lt_(num_kept - LEVELS // 2).neg_()


def _apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` where the mask is set and zero elsewhere, also for NaN."""
    dtype = _INTEGER_DTYPES[x.element_size()]
    return (x.view(dtype) & mask.to(dtype)).view(x.dtype)


class _Dropout(torch.autograd.Function):
    """Product x * m of the input and the mask; not rescaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_kept: int) -> Tensor:
        mask = _sample_mask(x, num_kept)
        ctx.save_for_backward(mask.to(torch.int8))
        return _apply_mask(x, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _apply_mask(grad, mask), None


class _DropoutAdd(torch.autograd.Function):
    """Sum x * m / keep_rate + residual, with the mask m."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, num_kept: int) -> Tensor:
        mask = _sample_mask(x, num_kept)
        ctx.scale, ctx.dtypes = LEVELS / num_kept, (x.dtype, residual.dtype)
        ctx.save_for_backward(mask.to(torch.int8))
        if residual.element_size() == 2:  # torch.add would round the scale to 16 bits
            return residual + _apply_mask(x * ctx.scale, mask)
        return torch.add(residual, _apply_mask(x, mask), alpha=ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (mask,) = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        needs_x, needs_residual, _ = ctx.needs_input_grad
        return (
            _apply_mask((grad * ctx.scale).to(x_dtype), mask) if needs_x else None,
            grad.to(residual_dtype) if needs_residual else None,
            None,
        )


def _use_cpu_kernel(x: Tensor) -> bool:
    return kernels.enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero elements with probability ``p`` and scale the others, like :func:`torch.nn.functional.dropout`.

    Args:
        input: any shape, floating point.
        p: probability of dropping an element, in [0, 1).
        training: whether dropout is applied.

    Returns:
        The shape of ``input``.
    """
    output, scale = dropout_unscaled(input, p, training)
    return output if scale == 1.0 else output * scale


def dropout_unscaled(input: Tensor, p: float = 0.5, training: bool = True) -> tuple[Tensor, float]:
    """Zero elements with probability ``p`` and return the scale, so that the caller can fold it into a smaller tensor.

    Args:
        input: any shape, floating point.
        p: probability of dropping an element, in [0, 1).
        training: whether dropout is applied.

    Returns:
        The masked tensor, in the shape of ``input``, and the factor by which the caller must multiply it.
    """
    if not training or p == 0.0:
        return input, 1.0
    if not _use_cpu_kernel(input):
        return F.dropout(input, p), 1.0
    num_kept = _num_kept(p)
    return _Dropout.apply(input, num_kept), LEVELS / num_kept


def dropout_add(input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Compute ``dropout(input) + residual`` in one step.

    Args:
        input: any shape, floating point.
        residual: the shape of ``input``.
        p: probability of dropping an element, in [0, 1).
        training: whether dropout is applied.

    Returns:
        The shape of ``residual``.
    """
    if training and p > 0.0 and _use_cpu_kernel(input):
        return _DropoutAdd.apply(input, residual, _num_kept(p))
    return residual + dropout(input, p, training)
