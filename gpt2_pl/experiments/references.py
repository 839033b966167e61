"""Reference baselines: predictions of models that every fine-tuned model should beat.

A report without them cannot show that a strategy has learned more than word counts give. scikit-learn is the optional
dependency ``gpt2_pl[references]``.

References:
    Wang and Manning (2012), Baselines and Bigrams: Simple, Good Sentiment and Topic Classification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_pl.errors import InputError
from gpt2_pl.experiments.statistics.contrast import Floats

Texts = Sequence[tuple[str, ...]]
"""Texts of each row: one text, or the two texts of a pair."""

_CS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # inverse strengths of the L2 penalty; cross-validation chooses one
_NUM_FOLDS = 5
_MAX_ITERATIONS = 2000
_BLOCK = 256  # rows whose similarities are in memory at a time


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


def mean_label(labels: Floats, num_rows: int) -> Floats:
    """Predict the mean of the training labels for every row.

    Args:
        labels: (N,) training labels.
        num_rows: number of rows M to predict.

    Returns:
        Numbers (M,).
    """
    return np.full(num_rows, labels.mean())


def bag_of_words(
    train_texts: Texts, labels: NDArray[Any], texts: Mapping[str, Texts], num_classes: int | None
) -> dict[str, Floats]:
    """Predict with logistic or ridge regression on TF-IDF of words and word pairs.

    The features of a pair of texts are the absolute difference and the product of the features of its texts.

    Args:
        train_texts: texts of the N training rows.
        labels: (N,) training labels.
        texts: texts of the M rows to predict, by split.
        num_classes: number of classes K; None for labels that are numbers.

    Returns:
        Probabilities (M, K), or numbers (M,), by split.

    Raises:
        InputError: scikit-learn is not installed, or the training rows have one class.
    """
    with _scikit_learn("bag_of_words"):
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit([text for row in train_texts for text in row])

    def features(rows: Texts) -> Any:
        first, *second = (vectorizer.transform([row[i] for row in rows]) for i in range(len(rows[0])))
        return hstack([abs(first - second[0]), first.multiply(second[0])]).tocsr() if second else first

    rows = {split: features(of_split) for split, of_split in texts.items()}
    return _fit_and_predict("bag_of_words", features(train_texts), labels, rows, num_classes)


def linear_model(
    train_features: Floats, labels: NDArray[Any], features: Mapping[str, Floats], num_classes: int | None
) -> dict[str, Floats]:
    """Predict with logistic or ridge regression on dense features, standardized on the training rows.

    Args:
        train_features: (N, C) features of the training rows.
        labels: (N,) training labels.
        features: (M, C) features of the rows to predict, by split.
        num_classes: number of classes K; None for labels that are numbers.

    Returns:
        Probabilities (M, K), or numbers (M,), by split.

    Raises:
        InputError: scikit-learn is not installed, or the training rows have one class.
    """
    mean, std = train_features.mean(0), train_features.std(0)
    std = np.where(std > 0, std, 1.0)
    scaled = {split: (of_split - mean) / std for split, of_split in features.items()}
    return _fit_and_predict("frozen_features", (train_features - mean) / std, labels, scaled, num_classes)


def random_continuation(targets: Sequence[str], num_rows: int, seed: int) -> list[str]:
    """Return the target of a random training row for every row, drawn with replacement.

    Args:
        targets: targets of the training rows.
        num_rows: number of rows.
        seed: seed of the draws.
    """
    return [targets[i] for i in np.random.default_rng(seed).integers(len(targets), size=num_rows)]


def nearest_source(train_sources: Sequence[str], targets: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Return the target of the training row with the most similar source for every row.

    The similarity is the cosine of TF-IDF vectors of words; of equally similar rows the first counts.

    Args:
        train_sources: sources of the N training rows.
        targets: targets of the N training rows.
        sources: sources of the M rows.

    Raises:
        InputError: scikit-learn is not installed.
    """
    with _scikit_learn("nearest_source"):
        from sklearn.feature_extraction.text import TfidfVectorizer
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+")
    train = vectorizer.fit_transform(train_sources)  # rows have norm 1, so that products are cosines
    found: list[str] = []
    for start in range(0, len(sources), _BLOCK):
        products = vectorizer.transform(sources[start : start + _BLOCK]) @ train.T
        found += [targets[i] for i in products.toarray().argmax(1)]
    return found


def _fit_and_predict(
    name: str, train_features: Any, labels: NDArray[Any], features: Mapping[str, Any], num_classes: int | None
) -> dict[str, Floats]:
    """Fit a linear model whose L2 penalty 5-fold cross-validation on the training rows chooses, and predict."""
    if num_classes is None:
        return _fit_ridge(name, train_features, labels, features)
    with _scikit_learn(name):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"{name} needs training rows of at least 2 classes", key="only", value=name)
    model = LogisticRegression(max_iter=_MAX_ITERATIONS)
    folds = min(_NUM_FOLDS, int(counts.min()))
    if folds > 1:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=0)
        model = GridSearchCV(model, {"C": _scales(train_features)}, cv=splitter, scoring="accuracy")
    model.fit(train_features, labels)
    predicted = {}
    for split, rows in features.items():
        predicted[split] = np.zeros((rows.shape[0], num_classes))
        predicted[split][:, classes] = model.predict_proba(rows)
    return predicted


def _fit_ridge(name: str, train_features: Any, labels: Floats, features: Mapping[str, Any]) -> dict[str, Floats]:
    """Fit a ridge regression whose penalty cross-validation chooses by the squared error, and predict."""
    with _scikit_learn(name):
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import GridSearchCV, KFold
    if len(labels) < 2:
        raise InputError(f"{name} needs at least 2 training rows", key="only", value=name)
    splitter = KFold(min(_NUM_FOLDS, len(labels)), shuffle=True, random_state=0)
    penalties = {"alpha": [1 / C for C in _scales(train_features)]}
    model = GridSearchCV(Ridge(), penalties, cv=splitter, scoring="neg_mean_squared_error")
    model.fit(train_features, labels)
    return {split: model.predict(rows) for split, rows in features.items()}


def _scales(features: Any) -> list[float]:
    """Return the candidates of the inverse penalty, relative to the mean squared norm of a row."""
    squares = features.multiply(features).sum() if hasattr(features, "multiply") else float(np.square(features).sum())
    return [C * features.shape[0] / float(squares) for C in _CS]


@contextmanager
def _scikit_learn(name: str) -> Iterator[None]:
    """Turn a missing scikit-learn into an error that says how to install it."""
    try:
        yield
    except ImportError:
        message = f"{name} needs scikit-learn; install it with: pip install 'gpt2_pl[references]'"
        raise InputError(message, key="only", value=name) from None
