"""Autoregressive generation with a key/value cache: greedy decoding, temperature, top-k and top-p sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_pl.decoding import (
    DIVISORS,
    LogitsProcessor,
    builtin_processors,
    decoding_mode,
    next_logits,
    pad_left,
    validate_processors,
)
from gpt2_pl.errors import require
from gpt2_pl.kernels.cuda_graph import cuda_graph, supports_cuda_graph
from gpt2_pl.kv_cache import KVCache

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2

CHECK_INTERVAL = {"cuda": 8}  # number of tokens after which a device is asked whether all rows have ended; else 1


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
    compiled: bool = False,
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
            On a GPU it may be called up to seven times after all rows have ended, so that few tokens wait for the GPU.
        compiled: compile the step that decodes one token per row with ``torch.compile``, for the first shape and then
            for any number of rows and tokens. This takes up to a minute, and pays off on a GPU for many prompts.

    Returns:
        (B, T + new): the prompts, padded on the left, followed by the generated tokens.

    Raises:
        InputError: a setting is out of range, a prompt is empty, or there are more tokens than ``n_positions``.
    """
    validate_sampling(temperature, max_new_tokens, top_k, top_p, repetition_penalty, no_repeat_ngram_size)
    input_ids, mask = pad_left(model, input_ids, attention_mask, max_new_tokens)
    B, T = input_ids.shape
    uniform = _uniform(seed, B, max_new_tokens, input_ids.device) if temperature > 0 else None
    ids = input_ids.new_full((B, T + max_new_tokens), pad_token_id)
    ids[:, :T] = input_ids
    mask = torch.cat([mask, mask.new_ones(B, max_new_tokens)], dim=1)
    done = torch.zeros(B, dtype=torch.bool, device=ids.device)
    processors = [*builtin_processors(repetition_penalty, no_repeat_ngram_size), *logits_processors]
    cache = KVCache(len(model.h), model.n_virtual + T + max_new_tokens)
    captures = supports_cuda_graph(model, max_new_tokens)
    choose = TokenChoice(temperature, top_k, top_p, captures)
    check_interval = CHECK_INTERVAL.get(ids.device.type, 1)
    can_end = bool(processors) or eos_token_id is not None or stopping_criteria is not None
    with decoding_mode(model, max_new_tokens, compiled) as head:
        for n, logits in enumerate(next_logits(model, head, ids, mask, T, cache, captures, compiled=compiled), start=T):
            for process in processors:
                logits = process(logits, ids[:, :n], mask[:, :n])
            draws = None if uniform is None else uniform[:, n - T]
            chosen, exhausted = choose(logits, draws)
            done |= exhausted
            ids[:, n] = torch.where(done, pad_token_id, chosen)
            mask[:, n] = (~done).long()
            if eos_token_id is not None:
                done |= chosen == eos_token_id
            if stopping_criteria is not None:
                done |= stopping_criteria(ids[:, : n + 1], mask[:, : n + 1])
            if can_end and (n - T + 1) % check_interval == 0 and bool(done.all()):
                break
    num_new = int(mask[:, T : n + 1].any(0).sum())  # the last columns are empty if all rows ended before
    return ids[:, : T + num_new]


class TokenChoice:
    """Choice of the next token of every row, captured as a CUDA graph on a GPU.

    Args:
        temperature: as in :func:`generate`.
        top_k: as in :func:`generate`.
        top_p: as in :func:`generate`.
        captures: whether the choice is called with tensors of one shape, and captured on a GPU.
    """

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, captures: bool) -> None:
        self._settings, self._captures = (temperature, top_k, top_p), captures
        self._inputs: list[Tensor] = []  # logits (B, V) and, for sampling, random numbers (B,)
        self._choose: Callable[[], tuple[Tensor, Tensor]] | None = None

    def __call__(self, logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Choose tokens as :func:`_choose_tokens` does; the next call may overwrite the result."""
        if not self._captures:
            return _choose_tokens(logits, uniform, *self._settings)
        inputs = [logits] if uniform is None else [logits, uniform]
        if self._choose is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            choose = self._choose_from_inputs
            self._choose = cuda_graph(choose, self._inputs) if logits.device.type == "cuda" else choose
        for target, source in zip(self._inputs, inputs, strict=True):
            target.copy_(source)
        return self._choose()

    def _choose_from_inputs(self) -> tuple[Tensor, Tensor]:
        logits, uniform = (*self._inputs, None)[:2]
        assert logits is not None
        return _choose_tokens(logits, uniform, *self._settings)


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
    low, high = DIVISORS
    is_temperature = temperature == 0 or low <= temperature <= high
    require(is_temperature, "temperature", temperature, f"0 or in [{low:g}, {high:g}]")
    require(top_k is None or top_k >= 1, "top_k", top_k, "at least 1")
    require(top_p is None or 0.0 < top_p <= 1.0, "top_p", top_p, "in (0, 1]")
    validate_processors(repetition_penalty, no_repeat_ngram_size)
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
