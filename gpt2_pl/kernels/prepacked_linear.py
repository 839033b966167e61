"""Linear layers with prepacked weights, stored in the blocked layout that oneDNN's CPU kernels read.

With PyTorch's layout the products take longer: 1.2 to 4 times as long for few rows, as in generation, and 10 % longer
for a training batch in bfloat16. Frozen weights are prepacked once and reused. Trainable weights are prepacked on each
call, which pays off for large products only (see ``MIN_ROWS``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt2_pl import kernels

MIN_CALLS = 32  # number of decoding steps from which prepacking all weights pays off
MIN_ROWS = 1280  # rows of one product from which prepacking a trainable weight pays off, measured at width 768


@runtime_checkable
class MergeableLayer(Protocol):
    """Layer that can be merged into a plain linear layer or a plain embedding outside training."""

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias (out,) of the equivalent plain layer."""


def cast_to_autocast_dtype(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype in which autocast computes matrix products, or unchanged without autocast."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def supports_prepacking(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN can prepack weights of this dtype."""
    mkldnn, ops = torch.backends.mkldnn, torch.ops.mkldnn
    if not kernels.enabled() or device.type != "cpu" or not (mkldnn.is_available() and mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())


def prepack(weight: Tensor) -> Tensor:
    """Return a prepacked copy of ``weight`` (out, in), float32 or bfloat16, for :func:`prepacked_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear(x, weight, bias)`` with a prepacked weight, in one dtype and without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PrepackedWeight:
    """Prepacked copy of a frozen weight.

    Args:
        weight: (out, in).
        dtype: dtype of the products.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.detach()  # keeps storage and version counter if the parameter is replaced
        self.dtype = dtype
        self.version = weight._version
        self.forward = prepack(weight.to(dtype))

    @cached_property
    def _transposed(self) -> Tensor:
        return prepack(self.weight.to(self.dtype).T)

    @property
    def backward(self) -> Tensor:
        """Prepacked transposed weight, computed when a gradient first needs it.

        Raises:
            RuntimeError: the weight was changed after the forward pass.
        """
        if self.weight._version != self.version:
            raise RuntimeError("a frozen weight must not be changed in place between a forward and its backward pass")
        return self._transposed

    def matches(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Return whether this is an up-to-date copy of ``weight`` in ``dtype``."""
        same = self.weight.data_ptr() == weight.data_ptr() and self.version == weight._version
        return same and self.dtype == dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1))


class _PrepackedLinearFn(torch.autograd.Function):
    """Product x W^T + b with a trainable weight, which is prepacked on each call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return prepacked_linear(x, prepack(weight), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        rows = _rows(grad)
        return (
            grad @ weight if ctx.needs_input_grad[0] else None,  # prepacking the transpose is not faster
            (rows.T @ _rows(x)).to(weight_dtype),
            rows.sum(0).to(bias_dtype) if ctx.needs_input_grad[2] else None,
        )


class _FrozenPrepackedLinearFn(torch.autograd.Function):
    """Product x W^T + b with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PrepackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return prepacked_linear(x, weight.forward, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        return (
            prepacked_linear(grad, ctx.weight.backward) if ctx.needs_input_grad[0] else None,
            None,
            _rows(grad).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` that trains with prepacked copies of its weight on a CPU in bfloat16.

    The copy of a frozen weight is cached until ``eval()``. The cache is invalidated when the weight changes, except
    through in-place writes to ``weight.data``. Double backward and ``torch.func`` are not supported.
    """

    _prepacked: PrepackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Compute x W^T + b: (..., in) -> (..., out)."""
        return self.affine(input, self.bias)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias.

        Args:
            x: (..., in).
            bias: (out,), in place of the layer's bias, or None.

        Returns:
            (..., out).
        """
        weight = self.weight
        if not self.training or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        x = cast_to_autocast_dtype(x)
        fits = x.dtype == torch.bfloat16 and (weight.dtype == x.dtype or torch.is_autocast_enabled("cpu"))
        supported = fits and supports_prepacking(x.device, x.dtype) and not weight.is_inference()
        if supported and not weight.requires_grad:
            if self._prepacked is None or not self._prepacked.matches(weight, x.dtype):
                self._prepacked = PrepackedWeight(weight, x.dtype)
            return _FrozenPrepackedLinearFn.apply(x, self._prepacked, bias)
        self.clear_cache()
        if supported and torch.is_grad_enabled() and x.numel() >= MIN_ROWS * self.in_features:
            return _PrepackedLinearFn.apply(x, weight, bias)
        return F.linear(x, weight, bias)

    def clear_cache(self) -> None:
        """Delete the prepacked copy."""
        if self._prepacked is not None:
            self._prepacked = None

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; see :meth:`torch.nn.Module.train`."""
        if not mode:
            self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # to another device or dtype
        self.clear_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepacked": None}  # a prepacked tensor cannot be copied


class PrepackedLinear(nn.Module):
    """Linear layer without gradients that stores only a prepacked copy of its weight.

    Args:
        weight: (out, in), float32 or bfloat16.
        bias: (out,), of the same dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.weight = prepack(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b without gradients: (..., in) -> (..., out)."""
        return prepacked_linear(x.to(self.dtype), self.weight, self.bias)


def _can_replace_linears(module: nn.Module) -> bool:
    """Return whether linear layers can be replaced: no hook, compiled call or unknown linear layer is bypassed."""
    for layer in module.modules():
        bypasses = layer._compiled_call_impl is not None or layer._forward_hooks or layer._forward_pre_hooks
        known = type(layer) in (nn.Linear, Linear) or isinstance(layer, MergeableLayer)
        if bypasses or (isinstance(layer, nn.Linear) and not known):
            return False
    return True


def _linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield parent, name and layer of every linear layer and mergeable layer.

    Submodules of mergeable layers are skipped, and so are those of modules from other packages, which may read the
    weight of a layer.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | MergeableLayer):
            yield module, name, child
        elif type(child).__module__.partition(".")[0] in ("torch", "gpt2_pl"):
            yield from _linear_layers(child)


@contextmanager
def prepacked_weights(
    blocks: nn.Module, head_weight: Callable[[], Tensor], num_calls: int
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Replace the linear layers of ``blocks`` temporarily by prepacked ones, with adapters merged.

    Nothing is replaced if prepacking is not supported. Inside the context, memory holds a second copy of the weights,
    and there are no gradients.

    Args:
        blocks: the module whose linear layers are replaced.
        head_weight: returns the weight (V, C) of the language-model head.
        num_calls: number of calls that follow; below ``MIN_CALLS`` nothing is replaced.

    Yields:
        The language-model head, a function from (B, C) to (B, V).
    """
    parameter = next(blocks.parameters())
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else parameter.dtype
    if num_calls < MIN_CALLS or not supports_prepacking(parameter.device, dtype) or not _can_replace_linears(blocks):
        weight = cache(head_weight)  # sharded weights are gathered by the first forward pass
        yield lambda hidden: (weight() @ hidden.T).T  # faster than F.linear for few rows
        return

    def prepacked(layer: Any) -> PrepackedLinear:
        weight, bias = layer.merged() if isinstance(layer, MergeableLayer) else (layer.weight, layer.bias)
        return PrepackedLinear(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))

    layers = list(_linear_layers(blocks))
    try:
        for parent, name, layer in layers:
            setattr(parent, name, prepacked(layer))
        yield PrepackedLinear(head_weight().detach().to(dtype), None)
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
