"""What users do with what they are shown, and when the log hears of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from components.world.people import Floats, Ints
from components.world.world import Bools, World


@dataclass(frozen=True)
class Feedback:
    """Action events as parallel arrays; `row` is the index of the impression that each belongs to."""

    row: Ints
    action: list[str]
    value: Floats  # seconds for watch, NaN otherwise
    delay_s: Floats  # after the request time


def draw_feedback(
    world: World, rng: np.random.Generator, user: Ints, item: Ints, page: Ints, position: Ints, time_us: Ints
) -> Feedback:
    """Draw every impression's actions from the world's truth.

    A click comes seconds after the request, watch and long_view when watching ends, likes on the way or, one in
    ten, minutes to hours later. Events are ordered by impression, then click, watch, long_view, like.
    """
    p = world.probabilities(user, item, page, position, time_us)
    size = len(user)
    click = rng.random(size) < p["click"]
    long_view = click & (rng.random(size) * p["click"] < p["long_view"])
    like = click & (rng.random(size) * p["click"] < p["like"])
    watch = _watch_seconds(world, rng, item, time_us, long_view)
    click_delay = rng.lognormal(np.log(4.0), 0.6, size) * (1 + 0.2 * position)
    later = np.where(rng.random(size) < 0.1, rng.lognormal(np.log(600.0), 1.0, size), 0.0)
    like_delay = click_delay + watch * rng.uniform(0.2, 1.0, size) + later
    nothing = np.full(size, np.nan)
    return _events(
        [
            ("click", click, nothing, click_delay),
            ("watch", click, watch, click_delay + watch),
            ("long_view", long_view, nothing, click_delay + watch),
            ("like", like, nothing, like_delay),
        ]
    )


def _watch_seconds(world: World, rng: np.random.Generator, item: Ints, time_us: Ints, long_view: Bools) -> Floats:
    """Long views end after 0.7 to 1 of the item's duration, others after 0.15 of it on average."""
    until = int(time_us.max(initial=world.end_us))
    index, _ = world.find_items(item, until)
    duration = world.items(until).duration_s[index]
    part = np.where(long_view, rng.uniform(0.7, 1.0, len(item)), rng.beta(1.5, 8.5, len(item)))
    return np.asarray(np.maximum((duration * part).round(2), 0.2))


def _events(kinds: list[tuple[str, Bools, Floats, Floats]]) -> Feedback:
    rows = [np.flatnonzero(happened) for _, happened, _, _ in kinds]
    row = np.concatenate(rows)
    code = np.concatenate([np.full(len(r), k) for k, r in enumerate(rows)])
    value = np.concatenate([kind[2][r] for kind, r in zip(kinds, rows, strict=True)])
    delay = np.concatenate([kind[3][r] for kind, r in zip(kinds, rows, strict=True)])
    order = np.lexsort((code, row))
    return Feedback(row[order], [kinds[c][0] for c in code[order]], value[order], delay[order])
