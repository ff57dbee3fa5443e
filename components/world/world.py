"""The world's truth: which items exist when, and how likely a user is to act on one.

    logit p(click) = base + interest[user, category] + fashion[item] + user + page - 0.25 ln(1 + position)
    fashion[item]  = trend[category] + appeal[author] + quality[item]
    logit p(long_view | click) = base_l + 0.7 interest + 0.4 fashion + holds[item] - 0.4 ln(duration / 35 s)
    logit p(like | click)      = base_k + 0.8 interest + 0.6 appeal[author]

At the shift, interest is regrouped (another set of categories belongs to each taste) and fashion, pages included,
takes new values correlated with the old by `world_shift_correlation`. A user's history after the shift tells a model
about interest, but fashion is common to all users and only training can learn it.
"""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.errors import BadInput
from components.schemas import ITEMS, TIMESTAMP
from components.windows import to_us
from components.world.config import WorldConfig
from components.world.people import (
    FIRST_USER_ID,
    Floats,
    Ints,
    Items,
    Society,
    first_lead_day,
    items_born_on,
    make_society,
)

DAY_US = 86_400_000_000
BASE_RATES = {"click": 0.22, "long_view": 0.125, "like": 0.028}
"""Mean probability over random users, items, pages and positions before the shift, in every world."""

Bools = NDArray[np.bool_]


class World:
    """Users, items and the probability of every action. Stateless: equal configs agree on every answer.

    All times are int64 UTC microseconds; users and items are given by id.
    """

    def __init__(self, config: WorldConfig) -> None:
        if not config.world_end:
            raise BadInput(
                "world_end is empty; give the time at which the world's history ends, e.g. 2025-01-01T00:00Z"
            )
        self.config = config
        self.society: Society = make_society(config)
        self.end_us, self.shift_us = to_us(config.end), config.shift_us
        self.start_us = self.end_us - round(config.world_history_days * DAY_US)
        self._known: tuple[int, Items] | None = None
        self._base = {"click": 0.0, "long_view": 0.0, "like": 0.0}
        self._base = self._calibrated()

    @property
    def user_ids(self) -> Ints:
        return FIRST_USER_ID + np.arange(self.config.world_users, dtype=np.int64)

    def day_of(self, time_us: Ints | int) -> Floats:
        """World day of a time: real days during history, `world_day_s` long after it."""
        time = np.asarray(time_us, dtype=np.int64)
        past = np.minimum(time, self.end_us) - self.start_us
        live = np.maximum(time - self.end_us, 0)
        return np.asarray(past / DAY_US + live / (self.config.world_day_s * 1e6))

    def time_of(self, day: Floats) -> Ints:
        """The inverse of `day_of`, rounded to microseconds."""
        past = np.minimum(day, self.config.world_history_days)
        live = np.maximum(day - self.config.world_history_days, 0.0)
        return np.rint(self.start_us + past * DAY_US + live * self.config.world_day_s * 1e6).astype(np.int64)

    def items(self, until_us: int) -> Items:
        """All items that appear up to the end of the day of `until_us`, removed ones included, ordered by id."""
        day = max(int(np.floor(self.day_of(until_us))), 0)
        last, parts = (self._known[0], [self._known[1]]) if self._known else (-first_lead_day(self.config) - 1, [])
        if day > last:
            parts += [items_born_on(self.config, self.society, d) for d in range(last + 1, day + 1)]
            self._known = day, Items.joined(parts)  # replaced as a whole: threads may share a world
            return self._known[1]
        return parts[0]

    def alive(self, time_us: int) -> Ints:
        """Ids of the items that can be shown at a time."""
        items, day = self.items(time_us), self.day_of(time_us)
        return items.item_id[(items.born <= day) & (day < items.dies)]

    def catalogue(self, since_us: int | None, until_us: int) -> pa.Table:
        """ITEMS rows of the items that appear in (since, until]; since None: all that history or live time can show."""
        items = self.items(until_us)
        chosen = (items.born <= self.day_of(until_us)) & (items.dies > 0)
        if since_us is not None:
            chosen &= items.born > self.day_of(since_us)
        columns = [
            items.item_id[chosen],
            items.author[chosen] + 1,
            items.category[chosen] + 1,
            items.duration_s[chosen].astype(np.float32),
            pa.array(self.time_of(items.born[chosen])).cast(TIMESTAMP),
            pa.array(self.time_of(items.dies[chosen])).cast(TIMESTAMP),
        ]
        return pa.table([pa.array(c) for c in columns], schema=ITEMS)

    def probabilities(
        self, user_id: Ints | int, item_id: Ints, page: Ints | int, position: Ints, time_us: Ints | int
    ) -> dict[str, Floats]:
        """p(action | shown) for click, long_view and like, and the expected `watch` in seconds; arrays broadcast.

        An item that does not exist (yet, or any more) has probability 0; an unknown user is BadInput.
        """
        user, item, page_, position_, time = np.broadcast_arrays(user_id, item_id, page, position, time_us)
        until = int(time.max(initial=self.end_us))
        index, known = self.find_items(item, until)
        items, day = self.items(until), self.day_of(time)
        exists = known & (items.born[index] <= day) & (day < items.dies[index])
        given = self._conditional(items, self._user_index(user), index, page_, position_, self.era(time))
        click = np.where(exists, _sigmoid(given["click"]), 0.0)
        long_view = _sigmoid(given["long_view"])
        return {
            "click": click,
            "long_view": click * long_view,
            "like": click * _sigmoid(given["like"]),
            "watch": click * items.duration_s[index] * (0.85 * long_view + 0.15 * (1 - long_view)),
        }

    def era(self, time_us: Ints | int) -> Ints:
        """0 before the shift, 1 from it on."""
        time = np.asarray(time_us)
        return np.zeros(time.shape, np.int64) if self.shift_us is None else (time >= self.shift_us).astype(np.int64)

    def find_items(self, item_id: Ints, until_us: int) -> tuple[Ints, Bools]:
        """Index of each id in `items(until_us)` and whether it is there; an index stays valid when items are added."""
        known = self.items(until_us).item_id
        index = np.minimum(np.searchsorted(known, item_id), len(known) - 1)
        return index, known[index] == item_id

    def fashion(self, era: int, items: Items) -> Floats:
        """The log-odds common to all users, per item."""
        society = self.society
        return society.trend[era, items.category] + society.appeal[era, items.author] + items.quality[:, era]

    def _user_index(self, user_id: Ints) -> Ints:
        index = user_id - FIRST_USER_ID
        if index.size and (index.min() < 0 or index.max() >= self.config.world_users):
            raise BadInput(f"user ids of this world are {FIRST_USER_ID} to {self.config.world_users}")
        return index

    def _conditional(
        self, items: Items, user: Ints, index: Ints, page: Ints, position: Ints, era: Ints
    ) -> dict[str, Floats]:
        """Logits of click, and of long_view and like given a click; users and items by index."""
        society, base = self.society, self._base
        category, author = items.category[index], items.author[index]
        interest = society.interest[era, user, category]
        appeal = society.appeal[era, author]
        fashion = society.trend[era, category] + appeal + items.quality[index, era]
        seen_page = np.where((page >= 0) & (page < society.page.shape[1]), page, 0)
        click = interest + fashion + society.user_bias[user] + society.page[era, seen_page] - 0.25 * np.log1p(position)
        long_view = 0.7 * interest + 0.4 * fashion + items.holds[index] - 0.4 * np.log(items.duration_s[index] / 35)
        like = 0.8 * interest + 0.6 * appeal
        return {"click": base["click"] + click, "long_view": base["long_view"] + long_view, "like": base["like"] + like}

    def _calibrated(self) -> dict[str, float]:
        """Intercepts that give BASE_RATES on a sample of random impressions before the shift."""
        rng = np.random.default_rng([self.config.world_seed, 3])
        size = 20_000
        items = self.items(self.end_us)
        user = rng.choice(self.config.world_users, size, p=self.society.activity)
        page = 1 + rng.choice(len(self.society.page_share), size, p=self.society.page_share)
        index, position = rng.integers(0, len(items), size), rng.integers(0, 10, size)
        logits = self._conditional(items, user, index, page, position, np.zeros(size, np.int64))
        base = {"click": _intercept(logits["click"], np.ones(size), BASE_RATES["click"])}
        click = _sigmoid(logits["click"] + base["click"])
        return base | {a: _intercept(logits[a], click, BASE_RATES[a]) for a in ("long_view", "like")}


def now_end(now: datetime) -> str:
    """The world_end of a world that begins to live now: the current minute."""
    return now.replace(second=0, microsecond=0).isoformat()


def _sigmoid(logit: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def _intercept(logits: Floats, weight: Floats, target: float) -> float:
    """b with mean(weight sigmoid(logits + b)) = target, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (weight * _sigmoid(logits + middle)).mean() < target else (low, middle)
    return (low + high) / 2
