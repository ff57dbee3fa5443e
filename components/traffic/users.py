"""Users who ask for recommendations and react to what they are shown."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from components.traffic.client import Slate
from components.traffic.config import TrafficConfig
from components.traffic.summary import Tally
from components.world.feedback import draw_feedback
from components.world.people import Ints
from components.world.world import World


class Event(NamedTuple):
    """An event to send; `kind` is impressions or actions, `delay_s` counts from the request time."""

    kind: str
    body: dict[str, Any]
    delay_s: float


class Users:
    """Reactions are drawn from the world's truth; the n-th request is the same user and page for the same seed."""

    def __init__(self, world: World, config: TrafficConfig, tally: Tally) -> None:
        self.world, self.config, self.tally = world, config, tally

    def generator(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, number])

    def choose(self, rng: np.random.Generator) -> tuple[int, int]:
        """User id and page of a request."""
        society = self.world.society
        user = rng.choice(self.world.user_ids, p=society.activity)
        return int(user), 1 + int(rng.choice(len(society.page_share), p=society.page_share))

    def react(self, rng: np.random.Generator, slate: Slate, page: int) -> list[Event]:
        """Everything that a slate leads to: impressions, actions, and a `duplicate_share` of both once more."""
        events = self._impressions(slate, page) + self._actions(rng, slate, page)
        twice = [event for event in events if rng.random() < self.config.duplicate_share]
        self.tally.duplicates += len(twice)
        return events + [event._replace(delay_s=event.delay_s + rng.random()) for event in twice]

    def _impressions(self, slate: Slate, page: int) -> list[Event]:
        common = slate.model_dump(exclude={"items"}) | {"page": page}
        return [Event("impressions", common | shown.model_dump(), 0.0) for shown in slate.items]

    def _actions(self, rng: np.random.Generator, slate: Slate, page: int) -> list[Event]:
        item = np.array([shown.item_id for shown in slate.items], dtype=np.int64)
        position = np.array([shown.position for shown in slate.items], dtype=np.int64)
        user, time_us, pages = (np.full(len(item), v) for v in (slate.user_id, slate.timestamp_us, page))
        drawn = draw_feedback(self.world, rng, user, item, pages, position, time_us)
        delays = np.clip(drawn.delay_s * self.config.delay_scale, 0.05, self.config.max_delay_s)
        self._count(rng, slate, page, item, drawn.action)
        events = []
        for row, action, value, delay in zip(drawn.row, drawn.action, drawn.value, delays, strict=True):
            body = {
                "request_id": slate.request_id,
                "user_id": slate.user_id,
                "item_id": int(item[row]),
                "timestamp_us": slate.timestamp_us + round(delay * 1e6),
                "action": action,
            }
            events.append(Event("actions", body if np.isnan(value) else body | {"value": float(value)}, float(delay)))
        return events

    def _count(self, rng: np.random.Generator, slate: Slate, page: int, item: Ints, actions: list[str]) -> None:
        """Tally the slate beside what as many random items would have earned."""
        alive = self.world.alive(slate.timestamp_us)
        by_chance = rng.choice(alive, min(len(item), len(alive)), replace=False)
        positions = np.arange(len(by_chance))
        expected = self.world.probabilities(slate.user_id, by_chance, page, positions, slate.timestamp_us)["click"]
        self.tally.slate(
            track=slate.track or "none",
            shifted=bool(self.world.era(slate.timestamp_us)),
            impressions=len(item),
            gone=int((~np.isin(item, alive)).sum()),
            actions=actions,
            expected=float(expected.mean()),
        )
