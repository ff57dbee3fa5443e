"""What the users saw and did, counted."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from pydantic import BaseModel, Field


class Share(BaseModel):
    """Requests, impressions and clicks of one track or phase."""

    requests: int = 0
    impressions: int = 0
    clicks: int = 0
    click_rate: float | None = Field(default=None, description="clicks per impression; null without impressions")
    random_click_rate: float | None = Field(
        default=None, description="the click rate that randomly chosen items would have had, from the world's truth"
    )


class TrafficResult(BaseModel):
    """Summary of a run of live traffic."""

    total: Share
    tracks: dict[str, Share] = Field(description="by the track that served")
    phases: dict[str, Share] = Field(description="before and after the preference shift")
    actions: dict[str, int]
    duplicates: int = Field(description="events sent twice on purpose")
    accepted: int = Field(description="events that the server acknowledged")
    rejected: dict[str, int] = Field(description="events that the server refused, by reason")
    unmatched_actions: int
    refused_requests: dict[str, int] = Field(description="recommendations answered 4xx, by answer")
    empty_slates: int = Field(description="recommendations without an item")
    unavailable_items: int = Field(description="impressions of items that are removed or were never there")
    items_published: int
    retries: int = Field(description="calls repeated because the server was away or overloaded")
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    duration_s: float


class Tally:
    """Running counts; `share` turns them into results."""

    def __init__(self) -> None:
        self.actions: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.duplicates = self.gone = self.empty = 0
        self._counts: dict[tuple[str, str], Counter[str]] = {}
        self._expected: defaultdict[tuple[str, str], float] = defaultdict(float)

    def slate(
        self, track: str, shifted: bool, impressions: int, gone: int, actions: list[str], expected: float
    ) -> None:
        """Count one slate: its size, unavailable items, actions, and the click rate expected of random items."""
        self.actions.update(actions)
        self.gone += gone
        for key in (("total", ""), ("track", track), ("phase", "after" if shifted else "before")):
            counts = self._counts.setdefault(key, Counter())
            counts.update(requests=1, impressions=impressions, clicks=actions.count("click"))
            self._expected[key] += expected

    def share(self, kind: str, name: str = "") -> Share:
        counts, expected = self._counts.get((kind, name), Counter()), self._expected[(kind, name)]
        shown, requests = counts["impressions"], counts["requests"]
        return Share(
            requests=requests,
            impressions=shown,
            clicks=counts["clicks"],
            click_rate=counts["clicks"] / shown if shown else None,
            random_click_rate=expected / requests if requests else None,
        )

    def shares(self, kind: str) -> dict[str, Share]:
        return {name: self.share(kind, name) for k, name in sorted(self._counts) if k == kind}


def percentile_ms(seconds: list[float], percent: float) -> float | None:
    return round(float(np.percentile(seconds, percent)) * 1000, 3) if seconds else None
