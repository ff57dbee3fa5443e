"""Metrics of ranking and retrieval, in plain numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLIP = 1e-7


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive outranks a negative, ties counting one half.

    NaN without both classes, and with a score that is not a number.
    """
    y, s = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    positives, negatives = int(y.sum()), int((~y).sum())
    if not positives or not negatives or np.isnan(s).any():
        return float("nan")
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(middle_rank[place.reshape(-1)][y].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean binary cross-entropy in nats; probabilities are clipped to [1e-7, 1 - 1e-7]."""
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if not len(y):
        return float("nan")
    p = np.clip(p, CLIP, 1 - CLIP)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log loss over that of always predicting the mean label; below 1 is better than knowing the mean only."""
    y = np.asarray(labels, dtype=np.float64)
    base = float(y.mean()) if len(y) else 0.0
    if base in (0.0, 1.0):
        return float("nan")
    entropy = -(base * np.log(base) + (1 - base) * np.log1p(-base))
    return float(log_loss(y, probabilities) / entropy)


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Sum of predictions over sum of labels: 1 is unbiased, above 1 promises too much; NaN without positives."""
    positives = float(np.asarray(labels, dtype=np.float64).sum())
    return float(np.asarray(probabilities, dtype=np.float64).sum() / positives) if positives else float("nan")


def calibration_curve(
    labels: ArrayLike, probabilities: ArrayLike, bins: int = 10
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean prediction, mean label and count in bins of equal count, ordered by prediction; empty bins are left out."""
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    predicted = np.array([p[group].mean() for group in groups])
    observed = np.array([y[group].mean() for group in groups])
    return predicted, observed, np.array([len(group) for group in groups], dtype=np.int64)


def ranks_of(scores: ArrayLike, own: ArrayLike) -> NDArray[np.int64]:
    """1-based ranks [N] of own scores [N] among scores [N, items], theirs included.

    Equal scores count against it, and so do scores that are not a number: a diverged model finds nothing.
    """
    found: NDArray[np.int64] = (~(np.asarray(scores) < np.asarray(own)[:, None])).sum(1)
    return found


def hit_rate(ranks: ArrayLike, k: int) -> float:
    """Share of 1-based ranks that are at most k."""
    r = np.asarray(ranks)
    return float((r <= k).mean()) if len(r) else float("nan")


def ndcg(ranks: ArrayLike, k: int) -> float:
    """Mean of 1 / log2(rank + 1) where the 1-based rank is at most k, else 0: one relevant item per query."""
    r = np.asarray(ranks, dtype=np.float64)
    return float(np.where(r <= k, 1 / np.log2(r + 1), 0.0).mean()) if len(r) else float("nan")
