"""The Spark join against the reference, and the promises of both, for random late and repeated events."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from components.storage import Storage
from spark_jobs import reference
from spark_jobs.join import Rules
from spark_jobs.reference import Outcome, action_key, impression_key
from tests.spark_jobs.log import HOURS, Row, action, impression, interactions, join, quarantined, write

NAMES = ["click", "like", "watch", "poke"]
Reasons = Counter[tuple[str, tuple[object, ...], str]]


class Log:
    """Random events; the batch of an event is the number of joins that run before it reaches the log."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
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
        """In time for the window of its own, mostly; else up to three windows late."""
        return max(0, int(minute // 60)) + self.random.choice([0, 0, 0, 0, 1, 2, 3])

    def until(self, batch: int) -> tuple[list[Row], list[Row]]:
        return [row for b, row in self.impressions if b <= batch], [row for b, row in self.actions if b <= batch]

    def of(self, batch: int) -> tuple[list[Row], list[Row]]:
        return [row for b, row in self.impressions if b == batch], [row for b, row in self.actions if b == batch]


@seed(1)
@settings(
    max_examples=3, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(number=st.integers(0, 2**32), attribution=st.sampled_from([600, 900]), lateness=st.sampled_from([0, 1200, 4000]))
def test_spark_join_and_reference_agree_and_every_event_has_one_fate(
    spark: object, number: int, attribution: int, lateness: int
) -> None:
    log = Log(number)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(f"file://{folder}")
        for batch, window in enumerate(HOURS[:3]):
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
    _assert_each_impression_once(log, outcomes)
    _assert_each_action_once(log, outcomes)


def _reasons(rows: list[Row]) -> Reasons:
    found: Reasons = Counter()
    for row in rows:
        event = json.loads(row["row"])
        key = impression_key(event) if row["kind"] == "impression" else action_key(event)
        found[row["kind"], key, row["reason"]] += 1
        assert row["source"].startswith(f"events/{row['kind']}s/dt=")
    return found


def _assert_each_impression_once(log: Log, outcomes: list[Outcome]) -> None:
    emitted = [impression_key(row) for done in outcomes for row in done.interactions]
    refused = [key for done in outcomes for kind, key in done.quarantined if kind == "impression"]
    assert len(emitted + refused) == len(set(emitted + refused))
    start, end = HOURS[0].start_us, HOURS[2].end_us
    assert set(emitted + refused) == {impression_key(row) for row in log.until(2)[0] if start <= row["timestamp"] < end}


def _assert_each_action_once(log: Log, outcomes: list[Outcome]) -> None:
    attributed = [key for done in outcomes for key in done.attributed]
    refused = [key for done in outcomes for kind, key in done.quarantined if kind == "action"]
    places = [*attributed, *refused, *outcomes[-1].pending]
    assert len(places) == len(set(places))
    start, end = HOURS[0].start_us, HOURS[2].end_us
    assert {action_key(row) for row in log.until(2)[1] if start <= row["timestamp"] < end} <= set(places)
