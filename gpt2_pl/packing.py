"""Weights in the order in which the CPU's kernels read them.

oneDNN multiplies by weights in blocks. From PyTorch's layout its products are slower: of few rows, as in generating a
text, 1.2 to 4 times; of a training batch in bfloat16 by a tenth. A weight that stays as it is for long, in generation
or because it is frozen, is packed once; packing one that trains pays for a large product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2


WORTH = 32  # passes, by which packing for generation has paid
ROWS = 1280  # of one product, by which packing a weight that trains has paid where it was measured, at width 768


def autocasted(x: Tensor) -> Tensor:
    """``x`` in the dtype in which autocast has matrix products made, where it is on and would change it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def can_be_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is there for this dtype."""
    mkldnn, ops = torch.backends.mkldnn, torch.ops.mkldnn
    if device.type != "cpu" or not (mkldnn.is_available() and mkldnn.enabled):
        return False
    if not hasattr(ops, "_linear_pointwise") or not hasattr(ops, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A copy of ``weight`` (out, in), float32 or bfloat16, for :func:`packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)`` with a packed weight; all are of one dtype, and gradients do not pass."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PackedWeight:
    """A frozen weight as it is now, packed.

    Args:
        weight: (out, in).
        dtype: of the products.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.detach()  # its memory and its version, whatever becomes of the parameter
        self.dtype = dtype
        self.version = weight._version
        self.forward = pack(weight.to(dtype))

    @cached_property
    def _transposed(self) -> Tensor:
        return pack(self.weight.to(self.dtype).T)

    @property
    def backward(self) -> Tensor:
        """For the gradient of what it multiplies, packed when there first is one.

        Raises:
            RuntimeError: the weight has changed since.
        """
        if self.weight._version != self.version:
            raise RuntimeError("a frozen weight was changed in place between a forward pass and its backward pass")
        return self._transposed

    def is_of(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether it is still what ``weight`` holds."""
        same = self.weight.data_ptr() == weight.data_ptr() and self.version == weight._version
        return same and self.dtype == dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


class _Affine(torch.autograd.Function):
    """x W^T + b, of a weight that is packed once more at every call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return packed_linear(x, pack(weight), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        rows = _rows(grad)
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,  # packed transposed, it would not be quicker
            (rows.T @ _rows(x)).to(of_weight),
            rows.sum(0).to(of_bias) if ctx.needs_input_grad[2] else None,
        )


class _FrozenAffine(torch.autograd.Function):
    """x W^T + b, of a weight that has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return packed_linear(x, weight.forward, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        return (
            packed_linear(grad, ctx.weight.backward) if ctx.needs_input_grad[0] else None,
            None,
            _rows(grad).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """A linear layer that, on a CPU and in bfloat16, trains from packed copies of its weight.

    A frozen weight's copies stay until ``eval()``. They follow whatever is done to the weight but changes in place of
    ``weight.data``. Gradients can be taken once, and not by ``torch.func``.
    """

    _packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.affine(input, self.bias)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias: (..., in) -> (..., out)."""
        weight = self.weight
        if not self.training or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        x = autocasted(x)
        fits = x.dtype == torch.bfloat16 and (weight.dtype == x.dtype or torch.is_autocast_enabled("cpu"))
        packs = fits and can_be_packed(x.device, x.dtype) and not weight.is_inference()
        if packs and not weight.requires_grad:
            if self._packed is None or not self._packed.is_of(weight, x.dtype):
                self._packed = PackedWeight(weight, x.dtype)
            return _FrozenAffine.apply(x, self._packed, bias)
        self.let_go()
        if packs and torch.is_grad_enabled() and x.numel() >= ROWS * self.in_features:
            return _Affine.apply(x, weight, bias)
        return F.linear(x, weight, bias)

    def let_go(self) -> None:
        """Keep no packed copy."""
        if self._packed is not None:
            self._packed = None

    def train(self, mode: bool = True) -> Self:
        """As in PyTorch."""
        if not mode:
            self.let_go()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # to another device or dtype
        self.let_go()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # what is packed cannot be copied


class PackedLinear(nn.Module):
    """What a linear layer computes, without gradients, from a packed copy of its weight.

    Args:
        weight: (out, in), float32 or bfloat16.
        bias: (out,), of the same dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.weight = pack(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return packed_linear(x.to(self.dtype), self.weight, self.bias)


def _are_plain(blocks: nn.Module) -> bool:
    """Whether the layers are plain enough that others may stand in for them."""
    for module in blocks.modules():
        if module._compiled_call_impl is not None or module._forward_hooks or module._forward_pre_hooks:
            return False
        known = type(module) in (nn.Linear, Linear) or hasattr(module, "merged_weight")
        if isinstance(module, nn.Linear) and not known:
            return False
    return True


@contextmanager
def packed(model: GPT2, times: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let the blocks compute from packed weights, adapters folded in; gives the head, (B, C) -> (B, V).

    Where that cannot be, the model stays as it is. Meanwhile there is a second copy of the weights; gradients do not
    pass.

    Args:
        model: the GPT-2.
        times: how many times it will be called; below ``WORTH`` nothing is packed.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.wte.weight.dtype
    if times < WORTH or not can_be_packed(model.wte.weight.device, dtype) or not _are_plain(model.h):
        merged: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            if not merged:  # sharded weights are there once the first pass has gathered them
                merged.append(model.head_weight)
            return (merged[0] @ hidden.T).T  # in this order faster than F.linear for few rows

        yield head
        return

    def pack_layer(layer: Any) -> PackedLinear:
        weight = layer.merged_weight() if hasattr(layer, "merged_weight") else layer.weight
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return PackedLinear(weight.detach().to(dtype), bias)

    places = [
        (parent, name, layer)
        for parent in model.h.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    try:
        for parent, name, layer in places:
            setattr(parent, name, pack_layer(layer))
        yield PackedLinear(model.head_weight.detach().to(dtype), None)
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
