"""Reference baselines: predictions of models that every fine-tuned model should beat.

A report without them cannot show that a strategy has learned more than word counts give. scikit-learn is the optional
dependency ``gpt2_pl[references]``.

References:
    Wang and Manning (2012), Baselines and Bigrams: Simple, Good Sentiment and Topic Classification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.statistics.contrast import Floats

Texts = Sequence[tuple[str, ...]]
"""Texts of each row: one text, or the two texts of a pair."""

_CS = np.logspace(-2, 2, 9)  # inverse strengths of the L2 penalty; 5-fold cross-validation chooses one
_NUM_FOLDS = 5
_MAX_ITERATIONS = 2000


def majority(labels: NDArray[np.integer], num_rows: int, num_classes: int) -> Floats:
    """Predict the shares of the training labels for every row.

    Args:
        labels: (N,) training labels.
        num_rows: number of rows M to predict.
        num_classes: number of classes K.

    Returns:
        Probabilities (M, K).
    """
    shares = np.bincount(labels, minlength=num_classes) / len(labels)
    return np.tile(shares, (num_rows, 1))


def bag_of_words(train_texts: Texts, labels: NDArray[np.integer], texts: Texts, num_classes: int) -> Floats:
    """Predict with logistic regression on TF-IDF of words and word pairs.

    The features of a pair of texts are the absolute difference and the product of the features of its texts. The
    strength of the L2 penalty is chosen by 5-fold cross-validation on the training rows.

    Args:
        train_texts: texts of the N training rows.
        labels: (N,) training labels.
        texts: texts of the M rows to predict.
        num_classes: number of classes K.

    Returns:
        Probabilities (M, K).

    Raises:
        InputError: scikit-learn is not installed, or the training rows have one class.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
    except ImportError:
        raise InputError(
            "bag_of_words needs scikit-learn; install it with: pip install 'gpt2_pl[references]'", key="reference"
        ) from None
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise InputError("bag_of_words needs training rows of at least 2 classes", key="reference")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit([text for row in train_texts for text in row])

    def features(rows: Texts) -> Any:
        first, *second = (vectorizer.transform([row[i] for row in rows]) for i in range(len(rows[0])))
        if not second:
            return first
        from scipy.sparse import hstack

        return hstack([abs(first - second[0]), first.multiply(second[0])]).tocsr()

    model = LogisticRegression(max_iter=_MAX_ITERATIONS)
    folds = min(_NUM_FOLDS, int(counts.min()))
    if folds > 1:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
        model = GridSearchCV(model, {"C": _CS}, cv=splitter, scoring="accuracy")
    model.fit(features(train_texts), labels)
    probabilities = np.zeros((len(texts), num_classes))
    probabilities[:, classes] = model.predict_proba(features(texts))
    return probabilities
