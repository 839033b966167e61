"""GPT-2 with a linear head on pooled hidden states, for transformers; written by gpt2_pl (Apache-2.0).

``AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)`` runs the copy of this file in the
folder of an exported model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledGPT2Config(GPT2Config):
    """Configuration of :class:`PooledGPT2ForSequenceClassification`.

    Args:
        pooling: ``last`` token, ``mean``, ``max``, ``mix`` = a * mean + (1 - a) * last, or ``concat`` of last, max and
            mean.
        mean_weight: weight a of the mean in ``mix``.
    """

    model_type = "gpt2_pooled"
    pooling: str = "mean"
    mean_weight: float | int = 0.7


class PooledGPT2ForSequenceClassification(GPT2PreTrainedModel):
    """Classifier, or regressor with ``num_labels`` 1, of texts that are padded on either side.

    Args:
        config: its configuration.
    """

    config_class = PooledGPT2Config

    def __init__(self, config: PooledGPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        width = config.n_embd * (3 if config.pooling == "concat" else 1)
        self.score = nn.Linear(width, config.num_labels or 1)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Compute the logits (B, K) and, with labels, the loss.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for text and 0 for padding; by default everything is text.
            labels: (B,) classes, or numbers of a regressor.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        hidden = self.transformer(input_ids, attention_mask=mask, position_ids=positions).last_hidden_state
        logits = self.score(self._pool(hidden, mask))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits.squeeze(1), labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool the hidden states (B, T, C) of the text of every row into one vector."""
        text, pooling = mask.bool().unsqueeze(-1), self.config.pooling
        index = (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).argmax(1)
        last = hidden[torch.arange(len(hidden), device=hidden.device), index]
        largest = hidden.masked_fill(~text, -torch.inf).amax(1)
        mean = hidden.masked_fill(~text, 0.0).sum(1) / text.sum(1)
        if pooling == "concat":
            return torch.cat([last, largest, mean], dim=-1)
        if pooling == "mix":
            return self.config.mean_weight * mean + (1.0 - self.config.mean_weight) * last
        return {"last": last, "max": largest, "mean": mean}[pooling]
