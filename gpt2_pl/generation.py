"""Autoregressive generation with a key/value cache: greedy decoding, temperature, top-k and top-p sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_pl.errors import InputError, require
from gpt2_pl.kernels.cuda_graph import cuda_graph, supports_cuda_graph
from gpt2_pl.kernels.prepacked_linear import prepacked_weights
from gpt2_pl.kv_cache import KVCache

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2


LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps logits (B, V), token ids so far (B, N) and their mask (B, N), 1 for text, to new logits (B, V)."""


def generate(
    model: GPT2,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    seed: int | Sequence[int] | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    stopping_criteria: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Continue a batch of prompts token by token, with a key/value cache.

    Args:
        model: a GPT-2, with or without LoRA, prefix or soft prompt. It is in evaluation mode during the call. On a GPU,
            models in evaluation mode decode from a CUDA graph, which is faster.
        input_ids: (B, T) prompts.
        attention_mask: (B, T), 1 for text and 0 for padding, on either side.
        max_new_tokens: maximum number of generated tokens.
        temperature: divisor of the logits, in [1e-9, 1e9]; 0 is greedy decoding.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the smallest set of most probable tokens whose probabilities sum to at least this value, in
            (0, 1] (Holtzman et al. 2020).
        repetition_penalty: divisor of positive logits and factor of negative logits of tokens that already occur in the
            row, in [1e-9, 1e9] (Keskar et al. 2019).
        no_repeat_ngram_size: no n-gram of this length occurs twice in a row; 0 disables the rule. If this rule or a
            processor bans every token, the row ends and is padded.
        eos_token_id: token that ends a row; it is part of the row.
        pad_token_id: token that follows the end of a row.
        seed: seed of the random draws, one for all rows or one per row. In float32 a row's text depends on its prompt
            and seed only, not on the other rows. In bfloat16 the rounding of logits depends on the batch shape, which
            may change a draw. None uses torch's default generator.
        logits_processors: change the logits before temperature, top-k and top-p, in inference mode.
        stopping_criteria: maps ids (B, N) and mask (B, N) to booleans (B,), True for rows that end, in inference mode.

    Returns:
        (B, T + new): the prompts, padded on the left, followed by the generated tokens.

    Raises:
        InputError: a setting is out of range, a prompt is empty, or there are more tokens than ``n_positions``.
    """
    validate_sampling(temperature, max_new_tokens, top_k, top_p, repetition_penalty, no_repeat_ngram_size)
    B, T = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    _validate_prompts(mask, model.n_virtual + T + max_new_tokens, model.config.n_positions)
    if attention_mask is not None:  # on the left, so that all rows continue at the same index
        order = mask.argsort(dim=1, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    uniform = _uniform(seed, B, max_new_tokens, input_ids.device) if temperature > 0 else None
    ids = input_ids.new_full((B, T + max_new_tokens), pad_token_id)
    ids[:, :T] = input_ids
    mask = torch.cat([mask, mask.new_ones(B, max_new_tokens)], dim=1)
    done = torch.zeros(B, dtype=torch.bool, device=ids.device)
    processors = [*_builtin_processors(repetition_penalty, no_repeat_ngram_size), *logits_processors]
    captures = supports_cuda_graph(model, max_new_tokens)
    prepacked = prepacked_weights(model.h, lambda: model.head_weight, max_new_tokens)
    with torch.inference_mode(), _eval_mode(model), prepacked as head:
        for n, logits in enumerate(_next_logits(model, head, ids, mask, T, captures), start=T):
            for process in processors:
                logits = process(logits, ids[:, :n], mask[:, :n])
            draws = None if uniform is None else uniform[:, n - T]
            chosen, exhausted = _choose_tokens(logits, draws, temperature, top_k, top_p)
            done |= exhausted
            ids[:, n] = torch.where(done, pad_token_id, chosen)
            mask[:, n] = (~done).long()
            if eos_token_id is not None:
                done |= chosen == eos_token_id
            if stopping_criteria is not None:
                done |= stopping_criteria(ids[:, : n + 1], mask[:, : n + 1])
            if bool(done.all()):
                return ids[:, : n + int(mask[:, n].any())]
    return ids


def _validate_prompts(mask: Tensor, num_tokens: int, n_positions: int) -> None:
    """Raise an InputError for an empty prompt or for more than ``n_positions`` tokens.

    Args:
        mask: (B, T), 1 for text and 0 for padding.
        num_tokens: virtual tokens, prompt and generated tokens.
        n_positions: the context length of the model.
    """
    if not bool((mask.sum(1) > 0).all()):
        raise InputError("a prompt is empty; give at least one token, such as the end of text")
    expected = f"at most n_positions = {n_positions} tokens, virtual tokens included"
    require(num_tokens <= n_positions, "prompt and continuation", num_tokens, expected)


def _builtin_processors(repetition_penalty: float, no_repeat_ngram_size: int) -> list[LogitsProcessor]:
    """Return the logits processors of the settings that are not at their neutral value."""
    processors: list[LogitsProcessor] = []
    if repetition_penalty != 1.0:
        processors.append(partial(_apply_repetition_penalty, penalty=repetition_penalty))
    if no_repeat_ngram_size:
        processors.append(partial(_ban_repeated_ngrams, n=no_repeat_ngram_size))
    return processors


def _next_logits(
    model: GPT2, head: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor, prompt_length: int, captures: bool
) -> Iterator[Tensor]:
    """Yield the next-token logits of all rows: of the prompts in one pass, then of one token at a time.

    Args:
        model: the GPT-2, in evaluation mode.
        head: maps hidden states (B, C) to logits (B, V).
        ids: (B, T + new) token ids; before it asks for more logits, the caller writes the token that it chose.
        mask: (B, T + new), 1 for text and 0 for padding; the caller extends it likewise.
        prompt_length: T.
        captures: whether tokens after the prompt are decoded from a CUDA graph.

    Yields:
        (B, V) in float32, ``new`` times.
    """
    T, (B, N) = prompt_length, ids.shape
    padded = not bool(mask[:, :T].all())
    cache = KVCache(len(model.h), model.n_virtual + N)
    last = torch.full((B, 1), T - 1, device=ids.device)
    hidden = model(ids[:, :T], mask[:, :T] if padded else None, output_positions=last, cache=cache)
    yield head(hidden[:, -1]).float()
    decode = DecodeStep(model, head, cache, mask[:, :T]) if captures else None
    for n in range(T + 1, N):
        if decode is not None:
            yield decode(ids[:, n - 1 : n]).to(torch.float32, copy=True)
        else:
            hidden = model(ids[:, n - 1 : n], mask[:, :n] if padded else None, cache=cache)
            yield head(hidden[:, -1]).float()


def _choose_tokens(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """Choose the next token of every row.

    Args:
        logits: (B, V).
        uniform: (B,) random numbers in [0, 1); None for greedy decoding.
        temperature: as in :func:`generate`.
        top_k: as in :func:`generate`.
        top_p: as in :func:`generate`.

    Returns:
        Token ids (B,), and booleans (B,), True for rows in which every token is banned.
    """
    best = logits.amax(-1, keepdim=True)
    exhausted = best.isneginf()  # (B, 1)
    if uniform is None:
        chosen = logits.argmax(-1)
    else:  # the maximum is subtracted, because the division could overflow
        scaled = (logits - best).masked_fill(exhausted, 0.0) / temperature
        chosen = _sample_tokens(scaled, uniform, top_k, top_p)
    return chosen, exhausted.squeeze(-1)


class DecodeStep:
    """Decoding step of one token per row in tensors of fixed shape, captured as a CUDA graph on a GPU.

    Attention reads the full cache buffers under a mask.

    Args:
        model: the GPT-2, in evaluation mode.
        head: maps hidden states (B, C) to logits (B, V).
        cache: the keys and values of the virtual tokens and the prompt.
        prompt_mask: (B, T), 1 for text and 0 for padding.
    """

    def __init__(self, model: GPT2, head: Callable[[Tensor], Tensor], cache: KVCache, prompt_mask: Tensor) -> None:
        self.model, self.head, self.cache = model, head, cache
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
        self._step = cuda_graph(self._forward, state) if prompt_mask.device.type == "cuda" else self._forward

    def __call__(self, ids: Tensor) -> Tensor:
        """Compute the next-token logits (B, V) from token ids (B, 1); the next call overwrites them."""
        self.ids.copy_(ids)
        return self._step()

    def _forward(self) -> Tensor:
        device = self.ids.device.type
        self.mask.index_fill_(3, self.write_index, True)
        # Weights cached by autocast would be freed after the capture.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            hidden = self.model(self.ids, self.mask, position_ids=self.position_ids, cache=self.cache)
            logits = self.head(hidden[:, -1])
        self.write_index += 1
        self.position_ids += 1
        return logits


@contextmanager
def _eval_mode(model: GPT2) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def validate_sampling(
    temperature: float,
    max_new_tokens: int,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> None:
    """Check the sampling settings of :func:`generate`.

    Raises:
        InputError: a setting is out of range.
    """
    low, high = 1e-9, 1e9  # range of divisors of float32 logits
    is_temperature, is_penalty = temperature == 0 or low <= temperature <= high, low <= repetition_penalty <= high
    require(is_temperature, "temperature", temperature, f"0 or in [{low:g}, {high:g}]")
    require(top_k is None or top_k >= 1, "top_k", top_k, "at least 1")
    require(top_p is None or 0.0 < top_p <= 1.0, "top_p", top_p, "in (0, 1]")
    require(is_penalty, "repetition_penalty", repetition_penalty, f"in [{low:g}, {high:g}]")
    require(no_repeat_ngram_size >= 0, "no_repeat_ngram_size", no_repeat_ngram_size, "at least 0")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")


def _uniform(seed: int | Sequence[int] | None, rows: int, steps: int, device: torch.device) -> Tensor:
    """Draw one random number in [0, 1) for each new token of each row, (B, new), equal on all devices."""
    if seed is None:
        return torch.rand(rows, steps).to(device)
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    require(len(seeds) == rows, "seed", seeds, f"one number or one for each of {rows} prompts")
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)


def top_k_top_p_filter(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """Sort tokens by probability and keep the most probable ones by top-k, then top-p.

    Top-p keeps the smallest number of tokens whose probabilities sum to at least ``top_p``: the token that crosses the
    threshold is kept. Among equally probable tokens the smaller id comes first.

    Args:
        logits: (B, V).
        top_k: number of tokens to keep; None for all.
        top_p: probability to keep, relative to the tokens that ``top_k`` keeps; None for all.

    Returns:
        Probabilities (B, M) in descending order, 0 for tokens that top-p removes, and token ids (B, M).
    """
    probability, tokens = _sort_descending(logits.softmax(-1))
    if top_k is not None:
        probability, tokens = probability[:, :top_k], tokens[:, :top_k]
        probability = probability / probability.sum(-1, keepdim=True)
    if top_p is not None:
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
    return probability, tokens


def _sort_descending(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Sort probabilities (B, V) like ``probability.sort(descending=True, stable=True)``, 8 times faster on a CPU.

    PyTorch uses radix sort for a single long row of integers. Non-negative floats have the order of their bits.
    """
    if probability.device.type != "cpu":
        return probability.sort(dim=-1, descending=True, stable=True)
    bits = -probability.view(torch.int32)
    values, tokens = zip(*(row.sort(stable=True) for row in bits), strict=True)
    return (-torch.stack(values)).view(torch.float32), torch.stack(tokens)


def _sample_tokens(logits: Tensor, uniform: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Draw one token per row (B,) from its logits (B, V) and its random number in [0, 1), (B,)."""
    if top_k is None and (top_p is None or top_p == 1.0):
        return _inverse_cdf(logits.softmax(-1), uniform)
    probability, tokens = top_k_top_p_filter(logits, top_k, top_p)
    return tokens.gather(-1, _inverse_cdf(probability, uniform).unsqueeze(-1)).squeeze(-1)


def _inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index (B,) whose cumulative probability exceeds ``uniform * total``.

    Args:
        probability: (B, M), not necessarily normalized.
        uniform: (B,) random numbers in [0, 1).
    """
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True)
    return torch.minimum(index, torch.searchsorted(cumulative, total)).squeeze(-1)  # the product may round up to total


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
