"""The paper's synthetic stream (arXiv 2402.17152, appendix C): items of categories, a vocabulary that grows.

Each item has one category. A record has up to five categories with a random prior H and a concentration alpha; its n-th
item is drawn, with probability alpha / (alpha + n - 1), from a category by H, else from a category in proportion to how
often the record has seen it; then uniformly among the items of that category that are available by then. So the next
item follows from how often categories came: from an intensity, not from a pattern.

`distinct` is not in the recipe: no item comes twice in a record, and what a record has had is no candidate for what
comes next. `best_hit_rates` is what somebody who knows all categories reaches.
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
    distinct: bool = False

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
    members = item_categories(random, shape)
    order = random.random((shape.records, shape.categories)).argsort(1)[:, :MOST_CATEGORIES]
    kinds = order.shape[1]
    used = np.arange(kinds) < random.integers(1, kinds + 1, shape.records)[:, None]
    prior = np.where(used, random.exponential(size=used.shape), 0.0)
    prior /= prior.sum(1, keepdims=True)
    alpha = random.uniform(1.0, 500.0, shape.records)
    chosen = _categories(random, prior, alpha, shape.length)
    out = np.zeros(chosen.shape, dtype=np.int64)
    for record in range(shape.records):
        available = shape.available(record)
        for column in np.flatnonzero(used[record]):
            own = members[order[record, column]]
            own = own[: max(int(np.searchsorted(own, available)), 1)]  # one that has none yet offers its first item
            places = chosen[record] == column
            out[record, places] = _draw(random, own, int(places.sum()), shape.distinct)
    return out


def item_categories(random: np.random.Generator, shape: StreamShape) -> list[Int64s]:
    """The items of each category, ascending; the first draw of a stream's generator."""
    return [np.sort(part) for part in np.array_split(random.permutation(shape.items), shape.categories)]


def _draw(random: np.random.Generator, items: Int64s, count: int, distinct: bool) -> Int64s:
    """So many of the items; distinct ones as long as there are any, then from the beginning."""
    if not distinct:
        return random.choice(items, count)
    return np.resize(random.permutation(items), count)


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


def best_hit_rates(stream: Int64s, shape: StreamShape, seed: int, cuts: tuple[int, ...]) -> dict[str, float]:
    """hr@k in the second half of the test records of who knows each item's category and puts the most frequent first.

    The expectation over the draw of the item within its category: what no model passes by much.
    """
    members = item_categories(np.random.default_rng(seed), shape)
    category = np.zeros(shape.items, dtype=np.int64)
    for number, own in enumerate(members):
        category[own] = number
    found: dict[int, list[float]] = {k: [] for k in cuts}
    for record in range(shape.first_test, shape.records):
        kinds, available = category[stream[record]], shape.available(record)
        sizes = np.array([np.searchsorted(own, available) for own in members])
        for n in range(shape.length // 2, shape.length):
            counts = np.bincount(kinds[:n], minlength=shape.categories)
            left = np.maximum(sizes - counts, 1) if shape.distinct else np.maximum(sizes, 1)
            before = left[
                (counts > counts[kinds[n]]) | ((counts == counts[kinds[n]]) & (np.arange(len(counts)) < kinds[n]))
            ]
            for k in cuts:
                found[k].append(float(np.clip((k - before.sum()) / left[kinds[n]], 0.0, 1.0)))
    return {f"hr@{k}": float(np.mean(values)) for k, values in found.items()}
