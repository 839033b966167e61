"""CUDA graphs of functions whose tensors have fixed shapes.

A decoding step of a small GPT-2 launches about two hundred kernels, most of which are faster than their launch from
Python. Replaying a graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2_pl import kernels

Output = TypeVar("Output")
MIN_CALLS = 16  # number of calls from which capturing pays off


def supports_cuda_graph(model: nn.Module, num_calls: int) -> bool:
    """Return whether calls of ``model`` can be replayed from a CUDA graph.

    The model must be on a GPU, in evaluation mode (training reuses memory that the capture frees) and without hooks,
    and it must be called at least ``MIN_CALLS`` times.

    Args:
        model: the model.
        num_calls: number of calls that follow.
    """
    parameter = next(model.parameters())
    if not kernels.enabled() or parameter.device.type != "cuda" or model.training or num_calls < MIN_CALLS:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures, because cuBLAS keeps a workspace for every stream that it has used."""
    return torch.cuda.Stream(device)


def cuda_graph(function: Callable[[], Output], state: Sequence[Tensor], pool: Any = None) -> Callable[[], Output]:
    """Capture ``function`` and return a callable that replays it.

    Args:
        function: reads and writes tensors in place; their addresses and shapes must not change.
        state: the tensors on the GPU that ``function`` writes. They are restored after the warm-up calls.
        pool: memory pool of graphs that are never replayed at the same time, from ``torch.cuda.graph_pool_handle()``;
            None for an own pool.

    Returns:
        A callable that replays the graph and returns the output, which the next call overwrites.
    """
    saved = [tensor.clone() for tensor in state]
    device = state[0].device
    with torch.cuda.device(device):  # otherwise another device's stream is captured, without an error
        current, side = torch.cuda.current_stream(device), _stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # the first calls select and compile kernels
            for _ in range(3):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            output = function()
    for tensor, value in zip(state, saved, strict=True):
        tensor.copy_(value)

    def replay() -> Output:
        graph.replay()
        return output

    return replay
