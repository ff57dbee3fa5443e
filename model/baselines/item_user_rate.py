"""The baseline to beat: log-odds of smoothed item and user rates, added (and of pages, if wanted).

    p = sigmoid( l + sum over f of ( logit( (positives_f + s_f * m) / (shown_f + s_f) ) - l ) ),   l = logit(m)

m is the mean label; positives_f and shown_f count past interactions with the same value of feature f, s_f smooths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from components.errors import BadInput

SMOOTHING = {"item": 20.0, "user": 5.0, "page": 20.0}
"""Pseudo-counts per feature."""


@dataclass
class _Counts:
    keys: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    shown: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    positive: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, keys: NDArray[np.int64], labels: NDArray[np.float64]) -> None:
        merged, place = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        place = place.reshape(-1)
        shown = np.concatenate([self.shown, np.ones(len(keys))])
        positive = np.concatenate([self.positive, labels])
        self.shown = np.bincount(place, shown, len(merged)).astype(np.float64)
        self.positive = np.bincount(place, positive, len(merged)).astype(np.float64)
        self.keys = merged

    def get(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        place = np.searchsorted(self.keys, keys)
        known = (place < len(self.keys)) & (np.append(self.keys, 0)[place] == keys)
        shown, positive = np.append(self.shown, 0.0)[place], np.append(self.positive, 0.0)[place]
        return np.where(known, shown, 0.0), np.where(known, positive, 0.0)


class ItemUserRate:
    """Counts of one action per item, user and, optionally, page. Frozen unless `update` is called again."""

    def __init__(self, *, with_page: bool = False, smoothing: Mapping[str, float] = SMOOTHING) -> None:
        self.features = ("item", "user", "page") if with_page else ("item", "user")
        self.smoothing = dict(smoothing)
        self._counts = {name: _Counts() for name in self.features}
        self._shown, self._positive = 0, 0.0

    def update(self, columns: Mapping[str, NDArray[np.int64]], labels: NDArray[np.bool_]) -> None:
        """Count interactions. columns: int64 ids per feature name; labels: whether the action happened."""
        y = np.asarray(labels, dtype=np.float64)
        self._shown += len(y)
        self._positive += float(y.sum())
        for name, counts in self._counts.items():
            counts.add(np.asarray(columns[name], dtype=np.int64), y)

    def predict(self, columns: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
        """Probabilities of the action. Raises BadInput before both outcomes have been counted."""
        if not 0 < self._positive < self._shown:
            raise BadInput("the baseline has not seen both outcomes yet; update it with past interactions first")
        mean = self._positive / self._shown
        base = _logit(np.array(mean))
        total = np.full(len(columns["item"]), float(base))
        for name, counts in self._counts.items():
            shown, positive = counts.get(np.asarray(columns[name], dtype=np.int64))
            s = self.smoothing[name]
            total += _logit((positive + s * mean) / (shown + s)) - base
        return 1 / (1 + np.exp(-total))


def _logit(p: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(p) - np.log1p(-p)
