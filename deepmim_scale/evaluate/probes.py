"""k-NN and linear probes on frozen features, as plain functions on arrays.

Legend: N training samples, M test samples, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

NEIGHBORS = 5
TEMPERATURE = 0.07
FOLDS = 5
ROWS = 1024  # test samples that are compared at once
# Strengths of regularization that cross-validation chooses from.
STRENGTHS = np.logspace(-3, 2, 6)


def _standardized(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(0), train.std(0) + 1e-6
    return (train - mean) / std, (test - mean) / std


def _vote(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    expected: np.ndarray,
    num_neighbors: int,
    weigh: Callable[[np.ndarray], np.ndarray],
) -> float:
    """Each of the nearest by cosine votes for its class with a weight that its cosine gives."""
    train = train / (np.linalg.norm(train, axis=1, keepdims=True) + 1e-12)
    test = test / (np.linalg.norm(test, axis=1, keepdims=True) + 1e-12)
    right = 0
    for first in range(0, len(test), ROWS):
        part = slice(first, first + ROWS)
        similarity = test[part] @ train.T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :num_neighbors]
        weights = weigh(np.take_along_axis(similarity, nearest, axis=1))
        votes = np.zeros((len(similarity), labels.max() + 1))
        for rank in range(num_neighbors):
            np.add.at(votes, (np.arange(len(votes)), labels[nearest[:, rank]]), weights[:, rank])
        right += int((votes.argmax(1) == expected[part]).sum())
    return right / len(test)


def knn_centered(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray
) -> float:
    """Accuracy of 5 nearest neighbors by cosine after subtracting the training mean.

    train [N, F], labels [N], test [M, F], expected [M].
    """
    mean = train.mean(0)
    return _vote(train - mean, labels, test - mean, expected, NEIGHBORS, lambda cosine: cosine)


def knn_standardized(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray
) -> float:
    """Accuracy of 5 nearest neighbors by cosine of standardized features (shapes as above)."""
    train, test = _standardized(train, test)
    return _vote(train, labels, test, expected, NEIGHBORS, lambda cosine: cosine)


def knn_weighted(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray, k: int = 20
) -> float:
    """Accuracy of k nearest neighbors by cosine with weights exp(cosine / 0.07) (shapes as above).

    The protocol of Wu et al. 2018 (instance discrimination) and of DINO: features as they are.
    """
    return _vote(train, labels, test, expected, k, lambda cosine: np.exp(cosine / TEMPERATURE))


def linear(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    expected: np.ndarray,
    num_splits: int = FOLDS,
) -> float:
    """Accuracy of logistic regression on standardized features (shapes as above).

    C is the best over `num_splits` of the 5 splits of cross-validation.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    train, test = _standardized(train, test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak regularization may stop before it converges
        splits = list(StratifiedKFold(FOLDS).split(train, labels))[:num_splits]
        search = GridSearchCV(LogisticRegression(max_iter=100), {"C": STRENGTHS}, cv=splits)
        return float(search.fit(train, labels).score(test, expected))


PROBES = {"kNN centered": knn_centered, "kNN standardized": knn_standardized, "linear": linear}
