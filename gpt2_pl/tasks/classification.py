"""Base class of text classification tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from gpt2_pl.errors import InputError, require
from gpt2_pl.heads import ClassificationHead, Pooling, Verbalizer, classification_loss, last_token_index, pool
from gpt2_pl.metrics import MetricInfo, RowOutputs, SplitMetrics, WeightedMean, finite
from gpt2_pl.model import GPT2
from gpt2_pl.tasks.base import Task
from gpt2_pl.tasks.protocols import LabelledData, ReadableData, RowData, RowTable, TokenizedData
from gpt2_pl.utils.plots import confusion_image

Batch = dict[str, Any]


class Classifier(Task):
    """Classifier of texts in K classes, from the hidden states of their tokens.

    Batches hold ``input_ids`` (B, T), ``attention_mask`` (B, T) and ``labels`` (B,). Batches of this library's
    datamodules also hold ``row`` (B,), the row numbers, and are padded on the right; other batches may be padded on
    either side. With a frozen GPT-2 and a datamodule of this library, the pooled features of every row are computed
    once, before the first epoch, and reused in training (a linear probe).

    Args:
        num_classes: number of classes K; on the command line that of the datamodule.
        pooling: ``last`` token, ``mean``, ``max``, ``mix`` of mean and last, or ``concat`` of last, max and mean.
        mean_weight: weight of the mean in ``mix``, in [0, 1].
        head: ``linear`` layer, or ``verbalizer``: the language-model scores of one word per class.
        label_words: the verbalizer's words in the order of the classes, each one token, such as " bad", " good".
        label_token_ids: token ids of ``label_words``; by default those of the datamodule's tokenizer.
        head_dropout: dropout rate before the linear layer, in [0, 1); by default that of the GPT-2.
        num_dropout_samples: number of dropout masks per row (multi-sample dropout).
        average: quantity that multi-sample dropout averages, ``loss`` or ``logits``.
        label_smoothing: share of the label's weight that is distributed over all classes, in [0, 1).
        **kwargs: arguments of :class:`~gpt2_pl.tasks.base.Task`.

    Raises:
        InputError: a value out of range, or label words that do not fit the classes.
    """

    monitor = "val/accuracy"
    metric_info: ClassVar[dict[str, MetricInfo]] = {
        "loss": MetricInfo(higher_is_better=False, shown=True),
        "accuracy": MetricInfo(percent=True, shown=True),
        "macro_f1": MetricInfo(percent=True, shown=True),
    }

    def __init__(
        self,
        num_classes: int,
        pooling: Pooling = "last",
        mean_weight: float = 0.7,
        head: Literal["linear", "verbalizer"] = "linear",
        label_words: list[str] | None = None,
        label_token_ids: list[int] | None = None,
        head_dropout: float | None = None,
        num_dropout_samples: int = 1,
        average: Literal["loss", "logits"] = "loss",
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(num_classes >= 2, "model.num_classes", num_classes, "at least 2")
        require(0.0 <= mean_weight <= 1.0, "model.mean_weight", mean_weight, "in [0, 1]")
        is_rate = head_dropout is None or 0.0 <= head_dropout < 1.0
        require(is_rate, "model.head_dropout", head_dropout, "null or in [0, 1)")
        require(1 <= num_dropout_samples <= 1000, "model.num_dropout_samples", num_dropout_samples, "in [1, 1000]")
        require(0.0 <= label_smoothing < 1.0, "model.label_smoothing", label_smoothing, "in [0, 1)")
        n_words, is_linear = None if label_words is None else len(label_words), head == "linear"
        expected = "null with model.head linear" if is_linear else f"{num_classes} words, one for each class"
        require(n_words == (None if is_linear else num_classes), "model.label_words", label_words, expected)
        require(is_linear or pooling == "last", "model.pooling", pooling, "last with model.head verbalizer")
        has_dropout = num_dropout_samples != 1 or bool(head_dropout)
        require(is_linear or not has_dropout, "model.head", head, "linear with dropout of the head")
        trains = is_linear or self.train_base or bool(self.surgery)
        require(trains, "model.head", head, "linear with train_base: false, because the verbalizer has no parameters")
        self.num_classes, self.pooling, self.mean_weight = num_classes, pooling, mean_weight
        self.head_name, self.label_words = head, label_words
        self.head_dropout = self.config.dropout if head_dropout is None else head_dropout
        self.num_dropout_samples, self.average, self.label_smoothing = num_dropout_samples, average, label_smoothing
        self.head: nn.Module | None = None
        self.metrics = SplitMetrics(self._make_metrics)
        self.outcomes = RowOutputs("row", "label", "probability")
        self.features: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Build the GPT-2 and the head."""
        super().configure_model()
        if self.head is not None:
            return
        if self.head_name == "linear":
            width = self.config.n_embd * (3 if self.pooling == "concat" else 1)
            self.head = ClassificationHead(width, self.num_classes, self.head_dropout, self.num_dropout_samples)
            for surgery in self.surgery:
                surgery.load_head(self.head)
            if self.device_mesh is not None:
                fully_shard(self.head, mesh=self.device_mesh["data_parallel"])
        else:
            self.head = Verbalizer(self._label_token_ids())

    def _label_token_ids(self) -> list[int]:
        """Return the token ids of the label words.

        Raises:
            InputError: no tokenizer is available, or a word is not one token.
        """
        if (token_ids := self.hparams["label_token_ids"]) is not None:
            return list(token_ids)
        if not isinstance(self.datamodule, TokenizedData):
            raise InputError("model.head verbalizer requires data.tokenizer, for its label words", key="model.head")
        token_ids = []
        for word in self.label_words or []:
            ids = self.datamodule.tokenizer.encode(word, add_special_tokens=False).ids
            require(len(ids) == 1, "model.label_words", word, "words of one token each, such as ' good'")
            token_ids += ids
        self.hparams["label_token_ids"] = token_ids
        return token_ids

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

    def forward(self, batch: Batch, split: str | None = None) -> Tensor:
        """Compute the logits (n, B, K) of a batch with n dropout masks.

        Args:
            batch: a batch.
            split: the batch's split, whose precomputed features are used if there are any.
        """
        features = self.features[split][batch["row"]] if split in self.features else self.encode(batch)
        if isinstance(self.head, Verbalizer):
            return self.head(features, self.backbone.head_weight)
        assert self.head is not None
        return self.head(features)

    def _step(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Compute the loss of every row (B,) and the probabilities (B, K), and update the split's metrics."""
        logits = self(batch, split).float()
        losses = classification_loss(logits, batch["labels"], self.label_smoothing, self.average)
        probability = logits.detach().mean(0).softmax(-1)
        prediction = self.predict_class(probability, split)
        finite_losses = finite(losses.detach(), split)
        metrics = self.metrics.of(split)
        for name, metric in metrics.items():
            metric.update(*(finite_losses if name == "loss" else (prediction, batch["labels"])))
        self.log_scores(split, {name: metric for name, metric in metrics.items() if name != "confusion"})
        return losses, probability

    def predict_class(self, probability: Tensor, split: str | None = None) -> Tensor:
        """Return the predicted class (B,) for class probabilities (B, K).

        Args:
            probability: class probabilities (B, K).
            split: the split of the rows; None for rows of no split.
        """
        return probability.argmax(-1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss; see :meth:`~gpt2_pl.tasks.base.Task.mean_loss`."""
        losses, _ = self._step(batch, "train")
        loss, mean = self.mean_loss(losses.sum(), len(losses), batch, batch_idx)
        self.log("train/loss_step", mean, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(losses))
        return loss

    def _make_metrics(self) -> dict[str, Metric]:
        """Create the metrics of one split; ``loss`` is updated with losses, the others with predictions and labels."""
        K = self.num_classes
        unchecked: dict[str, Any] = {"validate_args": False}  # Checking labels would synchronize a GPU in every step.
        return {
            "loss": WeightedMean(),
            "accuracy": MulticlassAccuracy(K, average="micro", **unchecked),
            "macro_f1": MulticlassF1Score(K, average="macro", **unchecked),
            "confusion": MulticlassConfusionMatrix(K, **unchecked),
        }

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        _, probability = self._step(batch, split)
        self.outcomes.update(row=self._row_numbers(batch), label=batch["labels"], probability=probability)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the validation metrics with a batch."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the test metrics with a batch."""
        self._evaluation_step(batch, "test")

    def predict_proba(self, batch: Batch) -> Tensor:
        """Compute class probabilities (B, K)."""
        return self(batch).float().mean(0).softmax(-1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute class probabilities (B, K)."""
        probability = self.predict_proba(batch)
        row = self._row_numbers(batch)
        self.outcomes.update(row=row, label=torch.full_like(row, -1), probability=probability)
        return probability

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

    # Metrics

    def _start_epoch(self, split: str) -> None:
        super()._start_epoch(split)
        if split != "predict":  # Lightning resets only metrics that are logged.
            self.metrics.of(split)["confusion"].reset()

    def images(self, split: str) -> dict[str, NDArray[Any]]:
        """Draw the confusion matrix of a split."""
        counts = self.metrics.of(split)["confusion"].compute()
        if not self.trainer.is_global_zero:
            return {}
        title = split if split == "test" else f"{split}, epoch {self.current_epoch + 1}"
        return {"confusion": confusion_image(counts.cpu().numpy(), self._label_names(), title)}

    def _label_names(self) -> list[str]:
        """Return the names of the classes, or their numbers if the data has no names."""
        labels = self.datamodule.labels if isinstance(self.datamodule, LabelledData) else None
        return labels or list(map(str, range(self.num_classes)))

    def row_table(self, split: str) -> RowTable:
        """Return the prediction and the class probabilities of every row, with its number, text and label."""
        outcomes, names = self.outcomes.rows(), self._label_names()
        predictions = self.predict_class(outcomes["probability"], split)
        data = self.datamodule if isinstance(self.datamodule, RowData) else None
        has_labels = split != "predict"

        def rows() -> Iterator[list[object]]:
            columns = (outcomes[key].tolist() for key in ("row", "label", "probability"))
            for row, label, probability, prediction in zip(*columns, predictions.tolist(), strict=True):
                source = [row + 1, ""] if data is None else [data.row_number(split, row), data.text(split, row)]
                probabilities = (f"{p:.6f}" for p in probability)
                yield [*source, *([names[label]] if has_labels else []), names[prediction], *probabilities]

        header = ["row", "text", *(["label"] if has_labels else []), "prediction", *(f"p({name})" for name in names)]
        return RowTable("predictions", header, rows())
