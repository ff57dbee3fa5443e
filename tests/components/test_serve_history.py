"""The history: a request at T sees exactly the events known before T, as training does."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.schemas import ACTION_EVENTS, EARLIEST_US, IMPRESSIONS, action_bit
from components.serve.api import EventsBody, ImpressionIn
from components.serve.eventfiles import EventFiles
from components.serve.history import History
from components.serve.intake import Intake
from components.serve.journal import Journal
from components.serve.metrics import Metrics
from components.storage import Storage
from components.windows import Window, from_us
from model.inputs import Queries, UserEvents, build_tokens
from spark_jobs import reference
from spark_jobs.join import Rules
from tests.components.serving import HOUR_US, catalogue

CLICK, LIKE, WATCH = (action_bit(name) for name in ("click", "like", "watch"))


class Clock:
    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def history(clock: Any, interactions: int = 100, users: int = 100) -> History:
    return History(interactions, users, HOUR_US, clock)


def impression(request_id: int, item_id: int, at: int, received_at: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "request_id": request_id, "user_id": 1, "item_id": item_id, "timestamp": at, "position": 0, "page": 0,
        "received_at": at if received_at is None else received_at,
    } | more  # fmt: skip


def action(request_id: int, item_id: int, at: int, name: str = "click", **more: Any) -> dict[str, Any]:
    return {
        "request_id": request_id, "user_id": 1, "item_id": item_id, "timestamp": at, "received_at": at, "action": name,
    } | more  # fmt: skip


def tables(impressions: list[dict[str, Any]], actions: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    return pa.Table.from_pylist(impressions, IMPRESSIONS), pa.Table.from_pylist(actions, ACTION_EVENTS)


def load(h: History, impressions: list[dict[str, Any]], actions: list[dict[str, Any]] | None = None) -> None:
    h.load(*tables(impressions, actions or []))


def test_an_unknown_user_has_an_empty_history(clock: Clock) -> None:
    now, events = history(clock).snapshot(5)
    assert now == 1000 and len(events) == 0 and events.user_id == 5


def test_events_being_written_hold_the_clock_of_requests_back(clock: Clock) -> None:
    h = history(clock)
    received = h.reserve()
    clock.now = 2000
    now, events = h.snapshot(1)
    assert now == received == 1000 and len(events) == 0
    h.commit(received, *tables([impression(1, 7, 900, received)], []))
    now, events = h.snapshot(1)
    assert now == 2000 and events.item_id.tolist() == [7]


def test_a_request_right_after_the_acknowledgement_sees_the_events(clock: Clock) -> None:
    h = history(clock)
    received = h.reserve()
    h.commit(received, *tables([impression(1, 7, 900, received)], []))
    now, events = h.snapshot(1)  # the clock has not moved
    assert now > received and len(events) == 1


def test_no_event_is_received_before_a_request_that_did_not_see_it(clock: Clock) -> None:
    h = history(clock)
    now, _ = h.snapshot(1)
    clock.now = 500  # the machine's clock was set back
    assert h.reserve() >= now


def test_a_failed_write_releases_the_clock(clock: Clock) -> None:
    h = history(clock)
    h.release(h.reserve())
    clock.now = 2000
    assert h.snapshot(1)[0] == 2000


def test_a_client_that_hangs_up_before_its_events_are_written_releases_the_clock(clock: Clock) -> None:
    class FullQueue:
        def append(self, _: Any) -> Future[None]:
            return Future()

    h = history(clock)
    body = EventsBody(impressions=[ImpressionIn(request_id=1, user_id=1, item_id=7, timestamp_us=EARLIEST_US)])

    async def post_and_hang_up() -> None:
        posted = asyncio.create_task(Intake(h, Metrics(), 5).record(body, cast(Journal, FullQueue())))
        await asyncio.sleep(0)
        clock.now = 2000
        assert h.snapshot(1)[0] == 1000, "the event holds the clock back"
        posted.cancel()
        await asyncio.wait([posted])
        await asyncio.sleep(0)

    asyncio.run(post_and_hang_up())
    assert h.snapshot(1)[0] == 2000


def test_events_from_the_future_wait_until_their_time(clock: Clock) -> None:
    h = history(clock)
    load(h, [impression(1, 7, 900)], [action(1, 7, 1500)])
    assert len(h.snapshot(1)[1].action_of) == 0
    clock.now = 1501
    assert h.snapshot(1)[1].action_mask.tolist() == [CLICK]


def test_snapshots_race_with_events_and_stay_exact() -> None:
    h = History(1000, 10, HOUR_US)
    seen: list[tuple[int, list[int]]] = []
    received: dict[int, int] = {}

    def write(first: int) -> None:
        for request in range(first, first + 100):
            at = h.reserve()
            received[request] = at
            h.commit(at, *tables([impression(request, 7, at - 10, at)], []))

    def read() -> None:
        for _ in range(300):
            now, events = h.snapshot(1)
            seen.append((now, events.request_id.tolist()))

    threads = [threading.Thread(target=write, args=(i * 100,)) for i in range(3)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for now, requests in seen:
        assert sorted(requests) == sorted(r for r, at in received.items() if at < now)


def test_interactions_are_in_the_order_of_training(clock: Clock) -> None:
    h = history(clock)
    rows = [impression(2, 1, 100), impression(1, 2, 100, position=1), impression(1, 3, 100, position=0)]
    load(h, [*rows, impression(3, 4, 50)])
    assert h.snapshot(1)[1].item_id.tolist() == [4, 3, 2, 1]


def test_actions_are_attributed_as_in_the_join(clock: Clock) -> None:
    h = history(clock)
    clock.now = 10 * HOUR_US
    load(
        h,
        [impression(1, 7, 1000), impression(1, 8, 1000, position=1)],
        [
            action(1, 7, 2000, "watch", value=3.5),
            action(1, 7, 2000, "click"),
            action(1, 8, 999, "like"),  # before the impression
            action(1, 8, 1001 + HOUR_US, "like"),  # too late; the earliest like of a key counts anyway
            action(2, 7, 3000),  # no such impression
        ],
    )
    events = h.snapshot(1)[1]
    assert events.actions.tolist() == [CLICK | WATCH, 0]
    assert events.watch_s.tolist() == [3.5, 0]
    assert events.action_of.tolist() == [0, 0]
    assert events.action_mask.tolist() == [CLICK, WATCH]
    assert events.action_value.tolist() == [0, 3.5]


def test_events_sent_again_change_nothing(clock: Clock) -> None:
    h = history(clock)
    load(h, [impression(1, 7, 100)], [action(1, 7, 200)])
    before = h.snapshot(1)[1]
    load(h, [impression(1, 7, 100, 150, score=0.5)], [action(1, 7, 200, received_at=250), action(1, 7, 300)])
    after = h.snapshot(1)[1]
    assert after.known_at.tolist() == before.known_at.tolist() == [100]
    assert after.action_known_at.tolist() == before.action_known_at.tolist() == [200]


@pytest.mark.parametrize("way", [1, -1])
def test_of_copies_that_come_together_the_one_stays_that_the_join_takes(clock: Clock, way: int) -> None:
    h = history(clock)
    shown = [impression(1, 7, 100, page=page, position=position) for page, position in ((5, 1), (2, 1), (3, 0))]
    shown.append(impression(1, 7, 90, received_at=120, page=9))  # earlier by its own clock, but it came later
    acted = [action(1, 7, 200, "watch", value=value) for value in (10.0, 5.0)]
    acted.append(action(1, 7, 190, "watch", value=7.0, received_at=250))  # of actions the earlier one counts
    load(h, shown[::way], [*acted[::way], action(1, 7, 150, "an action of another version")])
    events = h.snapshot(1)[1]
    rules = Rules(Window(from_us(0), from_us(10**6)), attribution_window_s=3600, max_lateness_s=0, memory_s=0)
    (row,) = reference.join(shown, acted, [], rules).interactions
    assert (events.page.tolist(), events.position.tolist()) == ([row["page"]], [row["position"]]) == ([3], [0])
    assert events.watch_s.tolist() == [row["watch_s"]] == [7.0]
    assert events.action_mask.tolist() == [WATCH], "the join sets unknown actions aside"


def test_a_file_that_breaks_the_contract_hides_no_other_and_what_is_optional_may_lack(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [pa.Table.from_pylist([impression(request, 7, 900)], IMPRESSIONS) for request in range(3)]
    nulls = rows[0].cast(pa.schema([field.with_nullable(True) for field in IMPRESSIONS]))
    nulls = nulls.set_column(1, "user_id", pa.array([None], pa.int64()))
    lists = rows[1].set_column(1, "user_id", pa.array([[1]]))
    plain = rows[2].select([field.name for field in IMPRESSIONS if not field.nullable])
    folder = "events/impressions/dt=1970-01-01/hour=00"
    for name, some in {"nulls": nulls, "lists": lists, "plain": plain}.items():
        storage.write_table(f"{folder}/{name}.parquet", some)
    storage.write_table(
        f"{folder}/damaged.parquet", pa.Table.from_pylist([impression(i, i, 900) for i in range(200)], IMPRESSIONS)
    )
    data = storage.read_bytes(f"{folder}/damaged.parquet")
    storage.write_bytes(f"{folder}/damaged.parquet", data[:8] + bytes(300) + data[308:])
    h = history(Clock())
    assert EventFiles(storage, h, days=1).refresh(own="server-") == 1
    assert h.snapshot(1)[1].request_id.tolist() == [2]
    for name in ("nulls", "lists", "damaged"):
        assert f"{name}.parquet is left out of the history" in caplog.text


def test_an_action_that_comes_before_its_impression_counts_once_both_are_known(clock: Clock) -> None:
    h = history(clock)
    load(h, [], [action(1, 7, 200)])
    assert h.shown(1, [(1, 7)]) == [False]
    assert len(h.snapshot(1)[1]) == 0
    load(h, [impression(1, 7, 100, 600)])
    assert h.shown(1, [(1, 7), (1, 8)]) == [True, False]
    assert h.snapshot(1)[1].action_known_at.tolist() == [600]


def test_of_too_many_actions_that_wait_for_their_impression_those_stay_that_came_last(clock: Clock) -> None:
    h = history(clock, interactions=4)
    late = [action(request, 7, 100 + request, received_at=500 - request) for request in range(8 * 4 + 1)]
    load(h, [], late)
    load(h, [impression(request, 7, 100) for request in range(len(late))])
    clock.now = 2000
    acted = h.snapshot(1)[1]
    assert sorted(acted.request_id[acted.action_of].tolist()) == [0, 1, 2, 3], "the four that were received last"


def test_a_page_is_an_auxiliary_event_when_it_changes(clock: Clock) -> None:
    h = history(clock)
    load(h, [impression(i, 7, i * 10, page=page) for i, page in enumerate([3, 3, 4, 3])])
    events = h.snapshot(1)[1]
    assert events.aux_value.tolist() == [3, 4, 3]
    assert events.aux_known_at.tolist() == [0, 20, 30]


def test_an_impression_that_becomes_known_late_changes_no_earlier_auxiliary_event(clock: Clock) -> None:
    h = history(clock)
    prompt = [impression(1, 7, 10, page=3), impression(3, 7, 30, page=4)]
    load(h, prompt)
    before = h.snapshot(1)[1]
    load(h, [impression(2, 7, 20, 500, page=4)])
    after = h.snapshot(1)[1]
    assert len(after) == 3
    for events in (before, after):
        assert events.aux_value.tolist() == [3, 4]
        assert events.aux_known_at.tolist() == [10, 30]


def test_least_recently_active_users_leave_first(clock: Clock) -> None:
    h = history(clock, users=2)
    for user in (1, 2):
        load(h, [impression(1, 7, 100, user_id=user)])
    h.snapshot(1)
    load(h, [impression(1, 7, 100, user_id=3)])
    assert [len(h.snapshot(user)[1]) for user in (1, 2, 3)] == [1, 0, 1]
    assert h.evicted == 1


_EVENTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(0, 50), st.booleans()), min_size=1, max_size=80
)


@settings(max_examples=60, deadline=None)
@given(_EVENTS)
def test_a_bounded_history_gives_the_model_the_same_newest_tokens(rows: list[tuple[int, int, int, bool]]) -> None:
    limit = 8
    full, bounded = history(Clock(), 1000), history(Clock(), limit)
    for request, item, delay, acted in rows:
        events = [impression(request, item, request * 10)], [action(request, item, request * 10 + delay)] * acted
        for h in (full, bounded):
            load(h, *events)
    newest = [_newest_tokens(h.snapshot(1)[1], limit) for h in (full, bounded)]
    assert newest[0] == newest[1]
    assert len(bounded.snapshot(1)[1]) <= limit + limit // 4


def _newest_tokens(events: UserEvents, count: int) -> list[tuple[int, ...]]:
    asked = Queries.candidates(np.array([1]), 10_000, 0)
    tokens = build_tokens([events], [asked], window=1000, catalogue=catalogue())
    columns = np.stack([tokens.kind, tokens.item, tokens.action, tokens.query_time], axis=1)[:-1]
    return [tuple(row) for row in columns[-count:].tolist()]
