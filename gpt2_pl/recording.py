"""Generation on a GPU: the pass over one token, recorded once as a CUDA graph.

Such a pass is some two hundred kernels, most of which take less time than Python needs to start one; a recording starts
them all at once. Nothing in it can change its shape: attention looks at all of the cache, under a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2_pl.generation import KeyValueCache
    from gpt2_pl.model import GPT2

WORTH = 16  # passes, by which a recording has paid


def can_be_recorded(model: GPT2, times: int) -> bool:
    """Whether to record a model that will be called so many times: one on a GPU, without hooks, and not in training,
    in which memory is used again that recording gives back.
    """
    if model.wte.weight.device.type != "cuda" or model.training or times < WORTH:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps memory for every stream that it has worked on."""
    return torch.cuda.Stream(device)


class RecordedPass:
    """Reads one more token of every row at each call, from behind a prompt that the cache holds.

    Args:
        model: the GPT-2, in evaluation mode.
        head: from hidden states (B, C) to logits (B, V).
        cache: with keys and values of the virtual tokens and the prompt.
        prompt: (B, T), 1 for text and 0 for padding.
    """

    def __init__(self, model: GPT2, head: Callable[[Tensor], Tensor], cache: KeyValueCache, prompt: Tensor) -> None:
        self.model, self.head, self.cache = model, head, cache
        B, T = prompt.shape
        before = model.n_virtual
        self.ids = prompt.new_zeros(B, 1)
        self.place = prompt.new_full((1,), before + T)  # among the cache's keys
        self.position = prompt.sum(1, keepdim=True) + before  # (B, 1)
        self.mask = prompt.new_zeros(B, 1, 1, cache.layers[0].capacity, dtype=torch.bool)  # who is looked at
        self.mask[..., :before] = True
        self.mask[..., before : before + T] = prompt.bool()[:, None, None]
        for layer in cache.layers:
            layer.place = self.place
        self.graph: torch.cuda.CUDAGraph | None = None
        if prompt.device.type == "cuda":
            self._record()

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids (B, 1) -> logits of the next (B, V), which the next call overwrites."""
        self.ids.copy_(ids)
        if self.graph is None:
            return self._pass()
        self.graph.replay()
        return self.logits

    def _pass(self) -> Tensor:
        model, device = self.model, self.ids.device.type
        self.mask.index_fill_(3, self.place, True)
        # What autocast keeps of a weight would not outlive autocast.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            x = model.wte(self.ids) + model.wpe(self.position)
            for block, layer in zip(model.h, self.cache.layers, strict=True):
                x = block(x, self.mask, None, None, layer)
            logits = self.head(model.ln_f(x)[:, -1])
        self.place += 1
        self.position += 1
        return logits

    def _record(self) -> None:
        state = (self.place, self.position, self.mask)
        before = [t.clone() for t in state]
        device = self.ids.device
        with torch.cuda.device(device):  # or another's work would be recorded, without an error
            here, aside = torch.cuda.current_stream(device), _stream(device)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # kernels are chosen and compiled in the first passes
                for _ in range(3):
                    self._pass()
            here.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
                self.logits = self._pass()
        for t, was in zip(state, before, strict=True):
            t.copy_(was)
