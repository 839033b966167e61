"""Scores from a confusion matrix against torchmetrics."""

import pytest
import torch
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from gpt2_pl.metrics import ConfusionScore, accuracy, f1, macro_f1, precision, recall


def batches(K, seed):
    """Yield predictions and labels of batches, in which some classes may be missing."""
    generator = torch.Generator().manual_seed(seed)
    used = torch.randperm(K, generator=generator)[: max(1, K - seed % 3)]
    for size in (1, 7, 30):
        yield tuple(used[torch.randint(len(used), (size,), generator=generator)] for _ in range(2))


def scores(metric, data):
    for prediction, label in data:
        metric.update(prediction, label)
    return metric.compute()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("K", [2, 3, 5])
def test_confusion_scores_equal_torchmetrics(K, seed):
    data = list(batches(K, seed))
    expected = {
        accuracy: MulticlassAccuracy(K, average="micro"),
        macro_f1: MulticlassF1Score(K, average="macro"),
        torch.clone: MulticlassConfusionMatrix(K),
    }
    for score, metric in expected.items():
        torch.testing.assert_close(scores(ConfusionScore(K, score), data), scores(metric, data), check_dtype=False)


@pytest.mark.parametrize("seed", range(4))
def test_confusion_scores_of_one_class_equal_torchmetrics(seed):
    data = list(batches(2, seed))
    for score, metric in {f1: BinaryF1Score(), precision: BinaryPrecision(), recall: BinaryRecall()}.items():
        torch.testing.assert_close(scores(ConfusionScore(2, score, class_index=1), data), scores(metric, data))
