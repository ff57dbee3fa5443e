"""The paper's synthetic stream (arXiv 2402.17152, appendix C): items of categories, a vocabulary that grows.

Each item has one category. A record has up to five categories with a random prior H and a concentration alpha; its n-th
item is drawn, with probability alpha / (alpha + n - 1), from a category by H, else from a category in proportion to how
often the record has seen it; then uniformly among the items of that category that are available by then. So the next
item follows from how often categories came: from an intensity, not from a pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
MOST_CATEGORIES = 5
AVAILABLE_AT_START = 0.4


@dataclass(frozen=True)
class StreamShape:
    """The paper: 20,000 items, 100 categories, 1,000,000 records of 128; the last tenth is the test."""

    items: int = 4000
    categories: int = 20
    records: int = 20_000
    length: int = 128
    test_share: float = 0.1

    def available(self, record: int) -> int:
        """How many items there are when a record is made: items are released in the order of their ids."""
        share = AVAILABLE_AT_START + (1 - AVAILABLE_AT_START) * record / self.records
        return min(int(share * self.items), self.items)

    @property
    def first_test(self) -> int:
        """The first record of the test."""
        return round(self.records * (1 - self.test_share))


def make_stream(shape: StreamShape, seed: int) -> Int64s:
    """(records, length) items, in the order of time. A function of shape and seed."""
    random = np.random.default_rng(seed)
    members = [np.sort(part) for part in np.array_split(random.permutation(shape.items), shape.categories)]
    order = random.random((shape.records, shape.categories)).argsort(1)[:, :MOST_CATEGORIES]
    kinds = order.shape[1]
    used = np.arange(kinds) < random.integers(1, kinds + 1, shape.records)[:, None]
    prior = np.where(used, random.exponential(size=used.shape), 0.0)
    prior /= prior.sum(1, keepdims=True)
    alpha = random.uniform(1.0, 500.0, shape.records)
    chosen = _categories(random, prior, alpha, shape.length)
    category = np.take_along_axis(order, chosen, 1)
    limits = np.array([shape.available(record) for record in range(shape.records)])
    sizes = np.stack([np.searchsorted(part, limits) for part in members])  # (categories, records)
    sizes = np.maximum(sizes, 1)  # a category without an item by then offers its first one
    place = (random.random(category.shape) * sizes[category, np.arange(shape.records)[:, None]]).astype(np.int64)
    table = np.stack([np.resize(part, max(map(len, members))) for part in members])
    items: Int64s = table[category, place]
    return items


def _categories(
    random: np.random.Generator, prior: NDArray[np.float64], alpha: NDArray[np.float64], length: int
) -> Int64s:
    """(records, length): columns of the prior, by the Chinese restaurant process over it."""
    counts = np.zeros_like(prior)
    rows = np.arange(len(prior))
    out = np.zeros((len(prior), length), dtype=np.int64)
    for n in range(length):
        weight = alpha[:, None] * prior + counts  # over alpha + n: the two draws of the recipe in one
        edges = weight.cumsum(1)
        drawn = (random.random(len(prior)) * edges[:, -1])[:, None] >= edges
        out[:, n] = np.minimum(drawn.sum(1), prior.shape[1] - 1)
        counts[rows, out[:, n]] += 1
    return out
