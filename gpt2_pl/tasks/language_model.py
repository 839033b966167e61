"""Language modelling: every token predicts the next."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from gpt2_pl.losses import cross_entropy
from gpt2_pl.tasks.base import Task

Batch = dict[str, Any]


class Perplexity(MeanMetric):
    """exp of the mean loss per token."""

    def compute(self) -> Tensor:
        """The perplexity of everything entered."""
        return super().compute().exp()


class LanguageModel(Task):
    """Learns to continue text, through the head that is tied to the token embedding.

    Batches hold ``input_ids`` (B, T), padded on the right, and ``targets`` (B, T): the token that follows each, or -100
    where nothing is predicted. Losses are means per target token; perplexity is exp of that. With several processes a
    batch also holds ``global_tokens``, the number of targets on all of them.

    Args:
        **kwargs: as in :class:`~gpt2_pl.tasks.base.Task`.
    """

    monitor = "val/loss"
    mode = "min"
    table_scores = ("loss", "perplexity")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = nn.ModuleDict(
            {
                f"{split}_metrics": nn.ModuleDict({"loss": MeanMetric(), "perplexity": Perplexity()})
                for split in ("train", "val", "test")
            }
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of a batch's losses and its number of targets."""
        return cross_entropy(self.core(batch["input_ids"]), self.core.head_weight, batch["targets"])

    def _step(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        total, n_targets = self(batch)
        mean = total.detach() / n_targets
        for name, metric in cast(nn.ModuleDict, self.metrics[f"{split}_metrics"]).items():
            cast(Metric, metric).update(mean, n_targets)
            self.log(f"{split}/{name}", cast(Metric, metric), on_step=False, on_epoch=True, batch_size=int(n_targets))
        return total, n_targets

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss over the targets of the global batch, as this process's share of it."""
        total, n_targets = self._step(batch, "train")
        loss = total * (self.trainer.world_size / batch.get("global_tokens", n_targets))
        self.log("train/step_loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Enter a batch in the validation metrics."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Enter a batch in the test metrics."""
        self._step(batch, "test")
