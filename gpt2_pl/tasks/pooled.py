"""Base class of tasks with a head on the pooled hidden states of a text."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from gpt2_pl.errors import require
from gpt2_pl.heads import ClassificationHead, Pooling, last_token_index, pool
from gpt2_pl.metrics import RowOutputs, SplitMetrics
from gpt2_pl.model import GPT2
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.protocols import KeepingData, ReadableData, RowData
from gpt2_pl.tasks.recorded_step import RecordedStep, reason_not_to_record

Batch = dict[str, Any]


class PooledTask(Task):
    """Task with a linear head on the pooled hidden states of a text; subclasses add the loss and the metrics.

    Batches hold ``input_ids`` (B, T), ``attention_mask`` (B, T) and ``labels`` (B,). Batches of this library's
    datamodules also hold ``row`` (B,), the row numbers, and are padded on the right; other batches may be padded on
    either side. With a frozen GPT-2 and a datamodule of this library, the pooled features of every row are computed
    once, before the first epoch, and reused in training (a linear probe).

    Args:
        pooling: ``last`` token, ``mean``, ``max``, ``mix`` of mean and last, or ``concat`` of last, max and mean.
        mean_weight: weight of the mean in ``mix``, in [0, 1].
        head_dropout: dropout rate before the linear layer, in [0, 1); by default that of the GPT-2.
        num_dropout_samples: number of dropout masks per row (multi-sample dropout).
        cuda_graphs: whether training steps are replayed from CUDA graphs where that is possible: on one GPU, with
            ``torch.optim.AdamW`` and ``fused: true``, without gradient accumulation and hooks. Texts are then padded to
            lengths that are multiples of 8, and a loss that is not finite is reported up to two steps later; its step
            changes nothing.
        **kwargs: arguments of :class:`~gpt2_pl.tasks.base.Task`.

    Raises:
        InputError: a value out of range.
    """

    metrics: SplitMetrics
    outcomes: RowOutputs

    def __init__(
        self,
        pooling: Pooling = "last",
        mean_weight: float = 0.7,
        head_dropout: float | None = None,
        num_dropout_samples: int = 1,
        cuda_graphs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cuda_graphs = cuda_graphs
        require(0.0 <= mean_weight <= 1.0, "model.mean_weight", mean_weight, "in [0, 1]")
        is_rate = head_dropout is None or 0.0 <= head_dropout < 1.0
        require(is_rate, "model.head_dropout", head_dropout, "null or in [0, 1)")
        require(1 <= num_dropout_samples <= 1000, "model.num_dropout_samples", num_dropout_samples, "in [1, 1000]")
        self.pooling, self.mean_weight = pooling, mean_weight
        self.head_dropout = self.config.dropout if head_dropout is None else head_dropout
        self.num_dropout_samples = num_dropout_samples
        self.head: nn.Module | None = None
        self.features: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number of outputs of the head."""

    def configure_model(self) -> None:
        """Build the GPT-2 and the head."""
        super().configure_model()
        if self.head is None:
            self.head = self._make_head()

    def _make_head(self) -> nn.Module:
        """Create the linear head, with the weights that surgery brings."""
        width = self.config.n_embd * (3 if self.pooling == "concat" else 1)
        head = ClassificationHead(width, self.num_outputs, self.head_dropout, self.num_dropout_samples)
        for surgery in self.surgery:
            surgery.load_head(head)
        if self.device_mesh is not None:
            fully_shard(head, mesh=self.device_mesh["data_parallel"])
        return head

    # Steps

    def training_outputs(self, gpt2: GPT2, input_ids: Tensor) -> Tensor:
        """Compute the hidden states that pooling reads."""
        if self.pooling == "last":
            return gpt2(input_ids, output_positions=input_ids.new_full((1, 1), input_ids.size(1) - 1))
        return gpt2(input_ids)

    def training_flops_per_token(self, context: float) -> float | None:
        """Count the operations per token; None if the features are precomputed and only the head is run."""
        return None if self.features else super().training_flops_per_token(context)

    def encode(self, batch: Batch) -> Tensor:
        """Compute pooled hidden states (B, C), or (B, 3 C) for ``concat``.

        With ``last``, the last block computes only the positions that pooling reads.
        """
        mask = batch["attention_mask"]
        # Batches of this library's datamodules are padded on the right, where causal attention needs no mask.
        model_mask = None if "row" in batch else mask
        if self.pooling == "last":
            return self.backbone(batch["input_ids"], model_mask, output_positions=last_token_index(mask)).squeeze(1)
        return pool(self.backbone(batch["input_ids"], model_mask), mask, self.pooling, self.mean_weight)

    def pooled(self, batch: Batch, split: str | None) -> Tensor:
        """Return the pooled features of a batch, which are precomputed for splits of a linear probe."""
        return self.features[split][batch["row"]] if split in self.features else self.encode(batch)

    @abstractmethod
    def compute_losses(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Compute the loss (B,) and the outputs of every row."""

    @abstractmethod
    def update_scores(self, losses: Tensor, outputs: Tensor, batch: Batch, split: str) -> None:
        """Update the metrics of a split with the result of :meth:`compute_losses`, and log them."""

    def _step(self, batch: Batch, split: str) -> Tensor:
        """Update the metrics of a split with a batch, and return the outputs of every row."""
        losses, outputs = self.compute_losses(batch, split)
        self.update_scores(losses, outputs, batch, split)
        return outputs

    @abstractmethod
    def _evaluation_step(self, batch: Batch, split: str) -> None:
        """Update the metrics and the row outputs of a split with a batch."""

    def on_train_start(self) -> None:
        """Record the steps as CUDA graphs if they can be."""
        super().on_train_start()
        self.recorded_step = None
        if reason_not_to_record(self) is None:
            parameters = [p for group in self.trainer.optimizers[0].param_groups for p in group["params"]]
            self.recorded_step = RecordedStep(
                lambda batch: self.compute_losses(batch, "train"), parameters, self.device
            )

    def on_train_end(self) -> None:
        """Free the recorded steps."""
        super().on_train_end()
        self.recorded_step = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss; see :meth:`~gpt2_pl.tasks.base.Task.mean_loss`."""
        B = len(batch["labels"])
        if self.recorded_step is None:
            losses, outputs = self.compute_losses(batch, "train")
            loss, mean = self.mean_loss(losses.sum(), B, batch, batch_idx)
        else:
            weight = float(self.loss_weight(B, batch, batch_idx))
            is_full = batch.get("full_rows", B) == B  # a smaller batch at the end of an epoch is not worth recording
            losses, outputs = self.recorded_step.forward_backward(batch, weight, is_full)
            loss, mean = losses.sum() * weight, losses.mean()
        self.update_scores(losses, outputs, batch, "train")
        self.log_step_loss(mean)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients; a recorded step has already computed them."""
        if self.recorded_step is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.recorded_step.assign_gradients()

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients; a recorded step updates the weights as well, and leaves no gradients."""
        if self.recorded_step is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            by_value = (gradient_clip_algorithm or "norm") == GradClipAlgorithmType.VALUE
            self.recorded_step.update(optimizer, gradient_clip_val or 0.0, by_value)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with a batch."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics with a batch."""
        self._evaluation_step(batch, "test")

    def _row_numbers(self, batch: Batch) -> Tensor:
        """Return the row numbers (B,) of a batch; batches without them are numbered consecutively."""
        if "row" in batch:
            return batch["row"]
        outputs: Any = self.outcomes.row
        start = sum(map(len, outputs))
        return torch.arange(start, start + len(batch["input_ids"]), device=self.device)

    # Precomputed features

    def on_fit_start(self) -> None:
        """Compute the features of all rows once for all epochs, if the GPT-2 is frozen."""
        super().on_fit_start()
        if not self.backbone_frozen or not isinstance(self.datamodule, ReadableData):
            return
        self.backbone.eval()
        for split in ("train", "val"):
            loader = self.datamodule.evaluation_dataloader(split)
            features: Tensor | None = None
            for batch in loader:
                batch = self.trainer.strategy.batch_to_device(batch)
                with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                    batch_features = self.encode(batch).float()
                if features is None:
                    features = batch_features.new_zeros(len(loader.rows), batch_features.size(-1))
                features[batch["row"]] = batch_features
            assert features is not None
            # Each process has computed other rows, and left the others zero.
            self.features[split] = self.trainer.strategy.reduce(features, reduce_op="sum")

    def on_fit_end(self) -> None:
        """Free the features."""
        self.features = {}

    def _source_columns(self, split: str) -> list[str]:
        """Return the names of the cells of :meth:`_source_cells`."""
        kept = self.datamodule.kept_columns(split) if isinstance(self.datamodule, KeepingData) else ()
        return ["row", *kept, "text"]

    def _source_cells(self, split: str, row: int) -> list[object]:
        """Return the number of a row in its file, its kept values and its text; without a file, number and no text."""
        data = self.datamodule
        kept = data.kept_values(split, row) if isinstance(data, KeepingData) else ()
        if not isinstance(data, RowData):
            return [row + 1, *kept, ""]
        return [data.row_number(split, row), *kept, data.text(split, row)]
