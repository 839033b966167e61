"""Direct preference optimization (DPO, Rafailov et al. 2023): settings, losses and rejected continuations.

With the log-ratios h_w = log p(y_w|x) - log p_ref(y_w|x) of the preferred continuation y_w of a prompt x, and h_l of
the rejected one y_l, and the margin m = h_w - h_l:

- sigmoid: ``-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)`` with label smoothing e;
- IPO (Azar et al. 2024): ``(m - 1 / (2 beta))^2``.

The implicit rewards are beta h_w and beta h_l.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt2_pl.errors import InputError, require
from gpt2_pl.generation import validate_sampling
from gpt2_pl.losses import CHUNK_SIZE, IGNORE_INDEX, target_positions

_SPAN = 8  # tokens of a part of a text without lines


@dataclass
class DPO:
    """Settings of direct preference optimization.

    Pairs are read from ``pairs_file``, or made from the training texts: the preferred continuation is then the true
    one.

    Args:
        beta: strength of the constraint to the reference, above 0.
        loss: ``sigmoid``, the loss of DPO, or ``ipo``, with tau = ``beta``.
        label_smoothing: assumed share of pairs in the wrong order, in [0, 0.5); only for ``sigmoid``.
        average_log_probs: average log-probabilities over the tokens of a continuation instead of summing them.
        rejected: rejected continuations of made pairs. ``samples`` are drawn from the model once, before the first
            step; ``repeated`` replaces every second line of the true continuation by the line before it, and
            ``shuffled`` changes the order of its lines. Texts without lines are divided into parts of 8 tokens.
        pairs_file: CSV, TSV, JSON lines or Parquet file with the columns ``prompt``, ``chosen`` and ``rejected``.
        val_pairs_file: file of validation pairs; without it, and with ``pairs_file``, only texts are validated.
        reference: ``base`` is the base without surgery, ``start`` the model before the first step. By default ``base``
            if only adapters train that were not trained before, else ``start``.
        prompt_tokens: number of tokens of a prompt in texts without prompts, such as those of
            :class:`~gpt2_pl.datamodules.TextCorpus`.
        max_new_tokens: largest number of tokens of a sample, and of a true continuation in such texts.
        temperature: sampling temperature of ``samples``; 0 is greedy decoding.
        top_p: nucleus sampling of ``samples``.

    Raises:
        InputError: a value out of range, or settings that contradict each other.
    """

    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    average_log_probs: bool = False
    rejected: Literal["samples", "repeated", "shuffled"] = "samples"
    pairs_file: str | None = None
    val_pairs_file: str | None = None
    reference: Literal["base", "start"] | None = None
    prompt_tokens: int = 32
    max_new_tokens: int = 220
    temperature: float = 1.0
    top_p: float | None = None

    def __post_init__(self) -> None:
        key = "model.dpo"
        require(self.beta > 0.0, f"{key}.beta", self.beta, "above 0")
        require(self.loss in ("sigmoid", "ipo"), f"{key}.loss", self.loss, "sigmoid or ipo")
        require(0.0 <= self.label_smoothing < 0.5, f"{key}.label_smoothing", self.label_smoothing, "in [0, 0.5)")
        is_smoothed = self.loss == "ipo" and self.label_smoothing > 0.0
        require(not is_smoothed, f"{key}.label_smoothing", self.label_smoothing, "0 with loss: ipo")
        kinds = ("samples", "repeated", "shuffled")
        require(self.rejected in kinds, f"{key}.rejected", self.rejected, f"one of {', '.join(kinds)}")
        has_file = self.pairs_file is not None or self.val_pairs_file is None
        require(has_file, f"{key}.pairs_file", self.pairs_file, "a file if there is a val_pairs_file")
        require(self.reference in (None, "base", "start"), f"{key}.reference", self.reference, "null, base or start")
        require(self.prompt_tokens >= 1, f"{key}.prompt_tokens", self.prompt_tokens, "at least 1")
        try:
            validate_sampling(self.temperature, self.max_new_tokens, top_p=self.top_p)
        except InputError as error:
            raise InputError(f"{key}.{error}", key=f"{key}.{error.key}") from None

    @property
    def has_val_pairs(self) -> bool:
        """Whether there are validation pairs."""
        return self.pairs_file is None or self.val_pairs_file is not None

    def __call__(self, log_probs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses of pairs.

        Args:
            log_probs: (B, 2) log-probabilities of the preferred and the rejected continuation.
            reference: (B, 2), the same under the reference model.

        Returns:
            The losses (B,), and the implicit rewards (B, 2), without gradients.
        """
        ratios = log_probs - reference
        margins = ratios[:, 0] - ratios[:, 1]
        if self.loss == "ipo":
            losses = (margins - 1.0 / (2.0 * self.beta)).square()
        else:
            right, wrong = F.logsigmoid(self.beta * margins), F.logsigmoid(-self.beta * margins)
            losses = -(1.0 - self.label_smoothing) * right - self.label_smoothing * wrong
        return losses, self.beta * ratios.detach()


def _token_log_probs(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target (n,) from its hidden state (n, C); the softmax is in float32."""
    logits = F.linear(states, weight)
    return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def sequence_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    average: bool = False,
    chunk: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Compute log p of every row, the sum over its targets, without holding all logits (B, T, V).

    Logits are computed in chunks of positions, and again in the backward pass.

    Args:
        hidden: (B, T, C).
        weight: the tied token embedding (V, C).
        targets: (B, T) token ids, or -100 at positions that are ignored.
        average: divide the sum by the number of targets.
        chunk: positions whose logits are in memory at a time; see :func:`~gpt2_pl.losses.cross_entropy`.
        positions: as in :func:`~gpt2_pl.losses.cross_entropy`.

    Returns:
        (B,) in float32 or above.
    """
    positions = target_positions(targets) if positions is None else positions
    states, labels = (t.flatten(0, 1).index_select(0, positions) for t in (hidden, targets))
    chunk = CHUNK_SIZE.get(hidden.device.type, CHUNK_SIZE["cpu"]) if chunk is None else chunk
    parts = [
        checkpoint(_token_log_probs, part, weight, ids, use_reentrant=False)
        for part, ids in zip(states.split(chunk), labels.split(chunk), strict=True)
    ]
    values = torch.cat(parts)
    totals = values.new_zeros(targets.numel()).index_copy(0, positions, values).view(targets.shape).sum(1)
    return totals / (targets != IGNORE_INDEX).sum(1).clamp(min=1) if average else totals


def corrupt(tokens: Sequence[int], ends: Sequence[bool], kind: str, seed: str, end_of_text: int) -> list[int]:
    """Make a rejected continuation from a true one.

    Args:
        tokens: token ids of the true continuation. A final end of text stays at the end.
        ends: whether each token ends a line.
        kind: ``repeated`` or ``shuffled``; see :class:`DPO`.
        seed: seed of the order of ``shuffled``.
        end_of_text: id of the end of text.

    Returns:
        Token ids. They are equal to ``tokens`` if there are too few lines or if all lines are equal.
    """
    n = len(tokens) - (tokens[-1] == end_of_text)
    cuts = [i + 1 for i in range(n - 1) if ends[i]]
    cuts = cuts or list(range(_SPAN, n, _SPAN))
    lines = [list(tokens[start:end]) for start, end in zip([0, *cuts], [*cuts, n], strict=True)]
    if kind == "repeated":
        changed = [lines[i - i % 2] for i in range(len(lines))]
    else:
        changed, generator = list(lines), random.Random(seed)
        for _ in range(10):  # an order may be the true one
            generator.shuffle(changed)
            if changed != lines:
                break
    return [*(token for line in changed for token in line), *tokens[n:]]
