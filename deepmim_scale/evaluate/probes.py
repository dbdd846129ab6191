"""k-NN and linear probes on frozen features, as plain functions on arrays.

Legend: N training samples, M test samples, F features.
"""

from __future__ import annotations

import warnings

import numpy as np

NEIGHBOURS = 5
# Strengths of regularisation that cross-validation chooses from.
STRENGTHS = np.logspace(-3, 2, 6)


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(0), train.std(0) + 1e-6
    return (train - mean) / std, (test - mean) / std


def _vote(train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray) -> float:
    train = train / (np.linalg.norm(train, axis=1, keepdims=True) + 1e-12)
    test = test / (np.linalg.norm(test, axis=1, keepdims=True) + 1e-12)
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]
    weights = np.take_along_axis(similarity, nearest, axis=1)
    votes = np.zeros((len(test), labels.max() + 1))
    for rank in range(nearest.shape[1]):
        np.add.at(votes, (np.arange(len(test)), labels[nearest[:, rank]]), weights[:, rank])
    return float((votes.argmax(1) == expected).mean())


def knn_centred(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray
) -> float:
    """Accuracy of 5 nearest neighbours by cosine after subtracting the training mean.

    train [N, F], labels [N], test [M, F], expected [M].
    """
    mean = train.mean(0)
    return _vote(train - mean, labels, test - mean, expected)


def knn_standardised(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray
) -> float:
    """Accuracy of 5 nearest neighbours by cosine of standardised features (shapes as above)."""
    train, test = _standardised(train, test)
    return _vote(train, labels, test, expected)


def linear(train: np.ndarray, labels: np.ndarray, test: np.ndarray, expected: np.ndarray) -> float:
    """Accuracy of logistic regression, its C by 5-fold cross-validation (shapes as above)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    train, test = _standardised(train, test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak regularisation may stop before it converges
        search = GridSearchCV(LogisticRegression(max_iter=100), {"C": STRENGTHS}, cv=5)
        return float(search.fit(train, labels).score(test, expected))


PROBES = {"kNN centred": knn_centred, "kNN standardised": knn_standardised, "linear": linear}
