"""Generation: continuing text, at one token's work for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_pl.kernels.cuda_graph import cuda_graph, supports_cuda_graph
from gpt2_pl.kernels.prepacked_linear import prepacked_weights
from gpt2_pl.kv_cache import KVCache

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2


LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (B, V), token ids so far (B, N) and which of them are text (B, N) -> logits (B, V)."""


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
    """Continue a batch of prompts, one token at a time, every block keeping the keys and values it has computed.

    Args:
        model: a GPT-2, with or without LoRA, prefix or soft prompt; it is put in evaluation mode meanwhile. On a GPU
            a model in evaluation mode decodes from a CUDA graph, which is faster.
        input_ids: (B, T) prompts.
        attention_mask: (B, T), 1 for text and 0 for padding, on either side.
        max_new_tokens: the longest continuation.
        temperature: divides the logits, from 1e-9 to 1e9; 0 is greedy.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together have at least this probability (Holtzman et al. 2020).
        repetition_penalty: divides positive logits of tokens already there and multiplies negative ones (Keskar et al.
            2019).
        no_repeat_ngram_size: no n-gram of this length occurs twice; 0 for any. Where this, or a processor, leaves a
            row no token at all, the row ends: it is padded from there on.
        eos_token_id: ends a row; it is part of the row.
        pad_token_id: what stands behind a row that has ended.
        seed: of the random draws, the same for every row or one for each. In float32, a row's text depends on its
            prompt and its seed alone, not on the other rows; in bfloat16, logits are rounded differently in batches of
            other shapes, which may tip a draw. None draws from torch's own generator.
        logits_processors: change the logits before temperature, top-k and top-p. They are called in inference mode.
        stopping_criteria: maps ids (B, N) and mask (B, N) to booleans (B,), True for rows that end. It is called in
            inference mode.

    Returns:
        (B, T + new): the prompts, padded on the left, and what was generated.

    Raises:
        ValueError: a value out of range, an empty prompt, or more tokens than ``n_positions``.
    """
    validate_sampling(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size, max_new_tokens)
    B, T = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if not bool((mask.sum(1) > 0).all()):
        raise ValueError("a prompt is empty; give at least one token, such as the end of text")
    N = model.n_virtual + T + max_new_tokens
    if model.config.n_positions < N:
        raise ValueError(
            f"prompt and continuation take {N} tokens, virtual ones included; this GPT-2 has n_positions = "
            f"{model.config.n_positions}"
        )
    if attention_mask is not None:  # text to the right, so that all rows go on at the same place
        order = mask.argsort(dim=1, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    uniform = _uniform(seed, B, max_new_tokens, input_ids.device) if temperature > 0 else None
    padded = not bool(mask.all())
    ids = input_ids.new_full((B, T + max_new_tokens), pad_token_id)
    ids[:, :T] = input_ids
    mask = torch.cat([mask, mask.new_ones(B, max_new_tokens)], dim=1)
    done = torch.zeros(B, dtype=torch.bool, device=ids.device)
    cache = KVCache(len(model.h), N)
    captures, decode = supports_cuda_graph(model, max_new_tokens), None
    prepacked = prepacked_weights(model.h, lambda: model.head_weight, max_new_tokens)
    with torch.inference_mode(), _eval_mode(model), prepacked as head:
        next_ids = ids[:, :T]
        output_positions: Tensor | None = torch.full((B, 1), T - 1, device=ids.device)
        for n in range(T, T + max_new_tokens):
            if decode is None:
                hidden = model(
                    next_ids, mask[:, :n] if padded else None, output_positions=output_positions, cache=cache
                )
                logits = head(hidden[:, -1]).float()
                if captures:
                    decode = DecodeStep(model, head, cache, mask[:, :T])
            else:
                logits = decode(next_ids).to(torch.float32, copy=True)
            row_ids, row_mask = ids[:, :n], mask[:, :n]
            if repetition_penalty != 1.0:
                logits = _apply_repetition_penalty(logits, row_ids, row_mask, repetition_penalty)
            if no_repeat_ngram_size:
                logits = _ban_repeated_ngrams(logits, row_ids, row_mask, no_repeat_ngram_size)
            for process in logits_processors:
                logits = process(logits, row_ids, row_mask)
            best = logits.amax(-1, keepdim=True)
            exhausted = best.isneginf()  # (B, 1): no token may follow
            if uniform is None:
                chosen = logits.argmax(-1)
            else:  # without the maximum, whose row would overflow or be NaN
                scaled = (logits - best).masked_fill(exhausted, 0.0) / temperature
                chosen = _sample_tokens(scaled, uniform[:, n - T], top_k, top_p)
            done |= exhausted.squeeze(-1)
            ids[:, n] = torch.where(done, pad_token_id, chosen)
            mask[:, n] = (~done).long()
            if eos_token_id is not None:
                done |= chosen == eos_token_id
            if stopping_criteria is not None:
                done |= stopping_criteria(ids[:, : n + 1], mask[:, : n + 1])
            if bool(done.all()):
                return ids[:, : n + int(mask[:, n].any())]
            next_ids, output_positions = ids[:, n : n + 1], None
    return ids


class DecodeStep:
    """Read one more token of every row in tensors of fixed shape, from a CUDA graph where the model is on a GPU.

    Attention reads the whole cache, under a mask.

    Args:
        model: the GPT-2, in evaluation mode.
        head: from hidden states (B, C) to logits (B, V).
        cache: the keys and values of the virtual tokens and the prompt.
        prompt_mask: (B, T), 1 for text and 0 for padding.
    """

    def __init__(self, model: GPT2, head: Callable[[Tensor], Tensor], cache: KVCache, prompt_mask: Tensor) -> None:
        self.model, self.head, self.cache = model, head, cache
        B, T = prompt_mask.shape
        start = model.n_virtual
        self.ids = prompt_mask.new_zeros(B, 1)
        self.write_index = prompt_mask.new_full((1,), start + T)  # among the keys of the cache
        self.position_ids = prompt_mask.sum(1, keepdim=True) + start  # (B, 1)
        self.mask = prompt_mask.new_zeros(B, 1, 1, cache.layers[0].capacity, dtype=torch.bool)
        self.mask[..., :start] = True
        self.mask[..., start : start + T] = prompt_mask.bool()[:, None, None]
        for layer in cache.layers:
            layer.write_index = self.write_index
        state = (self.write_index, self.position_ids, self.mask)
        self._step = cuda_graph(self._forward, state) if prompt_mask.device.type == "cuda" else self._forward

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids (B, 1) -> logits of the next tokens (B, V), which the next call overwrites."""
        self.ids.copy_(ids)
        return self._step()

    def _forward(self) -> Tensor:
        device = self.ids.device.type
        self.mask.index_fill_(3, self.write_index, True)
        # weights that autocast has cached would not outlive the capture
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
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    max_new_tokens: int,
) -> None:
    """Raise a ValueError that names the first setting of :func:`generate` that is out of range."""
    least, most = 1e-9, 1e9  # by which float32 logits can be divided
    for name, value, good, right in (
        ("temperature", temperature, temperature == 0 or least <= temperature <= most, f"0 or from {least} to {most}"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "in (0, 1]"),
        ("repetition_penalty", repetition_penalty, least <= repetition_penalty <= most, f"from {least} to {most}"),
        ("no_repeat_ngram_size", no_repeat_ngram_size, no_repeat_ngram_size >= 0, "at least 0"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
    ):
        if not good:
            raise ValueError(f"{name} is {value}, which is out of range; it must be {right}")


def _uniform(seed: int | Sequence[int] | None, rows: int, steps: int, device: torch.device) -> Tensor:
    """The random numbers that decide each token of each row (B, new), the same on every device."""
    if seed is None:
        return torch.rand(rows, steps).to(device)
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"there are {len(seeds)} seeds for {rows} prompts; give one, or one for each")
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)


def top_k_top_p_filter(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """Sort tokens by probability and keep the first of them, as top-k and top-p say.

    Of the ``top_k`` likeliest tokens top-p keeps as many as it takes to reach ``top_p``, including the one that crosses
    it. Of equally likely tokens the smaller id comes first.

    Args:
        logits: (B, V).
        top_k: number of tokens to keep.
        top_p: probability to keep, of what ``top_k`` leaves.

    Returns:
        Probabilities (B, M) in descending order, 0 for tokens that are not kept, and the tokens' ids (B, M).
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
    """``probability.sort(descending=True, stable=True)`` of (B, V), in an eighth of the time on a CPU.

    PyTorch sorts a single long row of integers by radix, and the order of non-negative floats is that of their bits.
    """
    if probability.device.type != "cpu":
        return probability.sort(dim=-1, descending=True, stable=True)
    bits = -probability.view(torch.int32)
    values, tokens = zip(*(row.sort(stable=True) for row in bits), strict=True)
    return (-torch.stack(values)).view(torch.float32), torch.stack(tokens)


def _sample_tokens(logits: Tensor, uniform: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Draw one token a row (B,), from its logits (B, V) and its random number in [0, 1) (B,) alone."""
    if top_k is None and (top_p is None or top_p == 1.0):
        return _inverse_cdf(logits.softmax(-1), uniform)
    probability, tokens = top_k_top_p_filter(logits, top_k, top_p)
    return tokens.gather(-1, _inverse_cdf(probability, uniform).unsqueeze(-1)).squeeze(-1)


def _inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """The first place (B,) where the cumulative sum of ``probability`` (B, M) passes ``uniform`` (B,) of its total."""
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True)
    return torch.minimum(place, torch.searchsorted(cumulative, total)).squeeze(-1)  # the product may round up to total


def _apply_repetition_penalty(logits: Tensor, ids: Tensor, mask: Tensor, penalty: float) -> Tensor:
    # A count decides: the padding's token may be one of the text's too.
    there = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, ids, mask) > 0
    return torch.where(there, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _ban_repeated_ngrams(logits: Tensor, ids: Tensor, mask: Tensor, n: int) -> Tensor:
    """Logits of -inf for every token that would end an n-gram which the row has already."""
    if ids.size(1) < n:
        return logits
    windows = ids.unfold(1, n, 1)  # (B, N - n + 1, n)
    last = ids[:, ids.size(1) - n + 1 :]  # (B, n - 1): what the next token would follow
    same = (windows[..., :-1] == last.unsqueeze(1)).all(-1) & mask.unfold(1, n, 1).bool().all(-1)
    banned = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, windows[..., -1], same.long()) > 0
    return logits.masked_fill(banned, -torch.inf)
