"""From hidden states to class scores: pooling, the linear head, the verbalizer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_pl.kernels.dropout import dropout

Pooling = Literal["last", "mean", "max", "mix", "concat"]


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Where the text of every row ends: (B, T) -> (B, 1). The mask decides, never a token id."""
    T = attention_mask.size(1)
    return (attention_mask * torch.arange(1, T + 1, device=attention_mask.device)).argmax(1, keepdim=True)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling, mean_weight: float = 0.7) -> Tensor:
    """One vector a row from the hidden states of its text tokens.

    Args:
        hidden: (B, T, C).
        attention_mask: (B, T), 1 for text, on whichever side the padding is.
        pooling: ``last`` token, ``mean``, ``max``, ``mix`` = a mean + (1 - a) last, ``concat`` = [last; max; mean]
            (Howard & Ruder 2018, section 3.3).
        mean_weight: a.

    Returns:
        (B, C), or (B, 3 C) for ``concat``.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
    text = attention_mask.unsqueeze(-1).bool()  # (B, T, 1)
    parts = {}
    if pooling in ("last", "mix", "concat"):
        at = last_token_index(attention_mask).unsqueeze(-1).expand(-1, 1, hidden.size(-1))
        parts["last"] = hidden.gather(1, at).squeeze(1)
    if pooling in ("max", "concat"):
        parts["max"] = hidden.masked_fill(~text, -torch.inf).amax(1)
    if pooling in ("mean", "mix", "concat"):
        parts["mean"] = hidden.masked_fill(~text, 0.0).sum(1) / text.sum(1)
    if pooling == "mix":
        return mean_weight * parts["mean"] + (1.0 - mean_weight) * parts["last"]
    return torch.cat(list(parts.values()), dim=-1)


class ClassificationHead(nn.Module):
    """Dropout and a linear layer; with ``num_dropout_samples`` > 1, multi-sample dropout (Inoue 2019).

    Args:
        n_features: width of the pooled vector.
        num_classes: number of classes K.
        dropout: probability, in training.
        num_dropout_samples: dropout masks drawn per row. Outside training there is one pass without dropout.
    """

    def __init__(self, n_features: int, num_classes: int, dropout: float = 0.0, num_dropout_samples: int = 1) -> None:
        super().__init__()
        if num_dropout_samples < 1:
            raise ValueError(f"num_dropout_samples is {num_dropout_samples}; it must be at least 1")
        self.dropout, self.num_dropout_samples = dropout, num_dropout_samples
        self.linear = nn.Linear(n_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, n_features) -> logits (n, B, K), n = ``num_dropout_samples`` in training and 1 otherwise."""
        n = self.num_dropout_samples if self.training and self.dropout else 1
        features = dropout(features.expand(n, *features.shape), self.dropout, self.training)
        return self.linear(features)


class Verbalizer(nn.Module):
    """Classes as words (Schick & Schütze 2021): the language-model score of one token per class.

    It has no parameters: the tied token embedding scores, so it also works without any training.

    Args:
        token_ids: the token of each class, K ids.
    """

    token_ids: Tensor

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__()
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Hidden states (B, C) at the last text token and the token embedding (V, C) -> logits (1, B, K)."""
        return F.linear(features, embedding[self.token_ids]).unsqueeze(0)


def classification_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, average: Literal["loss", "logits"] = "loss"
) -> Tensor:
    """Cross-entropy of multi-sample logits, one value a row.

    Args:
        logits: (n, B, K), n dropout masks.
        labels: (B,) class indices.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        average: over the masks, average the losses (Inoue 2019, eq. 1) or the logits.

    Returns:
        (B,).
    """
    if average == "logits":
        logits = logits.mean(0, keepdim=True)
    n, B, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(n), label_smoothing=label_smoothing, reduction="none")
    return losses.view(n, B).mean(0)
