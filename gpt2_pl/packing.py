"""Weights in the order in which the CPU's kernels read them, for as long as a text is generated.

A product with one row of hidden states reads every weight once, and so does one with a dozen. From PyTorch's own layout
oneDNN reads at half the speed of memory or less; from its own, in blocks, it is 1.2 to 4 times as fast, most so with a
dozen rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2


WORTH = 32  # passes, by which packing has paid


class PackedLinear(nn.Module):
    """What a linear layer computes, without gradients, from a packed copy of its weight.

    Args:
        weight: (out, in), float32 or bfloat16.
        bias: (out,), of the same dtype.
        rows: how many rows (..., in) has most of the time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


def _can_be_packed(model: GPT2, dtype: torch.dtype) -> bool:
    """Whether oneDNN is there for this dtype, and the layers are plain enough that others may stand in for them."""
    mkldnn = torch.backends.mkldnn
    if model.wte.weight.device.type != "cpu" or not (mkldnn.is_available() and mkldnn.enabled):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    for module in model.h.modules():
        if module._compiled_call_impl is not None or module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and not hasattr(module, "merged_weight"):
            return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def packed(model: GPT2, rows: int, times: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let the blocks compute from packed weights, adapters folded in; gives the head, (B, C) -> (B, V).

    Where that cannot be, the model stays as it is. Meanwhile there is a second copy of the weights; gradients do not
    pass.

    Args:
        model: the GPT-2.
        rows: how many hidden states there are at a time, B.
        times: how many times; below ``WORTH`` nothing is packed.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.wte.weight.dtype
    if times < WORTH or not _can_be_packed(model, dtype):
        weight = model.head_weight
        yield lambda hidden: (weight @ hidden.T).T  # in this order faster than F.linear for few rows
        return

    def pack(layer: Any) -> PackedLinear:
        weight = layer.merged_weight() if hasattr(layer, "merged_weight") else layer.weight
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        return PackedLinear(weight.detach().to(dtype), bias, rows)

    places = [
        (parent, name, layer)
        for parent in model.h.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    try:
        for parent, name, layer in places:
            setattr(parent, name, pack(layer))
        yield PackedLinear(model.head_weight.detach().to(dtype), None, rows)
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
