"""Classification heads: pooling of hidden states, the linear head, the verbalizer, and their loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_pl.errors import require
from gpt2_pl.kernels.dropout import dropout

Pooling = Literal["last", "mean", "max", "mix", "concat"]


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Return the index of the last text token of every row, from the mask and never from a token id.

    Args:
        attention_mask: (B, T), 1 for text and 0 for padding, on either side.

    Returns:
        (B, 1).
    """
    T = attention_mask.size(1)
    return (attention_mask * torch.arange(1, T + 1, device=attention_mask.device)).argmax(1, keepdim=True)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling, mean_weight: float = 0.7) -> Tensor:
    """Pool the hidden states of the text tokens of every row into one vector.

    Args:
        hidden: (B, T, C).
        attention_mask: (B, T), 1 for text and 0 for padding, on either side.
        pooling: ``last`` token, ``mean``, ``max``, ``mix`` = a * mean + (1 - a) * last, or ``concat`` =
            [last; max; mean] (Howard & Ruder 2018, section 3.3). All are over text tokens only.
        mean_weight: weight a of the mean in ``mix``.

    Returns:
        (B, C), or (B, 3 C) for ``concat``.

    Raises:
        InputError: an unknown ``pooling``.
    """
    require(pooling in get_args(Pooling), "pooling", pooling, f"one of {', '.join(get_args(Pooling))}")
    text = attention_mask.unsqueeze(-1).bool()  # (B, T, 1)
    parts = {}
    if pooling in ("last", "mix", "concat"):
        index = last_token_index(attention_mask).unsqueeze(-1).expand(-1, 1, hidden.size(-1))
        parts["last"] = hidden.gather(1, index).squeeze(1)
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
        dropout: dropout probability in training.
        num_dropout_samples: number of dropout masks per row in training. In evaluation there is one pass without
            dropout.

    Raises:
        InputError: ``num_dropout_samples`` is below 1.
    """

    def __init__(self, n_features: int, num_classes: int, dropout: float = 0.0, num_dropout_samples: int = 1) -> None:
        super().__init__()
        require(num_dropout_samples >= 1, "num_dropout_samples", num_dropout_samples, "at least 1")
        self.dropout, self.num_dropout_samples = dropout, num_dropout_samples
        self.linear = nn.Linear(n_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits, once per dropout mask.

        Args:
            features: (B, n_features).

        Returns:
            (n, B, K) with n = ``num_dropout_samples`` in training and 1 in evaluation.
        """
        n = self.num_dropout_samples if self.training and self.dropout else 1
        features = dropout(features.expand(n, *features.shape), self.dropout, self.training)
        return self.linear(features)


class Verbalizer(nn.Module):
    """Language-model head restricted to one label word, a single token, per class (Schick & Schütze 2021).

    The logits are rows of the tied token embedding times the hidden state. The head has no parameters, so that
    a model classifies without training.

    Args:
        token_ids: the token id of the label word of each class, K ids.
    """

    token_ids: Tensor

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__()
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        """Compute the logits of the label words.

        Args:
            features: (B, C), hidden states at the last text token.
            embedding: (V, C), the tied token embedding.

        Returns:
            (1, B, K).
        """
        return F.linear(features, embedding[self.token_ids]).unsqueeze(0)


def classification_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, average: Literal["loss", "logits"] = "loss"
) -> Tensor:
    """Compute the cross-entropy of every row from the logits of n dropout masks (Inoue 2019).

    With label smoothing e the target distribution is ``(1 - e) * one_hot(y) + e / K``, as in
    :func:`torch.nn.functional.cross_entropy`.

    Args:
        logits: (n, B, K), one slice per dropout mask.
        labels: (B,) class indices.
        label_smoothing: e, in [0, 1].
        average: ``loss``: the mean of the losses of the masks (Inoue 2019, eq. 1); ``logits``: the loss of the mean
            logits.

    Returns:
        (B,).
    """
    if average == "logits":
        logits = logits.mean(0, keepdim=True)
    n, B, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(n), label_smoothing=label_smoothing, reduction="none")
    return losses.view(n, B).mean(0)
