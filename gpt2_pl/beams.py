"""Beam search: the most probable continuations of a batch of prompts, with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from gpt2_pl.decoding import (
    LogitsProcessor,
    builtin_processors,
    decoding_mode,
    next_logits,
    pad_left,
    validate_processors,
)
from gpt2_pl.errors import require
from gpt2_pl.kernels.cuda_graph import supports_cuda_graph
from gpt2_pl.kv_cache import KVCache

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2

EarlyStopping = bool | Literal["never"]


class Beams(NamedTuple):
    """Finished beams of every prompt, from the highest to the lowest score; all of a prompt's beams differ.

    Args:
        ids: (B, K, T + new) the prompts, padded on the left, followed by the generated tokens.
        scores: (B, K), sum(log p) / length^alpha; -inf for a place without a beam.
    """

    ids: Tensor
    scores: Tensor


def beam_search(
    model: GPT2,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    logits_processors: Sequence[LogitsProcessor] = (),
    stopping_criteria: Callable[[Tensor, Tensor], Tensor] | None = None,
    compiled: bool = False,
) -> Beams:
    """Continue a batch of prompts by beam search, with the results of ``generate(num_beams=K)`` of transformers.

    In each step, the K unfinished beams of a prompt are extended by every token, and the 2 K most probable extensions
    are candidates. Those among the first K that end are finished, with the score ``sum(log p) / length^alpha`` (Wu et
    al. 2016, without their constants) of the generated tokens, the end of text included. The first K that do not end
    are the next beams. The K finished beams with the highest scores are kept.

    Args:
        model: a GPT-2, with or without adapters; see :func:`~gpt2_pl.generation.generate`.
        input_ids: (B, T) prompts.
        attention_mask: (B, T), 1 for text and 0 for padding, on either side.
        num_beams: number of beams K; 1 is greedy decoding.
        max_new_tokens: maximum number of generated tokens; beams of this length are finished.
        length_penalty: the exponent alpha, in [-10, 10]; higher values favour longer texts.
        early_stopping: when the search for a prompt ends. True: as soon as K beams are finished. False: when, in
            addition, the most probable unfinished beam would have no higher score than these if it ended now.
            ``"never"``: when it could not have a higher score at any length.
        repetition_penalty: as in :func:`~gpt2_pl.generation.generate`, applied to the log-probabilities.
        no_repeat_ngram_size: as in :func:`~gpt2_pl.generation.generate`. A beam whose tokens are all banned ends.
        eos_token_id: token that ends a beam; it is part of the beam.
        pad_token_id: token that follows the end of a beam.
        logits_processors: change the log-probabilities (B * K, V), in inference mode.
        stopping_criteria: maps ids (B * 2 K, N) and mask (B * 2 K, N) of the candidates to booleans (B * 2 K,), True
            for candidates that end, in inference mode.
        compiled: as in :func:`~gpt2_pl.generation.generate`.

    Returns:
        The finished beams. ``ids[:, 0]`` are the best ones.

    Raises:
        InputError: a setting is out of range, a prompt is empty, or there are more tokens than ``n_positions``.
    """
    validate_beams(num_beams, max_new_tokens, length_penalty, early_stopping)
    validate_processors(repetition_penalty, no_repeat_ngram_size)
    prompts, mask = pad_left(model, input_ids, attention_mask, max_new_tokens)
    (B, T), K = prompts.shape, num_beams
    ids = prompts.new_full((B * K, T + max_new_tokens), pad_token_id)
    ids[:, :T] = prompts.repeat_interleave(K, dim=0)
    mask = torch.cat([mask, mask.new_ones(B, max_new_tokens)], dim=1).repeat_interleave(K, dim=0)
    processors = [*builtin_processors(repetition_penalty, no_repeat_ngram_size), *logits_processors]
    cache = KVCache(len(model.h), model.n_virtual + T + max_new_tokens)
    captures = supports_cuda_graph(model, max_new_tokens)
    finished = _FinishedBeams(ids.view(B, K, -1), T, length_penalty, early_stopping)
    first = torch.arange(B, device=ids.device).unsqueeze(1) * K  # (B, 1): the first row of each prompt
    totals = torch.full((B, K), -torch.inf, device=ids.device)  # sum(log p) of unfinished beams; -inf without a beam
    totals[:, 0] = 0.0
    with decoding_mode(model, max_new_tokens, compiled) as head:
        for n, logits in enumerate(next_logits(model, head, ids, mask, T, cache, captures, K, compiled), start=T):
            log_p = logits.log_softmax(-1)
            for process in processors:
                log_p = process(log_p, ids[:, :n], mask[:, :n])
            log_p = log_p.view(B, K, -1)
            if processors:
                is_open = ~log_p.amax(-1).isneginf()  # (B, K)
                finished.add(ids.view(B, K, -1), totals.masked_fill(is_open, -torch.inf), n - T)
            sums, indices = (totals.unsqueeze(-1) + log_p).flatten(1).topk(min(2 * K, K * log_p.size(-1)))
            parents, tokens = first + indices // log_p.size(-1), indices % log_p.size(-1)  # (B, 2 K)
            candidates = ids[parents]  # (B, 2 K, T + new)
            candidates[..., n] = tokens
            ended = torch.full_like(tokens, n + 1 == ids.size(1), dtype=torch.bool)
            if eos_token_id is not None:
                ended |= tokens == eos_token_id
            if stopping_criteria is not None:
                texts = candidates[..., : n + 1].flatten(0, 1), mask[parents, : n + 1].flatten(0, 1)
                ended |= stopping_criteria(*texts).view_as(ended)
            finished.add(candidates[:, :K], sums[:, :K].masked_fill(~ended[:, :K], -torch.inf), n + 1 - T)
            totals, kept = sums.masked_fill(ended, -torch.inf).topk(K)
            if finished.close(totals[:, 0], n + 1 - T):
                break
            ids.copy_(candidates.gather(1, kept.unsqueeze(-1).expand(-1, -1, ids.size(1))).flatten(0, 1))
            cache.reorder(parents.gather(1, kept).flatten(), model.n_virtual + T)
    length = T + int(finished.lengths.max())
    return Beams(finished.ids[..., :length].clone(), finished.scores.clone())


class _FinishedBeams:
    """The best finished beams of every prompt.

    Args:
        ids: (B, K, T + new) padded prompts, which take the places without a beam.
        prompt_length: T.
        length_penalty: as in :func:`beam_search`.
        early_stopping: as in :func:`beam_search`.

    Attributes:
        ids: (B, K, T + new).
        scores: (B, K) in descending order; -inf for a place without a beam.
        lengths: (B, K), numbers of generated tokens.
    """

    def __init__(self, ids: Tensor, prompt_length: int, length_penalty: float, early_stopping: EarlyStopping) -> None:
        self.ids, self.max_new_tokens = ids.clone(), ids.size(-1) - prompt_length
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.scores = torch.full(ids.shape[:2], -torch.inf, device=ids.device)
        self.lengths = torch.zeros(ids.shape[:2], dtype=torch.long, device=ids.device)
        self._is_closed = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)  # prompts without a search

    def _score(self, totals: Tensor, length: int) -> Tensor:
        return totals / max(length, 1) ** self.length_penalty

    def add(self, ids: Tensor, totals: Tensor, length: int) -> None:
        """Add beams (B, K, T + new) with log-probabilities (B, K), -inf for those that have not ended, and a length."""
        new = self._score(totals, length).masked_fill(self._is_closed, -torch.inf)
        if bool(new.isneginf().all()):
            return
        self.scores, kept = torch.cat([self.scores, new], dim=1).topk(self.scores.size(1))
        self.lengths = torch.cat([self.lengths, torch.full_like(kept, length)], dim=1).gather(1, kept)
        self.ids = torch.cat([self.ids, ids], dim=1).gather(1, kept.unsqueeze(-1).expand(-1, -1, ids.size(-1)))

    def close(self, best: Tensor, length: int) -> bool:
        """End the search for the prompts whose finished beams cannot be improved.

        Args:
            best: (B,) the highest log-probability of an unfinished beam; -inf without one.
            length: its length.

        Returns:
            Whether the search for all prompts has ended.
        """
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        is_full = ~self.scores[:, -1:].isneginf()
        is_worse = self._score(best.unsqueeze(1), length) <= self.scores[:, -1:]
        self._is_closed |= best.isneginf().unsqueeze(1) | (is_full & (is_worse | (self.early_stopping is True)))
        return bool(self._is_closed.all())


def validate_beams(
    num_beams: int, max_new_tokens: int, length_penalty: float = 1.0, early_stopping: EarlyStopping = False
) -> None:
    """Check the settings of :func:`beam_search`.

    Raises:
        InputError: a setting is out of range.
    """
    require(num_beams >= 1, "num_beams", num_beams, "at least 1")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(-10.0 <= length_penalty <= 10.0, "length_penalty", length_penalty, "in [-10, 10]")
    require(early_stopping in (True, False, "never"), "early_stopping", early_stopping, 'true, false or "never"')
