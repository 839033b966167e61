"""Capture a function of tensors of fixed shape as a CUDA graph.

A decoding step of a small GPT-2 launches some two hundred kernels, most of which take less time than Python needs to
launch one. Replaying a graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from gpt2_pl import kernels

MIN_CALLS = 16  # from this many calls on, capturing pays off


def supports_cuda_graph(model: nn.Module, num_calls: int) -> bool:
    """Return whether calls of ``model`` can be replayed from a CUDA graph.

    The model must be on a GPU, in evaluation mode (training reuses memory that the capture frees) and without hooks,
    and it must be called at least ``MIN_CALLS`` times.
    """
    parameter = next(model.parameters())
    if not kernels.enabled() or parameter.device.type != "cuda" or model.training or num_calls < MIN_CALLS:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures: cuBLAS keeps memory for every stream that it has worked on."""
    return torch.cuda.Stream(device)


def cuda_graph(function: Callable[[], Tensor], state: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Capture ``function`` and return a callable that replays it.

    Args:
        function: reads and writes tensors in place; their addresses and shapes must not change.
        state: the tensors on a GPU that ``function`` writes; warm-up calls leave them unchanged.

    Returns:
        A callable that replays the graph and returns the output, which the next call overwrites.
    """
    saved = [tensor.clone() for tensor in state]
    device = state[0].device
    with torch.cuda.device(device):  # else work of another device would be captured, without an error
        current, side = torch.cuda.current_stream(device), _stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # kernels are chosen and compiled in the first calls
            for _ in range(3):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            output = function()
    for tensor, value in zip(state, saved, strict=True):
        tensor.copy_(value)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
