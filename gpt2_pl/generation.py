"""Generation: continuing text, at one token's work for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2_pl.packing import packed
from gpt2_pl.recording import RecordedPass, can_be_recorded

if TYPE_CHECKING:
    from gpt2_pl.model import GPT2


class LayerCache:
    """Keys and values of one block, in buffers allocated once, at the first tokens.

    On a CPU they are kept in float32: the attention of one query takes a sixth to two thirds of its time in 16 bits.

    Args:
        capacity: tokens there is room for, virtual ones included.

    Attributes:
        place: where one more token is to be written, (1,). All of the buffers is then given, and what they hold is
            for the caller to know.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.place: Tensor | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, hd) of new tokens; returns those of all tokens so far, (B, H, N, hd).

        Raises:
            ValueError: more tokens than there is room for.
        """
        if self._buffers is None:
            B, H, _, hd = k.shape
            dtype = torch.promote_types(k.dtype, torch.float32) if k.device.type == "cpu" else k.dtype
            keys, values = (t.new_zeros(B, H, self.capacity, hd, dtype=dtype) for t in (k, v))
            self._buffers = (keys, values)
        if self.place is not None:
            for buffer, new in zip(self._buffers, (k, v), strict=True):
                buffer.index_copy_(2, self.place, new.to(buffer.dtype))
            return self._buffers
        start, self.length = self.length, self.length + k.size(2)
        if self.length > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens; these make {self.length}")
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer.narrow(2, start, new.size(2)).copy_(new)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far, (B, H, N, hd) each."""
        if self._buffers is None:
            raise ValueError("the cache is empty")
        keys, values = self._buffers
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)


class KeyValueCache:
    """Keys and values of all blocks; ``model(input_ids, cache=cache)`` reads and fills it.

    Args:
        n_layer: number of blocks.
        capacity: tokens there is room for: virtual ones, prompt and what will be generated.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Tokens read so far, virtual ones included."""
        return self.layers[0].length


Processor = Callable[[Tensor, Tensor, Tensor], Tensor]
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
    no_repeat_ngram: int = 0,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    seed: int | Sequence[int] | None = None,
    processors: Sequence[Processor] = (),
    stop: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Continue a batch of prompts, one token at a time, every block keeping the keys and values it has computed.

    Args:
        model: a GPT-2, with or without LoRA, prefix or soft prompt; it is put in evaluation mode meanwhile. On a GPU
            one that is in it already is quicker: its pass over one token is recorded.
        input_ids: (B, T) prompts.
        attention_mask: (B, T), 1 for text and 0 for padding, on either side.
        max_new_tokens: the longest continuation.
        temperature: divides the logits, from 1e-9 to 1e9; 0 is greedy.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together have at least this probability (Holtzman et al. 2020).
        repetition_penalty: divides positive logits of tokens already there and multiplies negative ones (Keskar et al.
            2019).
        no_repeat_ngram: no n-gram of this length occurs twice; 0 for any.
        eos_token_id: ends a row; it is part of the row.
        pad_token_id: what stands behind a row that has ended.
        seed: of the random draws, the same for every row or one for each. A row's text depends on its prompt and its
            seed alone, not on the other rows. None draws from torch's own generator.
        processors: change the logits before temperature, top-k and top-p; they run in inference mode, as ``stop`` does.
        stop: (ids (B, N), mask (B, N)) -> (B,), whether each row has come to its end.

    Returns:
        (B, T + new): the prompts, padded on the left, and what was generated.

    Raises:
        ValueError: a value out of range, an empty prompt, or more tokens than ``n_positions``.
    """
    check_settings(temperature, top_k, top_p, repetition_penalty, no_repeat_ngram, max_new_tokens)
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
    cache = KeyValueCache(len(model.h), N)
    records, recorded = can_be_recorded(model, max_new_tokens), None
    with torch.inference_mode(), _evaluating(model), packed(model, max_new_tokens) as head:
        fresh = ids[:, :T]
        at: Tensor | None = torch.full((B, 1), T - 1, device=ids.device)
        for n in range(T, T + max_new_tokens):
            if recorded is None:
                hidden = model(fresh, mask[:, :n] if padded else None, at=at, cache=cache)
                logits = head(hidden[:, -1]).float()
                if records:
                    recorded = RecordedPass(model, head, cache, mask[:, :T])
            else:
                logits = recorded(fresh).to(torch.float32, copy=True)
            sofar, text = ids[:, :n], mask[:, :n]
            if repetition_penalty != 1.0:
                logits = _penalised(logits, sofar, text, repetition_penalty)
            if no_repeat_ngram:
                logits = _without_repeats(logits, sofar, text, no_repeat_ngram)
            for process in processors:
                logits = process(logits, sofar, text)
            chosen = (
                logits.argmax(-1) if uniform is None else _drawn(logits / temperature, uniform[:, n - T], top_k, top_p)
            )
            ids[:, n] = torch.where(done, pad_token_id, chosen)
            mask[:, n] = (~done).long()
            if eos_token_id is not None:
                done |= chosen == eos_token_id
            if stop is not None:
                done |= stop(ids[:, : n + 1], mask[:, : n + 1])
            if bool(done.all()):
                return ids[:, : n + 1]
            fresh, at = ids[:, n : n + 1], None
    return ids


@contextmanager
def _evaluating(model: GPT2) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_settings(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    no_repeat_ngram: int,
    max_new_tokens: int,
) -> None:
    """Raise a ValueError that names the first setting of :func:`generate` that is out of range."""
    least, most = 1e-9, 1e9  # by which float32 logits can be divided
    for name, value, good, right in (
        ("temperature", temperature, temperature == 0 or least <= temperature <= most, f"0 or from {least} to {most}"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "in (0, 1]"),
        ("repetition_penalty", repetition_penalty, least <= repetition_penalty <= most, f"from {least} to {most}"),
        ("no_repeat_ngram", no_repeat_ngram, no_repeat_ngram >= 0, "at least 0"),
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


def kept(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> tuple[Tensor, Tensor]:
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


def _drawn(logits: Tensor, uniform: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Draw one token a row (B,), from its logits (B, V) and its random number in [0, 1) (B,) alone."""
    if top_k is None and (top_p is None or top_p == 1.0):
        return _inverse(logits.softmax(-1), uniform)
    probability, tokens = kept(logits, top_k, top_p)
    return tokens.gather(-1, _inverse(probability, uniform).unsqueeze(-1)).squeeze(-1)


def _inverse(probability: Tensor, uniform: Tensor) -> Tensor:
    """The first place (B,) where the cumulative sum of ``probability`` (B, M) passes ``uniform`` (B,) of its total."""
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True)
    return torch.minimum(place, torch.searchsorted(cumulative, total)).squeeze(-1)  # the product may round up to total


def _penalised(logits: Tensor, ids: Tensor, text: Tensor, penalty: float) -> Tensor:
    # A count decides: the padding's token may be one of the text's too.
    there = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, ids, text) > 0
    return torch.where(there, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _without_repeats(logits: Tensor, ids: Tensor, text: Tensor, n: int) -> Tensor:
    """Logits of -inf for every token that would end an n-gram which the row has already."""
    if ids.size(1) < n:
        return logits
    windows = ids.unfold(1, n, 1)  # (B, N - n + 1, n)
    last = ids[:, ids.size(1) - n + 1 :]  # (B, n - 1): what the next token would follow
    same = (windows[..., :-1] == last.unsqueeze(1)).all(-1) & text.unfold(1, n, 1).bool().all(-1)
    banned = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, windows[..., -1], same.long()) > 0
    return logits.masked_fill(banned, -torch.inf)
