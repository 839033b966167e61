"""Decoding with a key/value cache, shared by sampling and beam search: prompts, logits, logits processors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_pl.errors import InputError, require
from gpt2_pl.kernels.cuda_graph import cuda_graph
from gpt2_pl.kernels.prepacked_linear import prepacked_weights
from gpt2_pl.kv_cache import KVCache

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2


LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps logits (B, V), token ids so far (B, N) and their mask (B, N), 1 for text, to new logits (B, V)."""

DIVISORS = 1e-9, 1e9
"""Range of divisors of float32 logits."""


def pad_left(
    model: GPT2, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Move the padding of prompts to the left, so that all rows continue at the same index.

    Args:
        model: the GPT-2.
        input_ids: (B, T) prompts.
        attention_mask: (B, T), 1 for text and 0 for padding, on either side; None without padding.
        max_new_tokens: maximum number of generated tokens.

    Returns:
        The prompts (B, T), padded on the left, and their mask (B, T).

    Raises:
        InputError: a prompt is empty, or there are more than ``n_positions`` tokens.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if not (input_ids.size(1) if attention_mask is None else bool((mask.sum(1) > 0).all())):
        raise InputError("a prompt is empty; give at least one token, such as the end of text")
    num_tokens, n_positions = model.n_virtual + input_ids.size(1) + max_new_tokens, model.config.n_positions
    expected = f"at most n_positions = {n_positions} tokens, virtual tokens included"
    require(num_tokens <= n_positions, "prompt and continuation", num_tokens, expected)
    if attention_mask is None:
        return input_ids, mask
    order = mask.argsort(dim=1, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def next_logits(
    model: GPT2,
    head: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    prompt_length: int,
    cache: KVCache,
    captures: bool,
    num_beams: int = 1,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Yield the next-token logits of all rows: of the prompts in one pass, then of one token at a time.

    Args:
        model: the GPT-2, in evaluation mode.
        head: maps hidden states (B, C) to logits (B, V).
        ids: (B, T + new) token ids; before it asks for more logits, the caller writes the token that it chose.
        mask: (B, T + new), 1 for text and 0 for padding; the caller extends it likewise.
        prompt_length: T.
        cache: an empty cache for all tokens, virtual tokens included.
        captures: whether tokens after the prompt are decoded from a CUDA graph.
        num_beams: number of successive rows with the same prompt, which is read once.
        compiled: whether tokens after the prompt are decoded with compiled code.

    Yields:
        (B, V) in float32, ``new`` times.
    """
    T, N = prompt_length, ids.size(1)
    prompts, prompt_mask = ids[::num_beams, :T], mask[::num_beams, :T]
    padded = not bool(prompt_mask.all())
    last = torch.full((len(prompts), 1), T - 1, device=ids.device)
    hidden = model(prompts, prompt_mask if padded else None, output_positions=last, cache=cache)
    cache.repeat(num_beams)
    yield head(hidden[:, -1]).float().repeat_interleave(num_beams, dim=0)
    decode = DecodeStep(model, head, cache, mask[:, :T], captures, compiled) if captures or compiled else None
    for n in range(T + 1, N):
        if decode is not None:
            yield decode(ids[:, n - 1 : n]).to(torch.float32, copy=True)
        else:
            hidden = model(ids[:, n - 1 : n], mask[:, :n] if padded else None, cache=cache)
            yield head(hidden[:, -1]).float()


class DecodeStep:
    """Decoding step of one token per row in tensors of fixed shape, captured as a CUDA graph on a GPU.

    Attention reads the full cache buffers under a mask.

    Args:
        model: the GPT-2, in evaluation mode.
        head: maps hidden states (B, C) to logits (B, V).
        cache: the keys and values of the virtual tokens and the prompt.
        prompt_mask: (B, T), 1 for text and 0 for padding.
        captures: whether the step is captured if it is on a GPU.
        compiled: whether the step is compiled.
    """

    def __init__(
        self,
        model: GPT2,
        head: Callable[[Tensor], Tensor],
        cache: KVCache,
        prompt_mask: Tensor,
        captures: bool,
        compiled: bool = False,
    ) -> None:
        self.model, self.head, self.cache = model, head, cache
        self._compute = _compiled_logits() if compiled else _decode_logits
        B, T = prompt_mask.shape
        start = model.n_virtual
        self.ids = prompt_mask.new_zeros(B, 1)
        self.write_index = prompt_mask.new_full((1,), start + T)  # index of the new key in the cache
        self.position_ids = prompt_mask.sum(1, keepdim=True) + start  # (B, 1)
        self.mask = prompt_mask.new_zeros(B, 1, 1, cache.layers[0].capacity, dtype=torch.bool)
        self.mask[..., :start] = True
        self.mask[..., start : start + T] = prompt_mask.bool()[:, None, None]
        for layer in cache.layers:
            layer.write_index = self.write_index
        state = (self.write_index, self.position_ids, self.mask)
        is_captured = captures and prompt_mask.device.type == "cuda"
        self._step = cuda_graph(self._forward, state) if is_captured else self._forward

    def __call__(self, ids: Tensor) -> Tensor:
        """Compute the next-token logits (B, V) from token ids (B, 1); the next call overwrites them."""
        self.ids.copy_(ids)
        return self._step()

    def _forward(self) -> Tensor:
        device = self.ids.device.type
        self.mask.index_fill_(3, self.write_index, True)
        # Weights cached by autocast would be freed after the capture.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            logits = self._compute(self.model, self.head, self.ids, self.mask, self.position_ids, self.cache)
        self.write_index += 1
        self.position_ids += 1
        return logits


def _decode_logits(
    model: GPT2,
    head: Callable[[Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    cache: KVCache,
) -> Tensor:
    """Compute the next-token logits (B, V) of one token per row; arguments are those of :class:`DecodeStep`."""
    return head(model(ids, mask, position_ids=position_ids, cache=cache)[:, -1])


@functools.cache
def _compiled_logits() -> Callable[..., Tensor]:
    return torch.compile(_decode_logits)


@contextmanager
def decoding_mode(model: GPT2, max_new_tokens: int, compiled: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
    """Enter inference mode and the evaluation mode of a model, with prepacked weights if these pay off.

    The code of a model that is compiled as a whole is not used: it would be compiled again for every number of tokens.
    Compiled decoding steps read the weights as they are.

    Args:
        model: the GPT-2.
        max_new_tokens: maximum number of generated tokens.
        compiled: whether decoding steps are compiled.

    Yields:
        The language-model head, which maps hidden states (B, C) to logits (B, V).
    """
    was_training = model.training
    model.eval()
    leaves_graph = model._compiled_call_impl is not None and not compiled
    try:
        with (
            torch.compiler.set_stance("force_eager") if leaves_graph else nullcontext(),
            torch.inference_mode(),
            prepacked_weights(model.h, lambda: model.head_weight, 0 if compiled else max_new_tokens) as head,
        ):
            yield head
    finally:
        model.train(was_training)


def validate_processors(repetition_penalty: float, no_repeat_ngram_size: int) -> None:
    """Check the settings of :func:`builtin_processors`.

    Raises:
        InputError: a setting is out of range.
    """
    low, high = DIVISORS
    require(low <= repetition_penalty <= high, "repetition_penalty", repetition_penalty, f"in [{low:g}, {high:g}]")
    require(no_repeat_ngram_size >= 0, "no_repeat_ngram_size", no_repeat_ngram_size, "at least 0")


def builtin_processors(repetition_penalty: float, no_repeat_ngram_size: int) -> list[LogitsProcessor]:
    """Return the logits processors of the settings that are not at their neutral value."""
    processors: list[LogitsProcessor] = []
    if repetition_penalty != 1.0:
        processors.append(partial(_apply_repetition_penalty, penalty=repetition_penalty))
    if no_repeat_ngram_size:
        processors.append(partial(_ban_repeated_ngrams, n=no_repeat_ngram_size))
    return processors


def _apply_repetition_penalty(logits: Tensor, ids: Tensor, mask: Tensor, penalty: float) -> Tensor:
    # Occurrences are counted under the mask, because the padding token may also occur in the text.
    occurs = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, ids, mask) > 0
    return torch.where(occurs, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _ban_repeated_ngrams(logits: Tensor, ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Set the logit of every token that would complete an n-gram of the row again to -inf."""
    if ids.size(1) < n:
        return logits
    windows = ids.unfold(1, n, 1)  # (B, N - n + 1, n)
    last = ids[:, ids.size(1) - n + 1 :]  # (B, n - 1): the tokens before the next one
    same = (windows[..., :-1] == last.unsqueeze(1)).all(-1) & mask.unfold(1, n, 1).bool().all(-1)
    banned = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, windows[..., -1], same.long()) > 0
    return logits.masked_fill(banned, -torch.inf)
