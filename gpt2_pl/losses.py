"""Losses over the vocabulary, computed from hidden states without holding all logits in memory.

With logits z = W h (W the tied token embedding), p = softmax(z) and target y of each position:

- cross-entropy: ``-log p(y)``; gradient ``dL/dz_k = p_k - [k = y]``.
- token-level unlikelihood (Welleck et al. 2020): ``-alpha * sum over c in C of log(1 - p(c))`` for the
  negative candidates C; gradient ``alpha * sum over c in C of p_c / (1 - p_c) * ([k = c] - p_k)``.
- sequence-level unlikelihood (of the same paper): the same with C = {y} for every generated token that belongs to a
  repeated n-gram.

``1 - p`` is clamped at ``MIN_COMPLEMENT``; a clamped term has no gradient. The positions are processed in chunks. Each
chunk's gradients are computed in the forward pass, so that its logits are freed before the next chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # target of positions that are ignored, as in torch.nn.functional.cross_entropy
MIN_COMPLEMENT = 1e-5  # lower bound of 1 - p in the logarithm of the unlikelihood
CHUNK_SIZE = {"cpu": 512, "cuda": 8192}  # positions whose logits are in memory at a time
VOCAB_PAD_MULTIPLE = {"cuda": 64}  # the vocabulary is padded to a multiple: odd widths are slow on a GPU

Negatives = tuple[Tensor, Tensor]  # token ids, and booleans: which of them are negative candidates


def _chunk_loss_and_grad(
    logits: Tensor, target: Tensor, include_nll: bool, alpha: float, negatives: Negatives | None, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the losses of one chunk of positions and their gradient; see the module's docstring for the formulas.

    Args:
        logits: (n, V); may be overwritten.
        target: (n,) token ids.
        include_nll: whether the cross-entropy is part of the loss. A target must then not be one of its candidates.
        alpha: weight of the unlikelihood.
        negatives: token ids (n, M), and booleans (n, M), which of them are candidates at each position; None without
            unlikelihood.
        needs_grad: whether the gradient is computed.

    Returns:
        Summed cross-entropy (0 without ``include_nll``), summed unlikelihood (without ``alpha``), and the gradient of
        the total loss with respect to the logits (n, V); without ``needs_grad`` the last is ``logits``.
    """
    compiling = torch.compiler.is_compiling()
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    target_ids = target.unsqueeze(-1)  # (n, 1)
    log_p_target = log_p.gather(-1, target_ids)  # (n, 1)
    softmax_scale: Tensor | float = 1.0 if include_nll else 0.0  # factor of p in the gradient
    unlikelihood = log_p.new_zeros(())
    if negatives is not None:
        candidates, is_candidate = negatives
        p = log_p.gather(-1, candidates).exp()  # (n, M)
        unlikelihood = -(1.0 - p).clamp(min=MIN_COMPLEMENT).log().masked_fill(~is_candidate, 0.0).sum()
        odds = (alpha * p / (1.0 - p)).masked_fill(~is_candidate | (1.0 - p < MIN_COMPLEMENT), 0.0)
        softmax_scale = softmax_scale - odds.sum(-1, keepdim=True)
    nll = -log_p_target.sum() if include_nll else log_p.new_zeros(())
    if not needs_grad:
        return nll, unlikelihood, logits
    grad = log_p.exp_()
    if negatives is not None:
        grad = grad.mul_(softmax_scale).scatter_add_(-1, candidates, odds)
    if compiling:  # without a scatter the compiler fuses everything into one kernel
        if include_nll:
            entries = torch.arange(logits.size(-1), device=target_ids.device)
            grad = torch.where(entries == target_ids, softmax_scale * log_p_target.exp() - 1.0, grad)
        return nll, unlikelihood, grad.to(logits.dtype)
    if grad.dtype != logits.dtype:
        grad = logits.copy_(grad)
    if include_nll:
        grad.scatter_(-1, target_ids, (softmax_scale * log_p_target.exp() - 1.0).to(logits.dtype))
    return nll, unlikelihood, grad


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_chunk_loss_and_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies and unlikelihoods; both gradients are computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int | None,
        include_nll: bool,
        alpha: float,
        negatives: Negatives | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # Under autocast the matrix products are in its dtype. The softmax is always in float32 or above.
        device, V = hidden.device.type, len(weight)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        chunk = CHUNK_SIZE.get(device, CHUNK_SIZE["cpu"]) if chunk is None else chunk
        loss_and_grad = _compiled() if compiled else _chunk_loss_and_grad
        padding = -V % VOCAB_PAD_MULTIPLE.get(device, 1)
        padded = F.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)  # (V + padding, C)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        unlikelihood = torch.zeros_like(total)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                states = hidden[rows].to(dtype)
                chunk_negatives = None if negatives is None else (negatives[0][rows], negatives[1][rows])
                logits = states @ padded.T  # (n, V + padding)
                logits[:, V:] = -torch.inf
                chunk_nll, chunk_unlikelihood, grad = loss_and_grad(
                    logits, targets[rows], include_nll, alpha, chunk_negatives, need_hidden or need_weight
                )
                total += chunk_nll
                unlikelihood += chunk_unlikelihood
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ padded
                if grad_weight is not None:
                    grad_weight += (grad.T @ states)[:V]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(unlikelihood)
        return total + alpha * unlikelihood, unlikelihood

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad_total for g in ctx.saved_tensors)  # a scalar does not widen g
        return (*grads, *(None,) * 6)


def target_positions(targets: Tensor) -> Tensor:
    """Return the indices (n,) of the n targets in the flattened ``targets`` (B, T); waits for a GPU."""
    return (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)


def _chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None,
    compiled: bool,
    positions: Tensor | None,
    include_nll: bool = True,
    alpha: float = 0.0,
    negatives: Negatives | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sum of the losses at the positions that have a target.

    Args:
        hidden: (B, T, C).
        weight: (V, C).
        targets: (B, T) token ids, or ``IGNORE_INDEX``.
        chunk: as in :func:`cross_entropy`.
        compiled: as in :func:`cross_entropy`.
        positions: as in :func:`cross_entropy`.
        include_nll: whether the cross-entropy is part of the loss.
        alpha: weight of the unlikelihood.
        negatives: token ids (B, T, M), and booleans (B, T, M), which of them are candidates; None without unlikelihood.

    Returns:
        The sum of the losses, the sum of the unlikelihoods without ``alpha``, and the number of targets.
    """
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not know of no_grad()
        hidden, weight = hidden.detach(), weight.detach()
    has_target = targets != IGNORE_INDEX
    positions = target_positions(targets) if positions is None else positions
    if len(positions) == targets.numel():  # avoids copies
        states, labels = hidden.flatten(0, 1), targets.flatten()
        selected = None if negatives is None else (negatives[0].flatten(0, 1), negatives[1].flatten(0, 1))
    else:
        states, labels = (t.flatten(0, 1).index_select(0, positions) for t in (hidden, targets))
        row, column = positions.div(targets.size(1), rounding_mode="floor"), positions % targets.size(1)
        selected = None if negatives is None else (negatives[0][row, column], negatives[1][row, column])
    total, unlikelihood = _ChunkedCrossEntropy.apply(
        states, weight, labels, chunk, include_nll, alpha, selected, compiled
    )
    return total, unlikelihood, has_target.sum()


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    compiled: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the next-token cross-entropy, ``-sum over t of log p(x_t)``, without holding all logits (B, T, V).

    Equal to ``F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")``. Positions without a
    target are removed before the product with the vocabulary.

    Args:
        hidden: (B, T, C).
        weight: the tied token embedding (V, C).
        targets: (B, T) token ids, or -100 at positions that are ignored.
        chunk: positions whose logits are in memory at a time. By default 512 on a CPU and 8,192 on a GPU; for GPT-2's
            vocabulary in 16 bits the latter take 4 GB, or 1.6 GB compiled.
        compiled: compile the computation from logits to loss and gradient with ``torch.compile``.
        positions: (n,) indices of the targets in the flattened ``targets``, in ascending order. By default they are
            searched for, for which the host waits for a GPU.

    Returns:
        The sum of the losses, in nats, and the number of targets.
    """
    total, _, n_targets = _chunked_loss(hidden, weight, targets, chunk, compiled, positions)
    return total, n_targets


def negative_candidates(
    targets: Tensor, ignore_token_ids: Collection[int] = (), window: int | None = None, input_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the negative candidates of each position, C_t = {x_1, ..., x_(t-1)} minus {x_t} (Welleck et al. 2020).

    Args:
        targets: (B, T) token ids, or -100 at positions that are ignored.
        ignore_token_ids: token ids that are never candidates, such as line ends and punctuation in verse.
        window: only the last ``window`` tokens are candidates; by default all.
        input_ids: (B, T) input tokens, padded on the right; ``targets[:, t]`` is the token after ``input_ids[:, t]``.
            If None, the earlier targets are used. The first token of a row and tokens whose target is -100 are then
            unknown and no candidates.

    Returns:
        Token ids (B, 1, T), the same for every position, and booleans (B, T, T): whether token j is a candidate at
        position t. A token that occurs several times is a candidate at its last occurrence only, so that it counts
        once.
    """
    T = targets.size(1)
    tokens = F.pad(targets[:, : T - 1], (1, 0), value=IGNORE_INDEX) if input_ids is None else input_ids
    position = torch.arange(T, device=targets.device)
    equal = tokens.unsqueeze(2) == tokens.unsqueeze(1)  # (B, T, T)
    later = equal & (position.unsqueeze(1) < position)
    next_occurrence = torch.where(later.any(2), later.int().argmax(2), T)  # (B, T)
    t, j = position.unsqueeze(1), position  # (T, 1), (T,)
    allowed = tokens != IGNORE_INDEX
    for token in ignore_token_ids:
        allowed = allowed & (tokens != token)
    is_target = targets.unsqueeze(2) == tokens.unsqueeze(1)
    is_candidate = (j <= t) & (next_occurrence.unsqueeze(1) > t) & allowed.unsqueeze(1) & ~is_target
    if window is not None:
        is_candidate &= j > t - window
    return tokens.clamp(min=0).unsqueeze(1), is_candidate


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
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cross-entropy plus token-level unlikelihood without holding all logits (B, T, V).

    The loss of a target is that of :func:`unlikelihood_loss`.

    Args:
        hidden: (B, T, C).
        weight: the tied token embedding (V, C).
        targets: (B, T) token ids, or -100 at positions that are ignored.
        alpha: weight of the unlikelihood.
        ignore_token_ids: as in :func:`unlikelihood_loss`.
        window: as in :func:`unlikelihood_loss`.
        chunk: as in :func:`cross_entropy`.
        compiled: as in :func:`cross_entropy`.
        input_ids: as in :func:`unlikelihood_loss`.
        positions: as in :func:`cross_entropy`.

    Returns:
        The sum of the losses, the number of targets, and the sum of the unlikelihoods alone, without ``alpha``.
    """
    tokens, is_candidate = negative_candidates(targets, ignore_token_ids, window, input_ids)
    negatives = (tokens.expand(-1, targets.size(1), -1), is_candidate)
    total, unlikelihood, n_targets = _chunked_loss(
        hidden, weight, targets, chunk, compiled, positions, True, alpha, negatives
    )
    return total, n_targets, unlikelihood


def sequence_unlikelihood_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n: int = 4,
    chunk: int | None = None,
    compiled: bool = False,
    positions: Tensor | None = None,
) -> Tensor:
    """Compute the sequence-level unlikelihood of generated text (after Welleck et al. 2020).

    L = 1 / T * sum over t in R of -log(1 - p(x_t)), where R are the positions of all tokens of every n-gram that
    occurred earlier in the text; see :func:`repeated_ngrams`.

    Args:
        hidden: (B, T, C) of one forward pass over the generated text.
        weight: the tied token embedding (V, C).
        targets: (B, T) generated tokens, or -100 at positions that are ignored.
        n: length of the n-grams.
        chunk: as in :func:`cross_entropy`.
        compiled: as in :func:`cross_entropy`.
        positions: as in :func:`cross_entropy`.

    Returns:
        The mean over all generated tokens, a scalar.
    """
    negatives = (targets.unsqueeze(-1), repeated_ngrams(targets, n).unsqueeze(-1))
    total, _, n_targets = _chunked_loss(hidden, weight, targets, chunk, compiled, positions, False, 1.0, negatives)
    return total / n_targets.clamp(min=1)


def repeated_ngrams(ids: Tensor, n: int) -> Tensor:
    """Mark the tokens of every n-gram that occurred earlier in its row.

    Args:
        ids: (B, T) token ids. An n-gram that contains -100 is never marked.
        n: length of the n-grams.

    Returns:
        Booleans (B, T).
    """
    T = ids.size(1)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    if n > T:
        return repeated
    windows = ids.unfold(1, n, 1)  # (B, W, n)
    same = (windows.unsqueeze(1) == windows.unsqueeze(2)).all(-1)  # (B, W, W)
    again = same.tril(-1).any(-1) & (windows != IGNORE_INDEX).all(-1)  # (B, W): an equal n-gram starts earlier
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
    """Compute cross-entropy plus token-level unlikelihood from logits (Welleck et al. 2020).

    The loss of the target x_t is ``L_t = -log p(x_t) - alpha * sum over c in C_t of log(1 - p(c))`` with the negative
    candidates ``C_t = {x_1, ..., x_(t-1)} minus {x_t}``. All probabilities are conditional on x_1, ..., x_(t-1).

    This is the reference implementation. Training uses :func:`unlikelihood_cross_entropy`, which computes the same from
    hidden states in less memory.

    Args:
        logits: (B, T, V), where ``logits[:, t]`` predicts ``targets[:, t]``.
        targets: (B, T) token ids.
        alpha: weight of the unlikelihood; 0 gives cross-entropy.
        ignore_token_ids: token ids that are never negative candidates.
        window: only the last ``window`` tokens before the target are candidates; by default all.
        ignore_index: target of positions that are ignored.
        input_ids: (B, T) the input tokens x_1, ..., x_T, padded on the right; ``targets`` are then x_2, ..., x_(T+1).
            If None, C_t contains earlier targets only, and therefore not x_1.

    Returns:
        The mean over the targets, a scalar. ``1 - p`` is clamped at 1e-5.
    """
    targets = targets.masked_fill(targets == ignore_index, IGNORE_INDEX)
    has_target = targets != IGNORE_INDEX
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits[has_target], targets[has_target], reduction="sum")
    tokens, is_candidate = negative_candidates(targets, ignore_token_ids, window, input_ids)
    p = logits.log_softmax(-1).gather(-1, tokens.expand(-1, targets.size(1), -1)).exp()  # (B, T, T)
    is_candidate = is_candidate & has_target.unsqueeze(-1)
    unlikelihood = -(1.0 - p).clamp(min=MIN_COMPLEMENT).log().masked_fill(~is_candidate, 0.0).sum()
    return (nll + alpha * unlikelihood) / has_target.sum().clamp(min=1)
