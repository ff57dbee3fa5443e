"""The Spark join against the reference, and the promises of both, for random late and repeated events."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from components.storage import Storage
from components.windows import Window
from spark_jobs import reference
from spark_jobs.join import Rules
from spark_jobs.reference import Outcome, action_key, impression_key
from tests.spark_jobs.log import HOURS, Row, action, impression, interactions, join, quarantined, write

NAMES = ["click", "like", "watch", "poke"]
Reasons = Counter[tuple[str, tuple[object, ...], str]]


class Log:
    """Random events; the batch of an event is the number of joins that run before it reaches the log."""

    def __init__(self, number: int, early: bool = False) -> None:
        self.random = random.Random(number)
        self.early = early
        self.impressions: list[tuple[int, Row]] = []
        self.actions: list[tuple[int, Row]] = []
        for request in range(10, 40):
            self._request(request, self.random.uniform(-30, 180), self.random.randrange(3))

    def _request(self, request: int, minute: float, user: int) -> None:
        chance = self.random
        for item in chance.sample(range(6), 3):
            for _ in range(chance.choice([1, 1, 2])):
                page = chance.randrange(3)
                row = impression(request, item, minute, user=user, delay=chance.randrange(3), page=page)
                self.impressions.append((self._batch(minute), row))
            for _ in range(chance.randrange(4)):
                when = minute + chance.uniform(-3, 25)
                owner = user if chance.random() < 0.9 else 7
                value = chance.randrange(50) / 2
                row = action(request, item, when, chance.choice(NAMES), user=owner, delay=chance.random(), value=value)
                self.actions.append((self._batch(when), row))

    def _batch(self, minute: float) -> int:
        """In time for the window of its own, mostly; else up to three windows late (early: at any time)."""
        on_time = 0 if self.early else max(0, int(minute // 60))
        return on_time + self.random.choice([0, 0, 0, 0, 1, 2, 3])

    def until(self, batch: int) -> tuple[list[Row], list[Row]]:
        return [row for b, row in self.impressions if b <= batch], [row for b, row in self.actions if b <= batch]

    def of(self, batch: int) -> tuple[list[Row], list[Row]]:
        return [row for b, row in self.impressions if b == batch], [row for b, row in self.actions if b == batch]


@seed(1)
@settings(
    max_examples=3,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(number=st.integers(0, 2**32), attribution=st.sampled_from([600, 900]), lateness=st.sampled_from([0, 1200, 4000]))
def test_spark_join_and_reference_agree_and_every_event_has_one_fate(
    spark: object, number: int, attribution: int, lateness: int
) -> None:
    log = Log(number)
    outcomes = _join_both_ways(log, HOURS[:3], attribution, lateness)
    assert set(_impressions_with_a_place(outcomes)) == {
        impression_key(row) for row in log.until(2)[0] if _inside(row, HOURS[0].start_us, HOURS[2].end_us)
    }
    assert set(_actions_with_a_place(outcomes)) >= {
        action_key(row) for row in log.until(2)[1] if _inside(row, HOURS[0].start_us, HOURS[2].end_us)
    }


def test_spark_join_and_reference_agree_when_a_gap_is_joined_last(spark: object) -> None:
    outcomes = _join_both_ways(Log(2675342405, early=True), [HOURS[0], HOURS[2], HOURS[1]], 900, 4000)
    assert _impressions_with_a_place(outcomes)
    assert _actions_with_a_place(outcomes)


def _join_both_ways(log: Log, windows: list[Window], attribution: int, lateness: int) -> list[Outcome]:
    """Join the windows one after the other while the log grows; both ways must come to the same each time."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"file://{folder}")
        for batch, window in enumerate(windows):
            for kind, rows in zip(("impressions", "actions"), log.of(batch), strict=True):
                write(storage, kind, rows)
            rules = Rules(window, attribution, lateness, 7 * 86400, [done.window for done in outcomes])
            expected = reference.join(*log.until(batch), outcomes, rules)
            outcomes.append(expected)
            result = join(storage, window, attribution_window_s=attribution, max_lateness_s=lateness)
            assert interactions(storage, window) == expected.interactions
            assert _reasons(quarantined(storage, window)) == Counter(
                (kind, key, reason) for (kind, key), reason in expected.quarantined.items()
            )
            assert result.counts["duplicates"] == expected.duplicates
            assert result.counts["attributed"] == len(expected.attributed)
            assert result.counts["quarantined"] == len(expected.quarantined)
    return outcomes


def _reasons(rows: list[Row]) -> Reasons:
    found: Reasons = Counter()
    for row in rows:
        event = json.loads(row["row"])
        key = impression_key(event) if row["kind"] == "impression" else action_key(event)
        found[row["kind"], key, row["reason"]] += 1
        assert row["source"].startswith(f"events/{row['kind']}s/dt=")
    return found


def _inside(row: Row, start_us: int, end_us: int) -> bool:
    return bool(start_us <= row["timestamp"] < end_us)


def _impressions_with_a_place(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """Keys of impressions that are interactions or in quarantine: no key twice."""
    emitted = [impression_key(row) for done in outcomes for row in done.interactions]
    places = emitted + [key for done in outcomes for kind, key in done.quarantined if kind == "impression"]
    assert len(places) == len(set(places))
    return places


def _actions_with_a_place(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """Keys of actions that are attributed, in quarantine, or pending at the end: no key twice."""
    attributed = [key for done in outcomes for key in done.attributed]
    refused = [key for done in outcomes for kind, key in done.quarantined if kind == "action"]
    places = [*attributed, *refused, *outcomes[-1].pending]
    assert len(places) == len(set(places))
    return places
