"""The paper's synthetic stream (arXiv 2402.17152, appendix C): items of categories, a vocabulary that grows.

Each item has one category. A record has up to five categories with a random prior H and a concentration alpha; its n-th
item is drawn, with probability alpha / (alpha + n - 1), from a category by H, else from a category in proportion to how
often the record has seen it; then uniformly among the items of that category that are available by then. So the next
item follows from how often categories came: from an intensity, not from a pattern.

Two other readings, not in the recipe. `distinct`: no item comes twice in a record, and what a record has had is no
candidate for what comes next. `repeats`: a draw that is not from H repeats one of the record's items, each in
proportion to how often it came, where the recipe would draw another item of its category.
`best_hit_rates` is what somebody who knows all categories reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from components.errors import BadInput

Int64s = NDArray[np.int64]
Reading = Literal["recipe", "distinct", "repeats"]
MOST_CATEGORIES = 5
AVAILABLE_AT_START = 0.4


@dataclass(frozen=True)
class StreamShape:
    """The paper: 20,000 items, 100 categories, 1,000,000 records of 128; the last tenth is the test."""

    items: int = 4000
    categories: int = 20
    records: int = 10_000
    length: int = 128
    test_share: float = 0.1
    reading: Reading = "recipe"

    def __post_init__(self) -> None:
        if not 1 <= self.categories <= self.items:
            raise BadInput(f"{self.categories} categories need as many items at least, and there are {self.items}")

    def available(self, record: int) -> int:
        """How many items there are when a record is made: items are released in the order of their ids."""
        share = AVAILABLE_AT_START + (1 - AVAILABLE_AT_START) * record / self.records
        return max(int(share * self.items), 1)

    @property
    def first_test(self) -> int:
        """The first record of the test."""
        return round(self.records * (1 - self.test_share))


def make_stream(shape: StreamShape, seed: int) -> Int64s:
    """(records, length) items, in the order of time. A function of shape and seed."""
    random = np.random.default_rng(seed)
    members = item_categories(random, shape)
    available = np.array([shape.available(record) for record in range(shape.records)])
    closed = np.array([own[0] for own in members]) >= available[:, None]  # categories that have no item yet: drawn last
    order = (random.random((shape.records, shape.categories)) + closed).argsort(1)[:, :MOST_CATEGORIES]
    kinds = order.shape[1]
    used = np.arange(kinds) < random.integers(1, kinds + 1, shape.records)[:, None]
    used &= ~np.take_along_axis(closed, order, 1)
    prior = np.where(used, random.exponential(size=used.shape), 0.0)
    prior /= prior.sum(1, keepdims=True)
    alpha = random.uniform(1.0, 500.0, shape.records)
    if shape.reading == "repeats":
        chosen = _fresh_categories(random, prior, shape.length)
    else:
        chosen = _categories(random, prior, alpha, shape.length)
    out = np.zeros(chosen.shape, dtype=np.int64)
    for record in range(shape.records):
        for column in np.flatnonzero(used[record]):
            own = members[order[record, column]]
            own = own[: int(np.searchsorted(own, available[record]))]
            places = chosen[record] == column
            out[record, places] = _draw(random, own, int(places.sum()), shape.reading == "distinct")
    return _repeat(random, out, alpha) if shape.reading == "repeats" else out


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


def _fresh_categories(random: np.random.Generator, prior: NDArray[np.float64], length: int) -> Int64s:
    """(records, length): columns of the prior, each draw for itself."""
    edges = prior.cumsum(1)
    drawn = random.random((len(prior), length, 1)) >= edges[:, None, :]
    return np.minimum(drawn.sum(2), prior.shape[1] - 1)


def _repeat(random: np.random.Generator, fresh: Int64s, alpha: NDArray[np.float64]) -> Int64s:
    """fresh, but item n (from 0) is kept with probability alpha / (alpha + n) alone; else a copy of one before it."""
    out = fresh.copy()
    for n in range(1, fresh.shape[1]):
        again = random.random(len(fresh)) >= alpha / (alpha + n)
        place = random.integers(0, n, len(fresh))
        out[again, n] = out[again, place[again]]
    return out


def best_hit_rates(
    stream: Int64s, shape: StreamShape, seed: int, cuts: tuple[int, ...], records: range | None = None
) -> dict[str, float]:
    """hr@k in the second half of the records (those of the test by default) of who knows each item's category.

    Puts the most frequent category first, with `repeats` the most frequent items before all others: the expectation
    over the order among equals, what no model passes by much.
    """
    category = np.zeros(shape.items, dtype=np.int64)
    members = item_categories(np.random.default_rng(seed), shape)
    for number, own in enumerate(members):
        category[own] = number
    found: dict[int, list[float]] = {k: [] for k in cuts}
    for record in records or range(shape.first_test, shape.records):
        sizes = np.array([np.searchsorted(own, shape.available(record)) for own in members])
        for n in range(shape.length // 2, shape.length):
            before, equals = _ahead(stream[record, : n + 1], category, sizes, shape.reading)
            for k in cuts:
                found[k].append(float(np.clip((k - before) / equals, 0.0, 1.0)))
    return {f"hr@{k}": float(np.mean(values)) for k, values in found.items()}


def _ahead(record: Int64s, category: Int64s, sizes: Int64s, reading: Reading) -> tuple[int, int]:
    """How many items the best order puts before the record's last one, and among how many equals it is."""
    *_, item = record
    items, times = np.unique(record[:-1], return_counts=True)
    if reading == "repeats" and item in items:
        own = times[items == item][0]
        return int((times > own).sum()), int((times == own).sum())
    counts = np.bincount(category[record[:-1]], minlength=len(sizes))
    had = np.bincount(category[items], minlength=len(sizes)) if reading != "recipe" else 0
    left, kind = np.maximum(sizes - had, 1), category[item]
    first = (counts > counts[kind]) | ((counts == counts[kind]) & (np.arange(len(counts)) < kind))
    return int(left[first].sum()) + (len(items) if reading == "repeats" else 0), int(left[kind])
