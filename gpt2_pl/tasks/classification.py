"""Base class of text classification tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from gpt2_pl.errors import InputError, require
from gpt2_pl.heads import Verbalizer, classification_loss
from gpt2_pl.metrics import (
    ConfusionScore,
    MetricInfo,
    RowOutputs,
    SplitMetrics,
    WeightedMean,
    accuracy,
    finite,
    macro_f1,
)
from gpt2_pl.tasks.pooled import Batch, PooledTask
from gpt2_pl.tasks.protocols import LabelledData, PredictionForm, RowTable, TokenizedData
from gpt2_pl.utils.plots import confusion_image


class Classifier(PooledTask):
    """Classifier of texts in K classes, from the hidden states of their tokens.

    Args:
        num_classes: number of classes K; on the command line that of the datamodule.
        head: ``linear`` layer, or ``verbalizer``: the language-model scores of one word per class.
        label_words: the verbalizer's words in the order of the classes, each one token, such as " bad", " good".
        label_token_ids: token ids of ``label_words``; by default those of the datamodule's tokenizer.
        average: quantity that multi-sample dropout averages, ``loss`` or ``logits``.
        label_smoothing: share of the label's weight that is distributed over all classes, in [0, 1).
        **kwargs: arguments of :class:`~gpt2_pl.tasks.pooled.PooledTask`.

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
        head: Literal["linear", "verbalizer"] = "linear",
        label_words: list[str] | None = None,
        label_token_ids: list[int] | None = None,
        average: Literal["loss", "logits"] = "loss",
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require(num_classes >= 2, "model.num_classes", num_classes, "at least 2")
        require(0.0 <= label_smoothing < 1.0, "model.label_smoothing", label_smoothing, "in [0, 1)")
        n_words, is_linear = None if label_words is None else len(label_words), head == "linear"
        expected = "null with model.head linear" if is_linear else f"{num_classes} words, one for each class"
        require(n_words == (None if is_linear else num_classes), "model.label_words", label_words, expected)
        require(is_linear or self.pooling == "last", "model.pooling", self.pooling, "last with model.head verbalizer")
        has_dropout = self.num_dropout_samples != 1 or bool(self.hparams["head_dropout"])
        require(is_linear or not has_dropout, "model.head", head, "linear with dropout of the head")
        trains = is_linear or self.train_base or bool(self.surgery)
        require(trains, "model.head", head, "linear with train_base: false, because the verbalizer has no parameters")
        self.num_classes, self.head_name, self.label_words = num_classes, head, label_words
        self.average, self.label_smoothing = average, label_smoothing
        self.metrics = SplitMetrics(self._make_metrics)
        self.outcomes = RowOutputs("row", "label", "probability")

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the head, the number of classes."""
        return self.num_classes

    def _make_head(self) -> nn.Module:
        return super()._make_head() if self.head_name == "linear" else Verbalizer(self._label_token_ids())

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

    def forward(self, batch: Batch, split: str | None = None) -> Tensor:
        """Compute the logits (n, B, K) of a batch with n dropout masks.

        Args:
            batch: a batch.
            split: the batch's split, whose precomputed features are used if there are any.
        """
        features = self.pooled(batch, split)
        if isinstance(self.head, Verbalizer):
            return self.head(features, self.backbone.head_weight)
        assert self.head is not None
        return self.head(features)

    def compute_losses(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Compute the loss of every row (B,) and the class probabilities (B, K)."""
        logits = self(batch, split).float()
        losses = classification_loss(logits, batch["labels"], self.label_smoothing, self.average)
        return losses, logits.detach().mean(0).softmax(-1)

    def update_scores(self, losses: Tensor, outputs: Tensor, batch: Batch, split: str) -> None:
        """Update the metrics of a split with losses (B,) and class probabilities (B, K), and log them."""
        prediction = self.predict_class(outputs, split)
        finite_losses = finite(losses.detach(), split)
        metrics = self.metrics.of(split)
        for name, metric in metrics.items():
            metric.update(*(finite_losses if name == "loss" else (prediction, batch["labels"])))
        self.log_scores(split, {name: metric for name, metric in metrics.items() if name != "confusion"})

    def predict_class(self, probability: Tensor, split: str | None = None) -> Tensor:
        """Return the predicted class (B,) for class probabilities (B, K).

        Args:
            probability: class probabilities (B, K).
            split: the split of the rows; None for rows of no split.
        """
        return probability.argmax(-1)

    def _make_metrics(self) -> dict[str, Metric]:
        """Create the metrics of one split; ``loss`` is updated with losses, the others with predictions and labels."""
        return {
            "loss": WeightedMean(),
            "accuracy": ConfusionScore(self.num_classes, accuracy),
            "macro_f1": ConfusionScore(self.num_classes, macro_f1),
            "confusion": ConfusionScore(self.num_classes, torch.clone),
        }

    def _evaluation_step(self, batch: Batch, split: str) -> None:
        probability = self._step(batch, split)
        self.outcomes.update(row=self._row_numbers(batch), label=batch["labels"], probability=probability)

    def predict_proba(self, batch: Batch) -> Tensor:
        """Compute class probabilities (B, K)."""
        return self(batch).float().mean(0).softmax(-1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute class probabilities (B, K)."""
        probability = self.predict_proba(batch)
        row = self._row_numbers(batch)
        self.outcomes.update(row=row, label=torch.full_like(row, -1), probability=probability)
        return probability

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
        has_labels, data = split != "predict", self.datamodule
        is_numbers = not has_labels and isinstance(data, PredictionForm) and data.predict_labels == "numbers"
        shown = range(self.num_classes) if is_numbers else names

        def rows() -> Iterator[list[object]]:
            columns = (outcomes[key].tolist() for key in ("row", "label", "probability"))
            for row, label, probability, prediction in zip(*columns, predictions.tolist(), strict=True):
                source = self._source_cells(split, row)
                probabilities = (f"{p:.6f}" for p in probability)
                yield [*source, *([names[label]] if has_labels else []), shown[prediction], *probabilities]

        header = [*self._source_columns(split), *(["label"] if has_labels else []), "prediction"]
        return RowTable("predictions", [*header, *(f"p({name})" for name in names)], rows())
