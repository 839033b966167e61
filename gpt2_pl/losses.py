"""Losses over the vocabulary, without its logits in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # a target that counts for nothing, as in torch
MIN_COMPLEMENT = 1e-5  # the least 1 - p that unlikelihood takes the logarithm of
CHUNK_SIZE = {"cpu": 512, "cuda": 8192}  # positions whose logits are held at a time
VOCAB_PAD_MULTIPLE = {"cuda": 64}  # the vocabulary is padded to a multiple: odd widths are slow on a GPU


def _chunk_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    likelihood: bool,
    alpha: float,
    candidates: Tensor | None,
    is_candidate: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of some positions, from their logits (n, V), which may be overwritten.

    Returns:
        The sums of cross-entropies, nothing without ``likelihood``, and of unlikelihoods; where it trains, the gradient
        of the losses' sum by the logits, (n, V).
    """
    compiling = torch.compiler.is_compiling()
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    at = target.unsqueeze(-1)
    log_likelihood = log_p.gather(-1, at)  # (n, 1)
    share: Tensor | float = 1.0 if likelihood else 0.0  # that the softmax has in the gradient
    unlikelihood = log_p.new_zeros(())
    odds = None
    if candidates is not None and is_candidate is not None:
        p = log_p.gather(-1, candidates).exp()  # (n, M)
        unlikelihood = -(1.0 - p).clamp(min=MIN_COMPLEMENT).log().masked_fill(~is_candidate, 0.0).sum()
        # of -log(1 - p_c) by logit k: p_c / (1 - p_c) ([k = c] - p_k)
        odds = (alpha * p / (1.0 - p)).masked_fill(~is_candidate | (1.0 - p < MIN_COMPLEMENT), 0.0)
        share = share - odds.sum(-1, keepdim=True)
    total = -log_likelihood.sum() if likelihood else log_p.new_zeros(())
    if not trains:
        return total, unlikelihood, logits
    gradient = log_p.exp_()
    if odds is not None and candidates is not None:
        gradient = gradient.mul_(share).scatter_add_(-1, candidates, odds)
    if compiling:  # all in one kernel
        if likelihood:
            entries = torch.arange(logits.size(-1), device=at.device)
            gradient = torch.where(entries == at, share * log_likelihood.exp() - 1.0, gradient)
        return total, unlikelihood, gradient.to(logits.dtype)
    if gradient.dtype != logits.dtype:
        gradient = logits.copy_(gradient)
    if likelihood:  # the target is no candidate
        gradient.scatter_(-1, at, (share * log_likelihood.exp() - 1.0).to(logits.dtype))
    return total, unlikelihood, gradient


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_chunk_loss_and_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies and unlikelihoods, with both gradients computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int | None,
        likelihood: bool,
        alpha: float,
        candidates: Tensor | None,
        is_candidate: Tensor | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # Under autocast a matrix product is made in its dtype; the softmax always in float32 or above.
        device, V = hidden.device.type, len(weight)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        chunk = CHUNK_SIZE.get(device, CHUNK_SIZE["cpu"]) if chunk is None else chunk
        outcome = _compiled() if compiled else _chunk_loss_and_grad
        missing = -V % VOCAB_PAD_MULTIPLE.get(device, 1)
        table = F.pad(weight.to(dtype), (0, 0, 0, missing)) if missing else weight.to(dtype)  # (V or more, C)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        unlikelihood = torch.zeros_like(total)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                states = hidden[part].to(dtype)
                held, counts = (None if t is None else t[part] for t in (candidates, is_candidate))
                logits = states @ table.T  # (n, V or more)
                logits[:, V:] = -torch.inf
                of_likelihood, of_unlikelihood, gradient = outcome(
                    logits, targets[part], likelihood, alpha, held, counts, need_hidden or need_weight
                )
                total += of_likelihood
                unlikelihood += of_unlikelihood
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ table
                if grad_weight is not None:
                    grad_weight += (gradient.T @ states)[:V]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(unlikelihood)
        return total + alpha * unlikelihood, unlikelihood

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad_total for g in ctx.saved_tensors)  # a scalar does not widen g
        return (*grads, *(None,) * 7)


def _select_targets(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (N, C), weight and targets (N,) where something is predicted, and where that is, (B, T)."""
    if not torch.is_grad_enabled():  # of which a function's context does not know
        hidden, weight = hidden.detach(), weight.detach()
    counted = targets != IGNORE_INDEX
    if bool(counted.all()):  # nothing need be copied
        return hidden.flatten(0, 1), weight, targets.flatten(), counted
    return hidden[counted], weight, targets[counted], counted


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy from hidden states, never holding all logits (B, T, V).

    Equal to ``F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")``. Hidden states where
    nothing is predicted are left out before the vocabulary is multiplied in.

    Args:
        hidden: (B, T, C).
        weight: the tied token embedding (V, C).
        targets: (B, T) token ids, or -100 where nothing is predicted.
        chunk: positions whose logits are held at a time; by default 512 on a CPU, and 8,192 on a GPU, which in 16 bits
            are 4 GB of GPT-2's, or compiled 1.6.
        compiled: compile what is done to the logits.

    Returns:
        The sum of the losses, in nats, and the number of targets.
    """
    states, weight, own, counted = _select_targets(hidden, weight, targets)
    total, _ = _ChunkedCrossEntropy.apply(states, weight, own, chunk, True, 0.0, None, None, compiled)
    return total, counted.sum()


def negative_candidates(
    targets: Tensor,
    ignore_token_ids: Collection[int] = (),
    window: int | None = None,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The negative candidates of each position: the set {x_1 .. x_(t-1)} without x_t (Welleck et al. 2020).

    Args:
        targets: (B, T) token ids, or -100 where nothing is predicted.
        ignore_token_ids: never candidates, such as line ends and punctuation in verse.
        window: candidates are only the last ``window`` tokens; by default all.
        input_ids: (B, T) tokens of the row, of which ``targets`` at t follows that at t; padded on the right. Without
            them, the earlier targets are the row: its first token, and those whose target is -100, are not known.

    Returns:
        Token ids (B, 1, T), the same for every position, and (B, T, T) whether token j is a candidate at position t,
        each token at its last occurrence, so that it counts once.
    """
    T = targets.size(1)
    tokens = F.pad(targets[:, : T - 1], (1, 0), value=IGNORE_INDEX) if input_ids is None else input_ids
    position = torch.arange(T, device=targets.device)
    equal = tokens.unsqueeze(2) == tokens.unsqueeze(1)  # (B, T, T)
    later = equal & (position.unsqueeze(1) < position)
    following = torch.where(later.any(2), later.int().argmax(2), T)  # (B, T): where each token occurs next
    t, j = position.unsqueeze(1), position  # (T, 1), (T,)
    usable = tokens != IGNORE_INDEX
    for token in ignore_token_ids:
        usable = usable & (tokens != token)
    is_target = targets.unsqueeze(2) == tokens.unsqueeze(1)
    counts = (j <= t) & (following.unsqueeze(1) > t) & usable.unsqueeze(1) & ~is_target
    if window is not None:
        counts &= j > t - window
    return tokens.clamp(min=0).unsqueeze(1), counts


def unlikelihood_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    alpha: float,
    ignore_token_ids: Collection[int] = (),
    window: int | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Likelihood and token-level unlikelihood from hidden states, never holding all logits (B, T, V).

    Args:
        hidden: (B, T, C).
        weight: the tied token embedding (V, C).
        targets: (B, T) token ids, or -100 where nothing is predicted.
        alpha: weight of the unlikelihood.
        ignore_token_ids: as in :func:`unlikelihood_loss`.
        window: as in :func:`unlikelihood_loss`.
        chunk: as in :func:`cross_entropy`.
        compiled: as in :func:`cross_entropy`.
        input_ids: as in :func:`unlikelihood_loss`.

    Returns:
        The sum of the losses, the number of targets, and the sum of the unlikelihoods by itself, without ``alpha``.
    """
    states, weight, own, counted = _select_targets(hidden, weight, targets)
    tokens, counts = negative_candidates(targets, ignore_token_ids, window, input_ids)
    candidates = tokens.expand(-1, targets.size(1), -1)[counted]
    total, unlikelihood = _ChunkedCrossEntropy.apply(
        states, weight, own, chunk, True, alpha, candidates, counts[counted], compiled
    )
    return total, counted.sum(), unlikelihood


def sequence_unlikelihood_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, n: int = 4, chunk: int | None = None, compiled: bool = False
) -> Tensor:
    """Sequence-level unlikelihood of generated text (Welleck et al. 2020, eq. 6).

    It is -log(1 - p) of every token of an n-gram that the text has already had, over all its tokens.

    Args:
        hidden: (B, T, C) of one pass over the generated text.
        weight: the tied token embedding (V, C).
        targets: (B, T) generated tokens, or -100.
        n: length of the n-grams.
        chunk: as in :func:`cross_entropy`.
        compiled: as in :func:`cross_entropy`.

    Returns:
        The mean over the tokens.
    """
    states, weight, own, counted = _select_targets(hidden, weight, targets)
    repeated = repeated_ngrams(targets, n)[counted]
    total, _ = _ChunkedCrossEntropy.apply(
        states, weight, own, chunk, False, 1.0, own.unsqueeze(-1), repeated.unsqueeze(-1), compiled
    )
    return total / counted.sum().clamp(min=1)


def repeated_ngrams(ids: Tensor, n: int) -> Tensor:
    """Which tokens (B, T) belong to an n-gram that the row has had before; those with -100 never do."""
    T = ids.size(1)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    if n > T:
        return repeated
    windows = ids.unfold(1, n, 1)  # (B, W, n)
    same = (windows.unsqueeze(1) == windows.unsqueeze(2)).all(-1)  # (B, W, W)
    again = same.tril(-1).any(-1) & (windows != IGNORE_INDEX).all(-1)  # (B, W): one like it begins earlier
    for i in range(n):
        repeated[:, i : T - n + 1 + i] |= again
    return repeated


def unlikelihood_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    ignore_token_ids: Collection[int] = (),
    window: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    input_ids: Tensor | None = None,
) -> Tensor:
    """Likelihood and token-level unlikelihood (Welleck et al. 2020, eq. 4): of every target,

    L_t = -log p(x_t) - alpha * sum over c in C_t of log(1 - p(c)), C_t = {x_1 .. x_(t-1)} without x_t.

    Training goes through :func:`unlikelihood_cross_entropy`, which gives the same from hidden states in little memory.

    Args:
        logits: (B, T, V), those at t predict ``targets`` at t.
        targets: (B, T) token ids.
        alpha: weight of the unlikelihood; 0 is cross-entropy.
        ignore_token_ids: tokens that may be repeated.
        window: candidates are only the last ``window`` tokens before the target.
        ignore_index: target at which nothing is predicted.
        input_ids: (B, T) the tokens that the model read, x_1 .. x_T, padded on the right; ``targets`` are then
            x_2 .. x_(T+1). Without them C_t holds earlier targets only, hence not x_1.

    Returns:
        The mean over the targets, a scalar; 1 - p is at least 1e-5.
    """
    targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
    counted = targets != IGNORE_INDEX
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    likelihood = F.cross_entropy(logits[counted], targets[counted], reduction="sum")
    tokens, counts = negative_candidates(targets, ignore_token_ids, window, input_ids)
    p = logits.log_softmax(-1).gather(-1, tokens.expand(-1, targets.size(1), -1)).exp()  # (B, T, T)
    counts = counts & counted.unsqueeze(-1)
    unlikelihood = -(1.0 - p).clamp(min=MIN_COMPLEMENT).log().masked_fill(~counts, 0.0).sum()
    return (likelihood + alpha * unlikelihood) / counted.sum().clamp(min=1)
