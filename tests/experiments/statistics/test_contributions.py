"""Delete-one contributions against recomputation without each text."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from gpt2_pl.experiments.statistics.contributions import (
    MAX_GROUPS,
    accuracy,
    from_clusters,
    from_confusion,
    from_groups,
    from_sums,
    macro_f1,
)


def by_deletion(num_texts, score):
    everything = np.arange(num_texts)
    theta = score(everything)
    return [num_texts * theta - (num_texts - 1) * score(np.delete(everything, i)) for i in everything]


def test_macro_f1_contributions_of_the_published_vector_are_its_values():
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 2])
    theta, contributions = from_confusion(labels, predictions, 3, macro_f1)
    assert theta == pytest.approx(0.8666667, abs=5e-8)
    assert contributions == pytest.approx([1.0889, 1.0889, 0.2, 1.0889, 1.0889, 2.5333], abs=5e-5)


def test_confusion_contributions_equal_deletion_of_each_text():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 4, (2, 60))
    labels[labels == 3] = generator.integers(0, 3, (labels == 3).sum())  # the last class is only predicted

    def f1(kept):
        return sum(
            2 * np.sum((labels[kept] == k) & (predictions[kept] == k))
            / max(1, np.sum(labels[kept] == k) + np.sum(predictions[kept] == k))
            for k in range(4)
        ) / 4  # fmt: skip

    assert from_confusion(labels, predictions, 4, macro_f1)[1] == pytest.approx(by_deletion(60, f1))
    assert from_confusion(labels, predictions, 4, accuracy)[1] == pytest.approx((labels == predictions).astype(float))
    reference = multiclass_f1_score(torch.tensor(predictions), torch.tensor(labels), num_classes=4, average="macro")
    assert from_confusion(labels, predictions, 4, macro_f1)[0] == pytest.approx(float(reference))


def test_sum_contributions_equal_deletion_of_each_text():
    generator = np.random.default_rng(1)
    features = generator.uniform(1, 9, (40, 2))

    def ratio(sums):
        return sums[..., 0] / sums[..., 1]

    theta, contributions = from_sums(features, ratio)
    assert theta == pytest.approx(features[:, 0].sum() / features[:, 1].sum())
    assert contributions == pytest.approx(by_deletion(40, lambda kept: ratio(features[kept].sum(0))))


def test_group_contributions_of_few_texts_equal_deletion_and_of_many_are_bounded():
    values = np.random.default_rng(2).normal(size=1000)
    _, single = from_groups(30, lambda kept: float(np.median(values[kept])))
    assert sorted(single) == pytest.approx(sorted(by_deletion(30, lambda kept: np.median(values[kept]))))
    theta, contributions = from_groups(1000, lambda kept: float(values[kept].mean()))
    assert len(contributions) == MAX_GROUPS
    assert contributions.mean() == pytest.approx(theta)
    again = from_groups(1000, lambda kept: float(values[kept].mean()))[1]
    assert np.array_equal(contributions, again)


def test_cluster_contributions_delete_whole_clusters():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    clusters = [np.array([0, 3]), np.array([1]), np.array([2, 4])]
    theta, contributions = from_clusters(clusters, lambda kept: float(values[kept].sum()))
    assert theta == 31
    assert contributions == pytest.approx([3 * 31 - 2 * 22, 3 * 31 - 2 * 29, 3 * 31 - 2 * 11])
