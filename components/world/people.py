"""Who lives in the world and what it contains: users with tastes, authors, categories, items day by day."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from components.world.config import WorldConfig

TASTES = 12
PAGES = 4
"""Pages are numbered 1 .. PAGES; 0 means none."""

FIRST_USER_ID = 1
FIRST_ITEM_ID = 1_000_000
IDS_PER_DAY = 1_000_000
"""Room for the ids of one day's new items: an id tells the day on which its item appeared."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Society:
    """Everything that does not change from day to day. Effects are in log-odds of a click.

    [e] is the era: 0 before the shift, 1 after it.
    """

    interest: Floats  # [e, user, category]: how much the user likes the category
    activity: Floats  # [user]: probability that a request is this user's
    user_bias: Floats  # [user]: clicks on anything more or less
    trend: Floats  # [e, category]
    appeal: Floats  # [e, author]
    author_category: Ints  # [author]: 0-based main category
    author_weight: Floats  # [author]: share of new items
    page: Floats  # [e, PAGES + 1], page 0 has no effect
    page_share: Floats  # [PAGES]: how often page 1 .. PAGES is asked for


@dataclass(frozen=True)
class Items:
    """Parallel arrays, one entry per item, ordered by item_id."""

    item_id: Ints
    author: Ints  # 0-based; author_id = author + 1
    category: Ints  # 0-based; the catalogue's category = category + 1
    born: Floats  # world day of appearance; day 0 ends with the first day of history
    dies: Floats  # world day of removal
    duration_s: Floats
    quality: Floats  # [item, e], log-odds
    holds: Floats  # log-odds that a click becomes a long view
    noise: Floats  # what the logging policy's popularity knows wrongly

    def __len__(self) -> int:
        return len(self.item_id)

    @staticmethod
    def joined(parts: list[Items]) -> Items:
        return Items(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Items)})


def make_society(config: WorldConfig) -> Society:
    rng = np.random.default_rng([config.world_seed, 1])
    users, categories, authors = config.world_users, config.world_categories, config.world_authors
    taste_map = rng.normal(size=(TASTES, categories))
    regrouped = taste_map[:, rng.permutation(categories)]
    weights = _tastes_of_users(rng, users)
    interest = np.stack([_standardised(weights @ taste_map), _standardised(weights @ regrouped)])
    correlation = config.world_shift_correlation
    activity = rng.lognormal(0.0, 0.8, users)
    popularity = 1.0 / (np.arange(authors) + 5.0)
    return Society(
        interest=(interest if correlation < 1 else interest[[0, 0]]) * 1.0,
        activity=activity / activity.sum(),
        user_bias=rng.normal(0, 0.35, users),
        trend=after_shift(rng, _standardised(rng.normal(size=categories)) * 0.6, correlation),
        appeal=after_shift(rng, _standardised(rng.normal(size=authors)) * 0.5, correlation),
        author_category=rng.permutation(np.arange(authors) % categories),
        author_weight=popularity / popularity.sum(),
        page=after_shift(rng, np.array([0.0, 0.4, 0.1, -0.3, -0.6]), correlation),
        page_share=np.array([0.55, 0.2, 0.15, 0.1]),
    )


def items_born_on(config: WorldConfig, society: Society, day: int) -> Items:
    """The items that appear during world day `day`; depends on the config and the day alone."""
    rng = np.random.default_rng([config.world_seed, 2, day + 1_000_000])
    count = int(rng.poisson(config.world_items / config.world_lifetime_days))
    author = rng.choice(config.world_authors, count, p=society.author_weight)
    elsewhere = rng.integers(0, config.world_categories, count)
    main = society.author_category[author]
    born = np.sort(day + rng.random(count))
    quality = after_shift(rng, rng.normal(0, 0.4, count), config.world_shift_correlation)
    return Items(
        item_id=FIRST_ITEM_ID + (day + first_lead_day(config)) * IDS_PER_DAY + np.arange(count, dtype=np.int64),
        author=author,
        category=np.where(rng.random(count) < 0.8, main, elsewhere),
        born=born,
        dies=born + rng.gamma(4.0, config.world_lifetime_days / 4.0, count),
        duration_s=np.clip(rng.lognormal(np.log(35.0), 0.7, count), 5.0, 240.0).round(1),
        quality=quality.T,
        holds=rng.normal(0, 0.5, count),
        noise=rng.normal(0, 0.8, count),
    )


def first_lead_day(config: WorldConfig) -> int:
    """How many days before the history items begin to appear, so that its first day finds a full catalogue."""
    return int(np.ceil(4 * config.world_lifetime_days))


def after_shift(rng: np.random.Generator, before: Floats, correlation: float) -> Floats:
    """Stack [before, after] with corr(before, after) = correlation and equal spread, so that rates stay the same."""
    fresh = rng.normal(0, before.std() if before.size > 1 else 0.0, before.shape)
    return np.stack([before, correlation * before + np.sqrt(1 - correlation**2) * fresh])


def _tastes_of_users(rng: np.random.Generator, users: int) -> Floats:
    """Two to four tastes per user, unit length."""
    order = rng.random((users, TASTES)).argsort(axis=1)
    held = order < rng.integers(2, 5, (users, 1))
    weights = np.where(held, rng.gamma(3.0, 1.0, (users, TASTES)), 0.0)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True))


def _standardised(values: Floats) -> Floats:
    spread = values.std()
    return np.asarray((values - values.mean()) / (spread if spread > 0 else 1.0))
