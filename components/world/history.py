"""The world's past as the event log would have seen it: slates shown by a simple logging policy, and feedback.

Three slates in ten are random, the others follow popularity; some events are logged twice, some are received
hours late, and some rows are malformed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from components.ingest.batch import actions_table, impressions_table
from components.request_ids import request_ids
from components.schemas import IMPRESSIONS, TIMESTAMP
from components.world.feedback import draw_feedback
from components.world.people import Ints
from components.world.world import DAY_US, World

SLATE = 10
RANDOM_SHARE = 0.3


@dataclass(frozen=True)
class History:
    """Valid events (IMPRESSIONS and ACTION_EVENTS tables, duplicates included) and malformed rows as dicts.

    A malformed row has the key `kind` (impression or action) and holds at least one value that no log may accept.
    """

    impressions: pa.Table
    actions: pa.Table
    malformed: list[dict[str, Any]]


def simulate_history(world: World) -> History:
    """The history of `world_history_days` before the world's end; the same world gives the same bytes."""
    config = world.config
    rng = np.random.default_rng([config.world_seed, 4])
    times = _request_times(world, rng, max(1, round(config.world_impressions / SLATE)))
    shown = _slates(world, rng, times)
    impressions = _impressions(world, rng, shown)
    actions = _actions(world, rng, shown)
    malformed = [
        *_malformed(rng, "impression", impressions, config.world_malformed_share),
        *_malformed(rng, "action", actions, config.world_malformed_share),
    ]
    return History(
        impressions=_logged_twice(world, rng, impressions),
        actions=_logged_twice(world, rng, actions),
        malformed=malformed,
    )


@dataclass(frozen=True)
class _Shown:
    """Impressions as parallel arrays, ordered by request, then position."""

    request_id: Ints
    user: Ints
    item: Ints
    page: Ints
    position: Ints
    time_us: Ints


def _request_times(world: World, rng: np.random.Generator, count: int) -> Ints:
    """Sorted request times, busier in the evening: rate 1 + 0.6 sin(2 pi (hour - 13) / 24)."""
    candidates = rng.integers(world.start_us, world.end_us, 3 * count)
    hour = candidates % DAY_US / 3.6e9
    accepted = candidates[rng.random(3 * count) * 1.6 < 1 + 0.6 * np.sin(2 * np.pi * (hour - 13) / 24)]
    return np.sort(np.resize(accepted if len(accepted) else candidates, count))  # of a few perhaps none


def _slates(world: World, rng: np.random.Generator, times: Ints) -> _Shown:
    society, count = world.society, len(times)
    user = world.user_ids[rng.choice(world.config.world_users, count, p=society.activity)]
    page = 1 + rng.choice(len(society.page_share), count, p=society.page_share)
    blocks = [_choose(world, rng, block) for block in np.array_split(times, max(1, count // 500))]
    request_id = request_ids(world.config.world_seed, world.end_us, np.arange(count))
    size = np.concatenate([np.full(len(block), block.shape[1]) for block in blocks])  # less where fewer are alive
    return _Shown(
        request_id=np.repeat(request_id, size),
        user=np.repeat(user, size),
        item=np.concatenate([block.ravel() for block in blocks]),
        page=np.repeat(page, size),
        position=np.concatenate([np.tile(np.arange(block.shape[1]), len(block)) for block in blocks]),
        time_us=np.repeat(times, size),
    )


def _choose(world: World, rng: np.random.Generator, times: Ints) -> Ints:
    """Item ids [request, position]: without replacement (Gumbel top-k), by popularity or at random per request slot."""
    items, day = world.items(world.end_us), world.day_of(times)
    near = (items.born <= day.max()) & (items.dies > day.min())
    index = np.flatnonzero(near)
    era = world.era(times)
    popularity = np.stack([world.fashion(e, items)[index] + items.noise[index] for e in (0, 1)])[era]
    by_chance = rng.random((len(times), 1)) < RANDOM_SHARE
    score = np.where(by_chance, 0.0, popularity) + rng.gumbel(size=(len(times), len(index)))
    alive = (items.born[index] <= day[:, None]) & (items.dies[index] > day[:, None])
    score[~alive] = -np.inf
    size = min(SLATE, int(alive.sum(axis=1).min()))
    return items.item_id[index[np.argsort(-score, axis=1)[:, :size]]]


def _impressions(world: World, rng: np.random.Generator, shown: _Shown) -> pa.Table:
    received = _received(world, rng, shown.time_us)
    return impressions_table(
        shown.request_id, shown.user, shown.item, shown.time_us, received, shown.position, shown.page
    )


def _actions(world: World, rng: np.random.Generator, shown: _Shown) -> pa.Table:
    """The actions that had happened by the world's end."""
    drawn = draw_feedback(world, rng, shown.user, shown.item, shown.page, shown.position, shown.time_us)
    time = shown.time_us[drawn.row] + np.rint(drawn.delay_s * 1e6).astype(np.int64)
    past = time < world.end_us
    row, time = drawn.row[past], time[past]
    action = np.array(drawn.action, dtype=object)[past]
    received = _received(world, rng, time)
    return actions_table(
        shown.request_id[row], shown.user[row], shown.item[row], time, action, drawn.value[past], received
    )


def _received(world: World, rng: np.random.Generator, time_us: Ints) -> Ints:
    """Usually within two seconds; a `world_late_share` one to twenty-six hours later; never after the world's end."""
    size = len(time_us)
    soon, late = rng.uniform(0.05, 2.0, size), rng.uniform(3600.0, 26 * 3600.0, size)
    delay = np.where(rng.random(size) < world.config.world_late_share, late, soon)
    return np.minimum(time_us + np.rint(delay * 1e6).astype(np.int64), world.end_us)


def _logged_twice(world: World, rng: np.random.Generator, events: pa.Table) -> pa.Table:
    """Append a `world_duplicate_share` of the events again, received up to a minute after the first."""
    again = np.flatnonzero(rng.random(events.num_rows) < world.config.world_duplicate_share)
    copies = events.take(pa.array(again))
    received = copies["received_at"].cast(pa.int64()).to_numpy() + rng.integers(0, 60_000_000, len(again))
    copies = copies.set_column(
        4, IMPRESSIONS.field("received_at"), pa.array(np.minimum(received, world.end_us)).cast(TIMESTAMP)
    )
    return pa.concat_tables([events, copies])


def _malformed(rng: np.random.Generator, kind: str, events: pa.Table, share: float) -> list[dict[str, Any]]:
    """Copies of random rows, each broken in one of the ways that real logs are."""
    broken: list[tuple[str, Any]] = [
        ("user_id", "anonymous"),
        ("item_id", None),
        ("item_id", 12.5),
        ("timestamp", "2999-01-01T00:00:00+00:00"),
        ("timestamp", "0001-01-01"),
        ("timestamp", None),
    ]
    if kind == "action":
        broken += [("action", "teleport"), ("value", -3.0), ("value", "NaN")]
    chosen = np.flatnonzero(rng.random(events.num_rows) < share)
    rows = events.take(pa.array(chosen)).to_pylist()
    ways = rng.integers(0, len(broken), len(rows))
    return [_broken(row, kind, *broken[way]) for row, way in zip(rows, ways, strict=True)]


def _broken(row: dict[str, Any], kind: str, column: str, value: Any) -> dict[str, Any]:
    plain = {k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in row.items()}
    if column == "value":
        plain["action"] = "watch"
    return {"kind": kind, **plain, column: value}
