"""Live users: what they send is true, on time and complete, whatever the server does."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from components.config import cli
from components.errors import BadInput, FreshetError
from components.ingest import run as ingest
from components.ingest.config import IngestConfig
from components.storage import Storage
from components.traffic.config import TrafficConfig
from components.traffic.publisher import live_world
from components.traffic.run import run
from components.world.world import World
from tests.components.fake_server import FakeServer
from tests.components.serving import wait_for

FAST = {"rate": 200.0, "duration_s": 0.0, "max_delay_s": 0.3, "flush_every_s": 0.05, "delay_scale": 0.01}


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A storage root with a small world whose history ends now."""
    url = f"file://{tmp_path}/store"
    ingest.run(IngestConfig(root=url, world_users=50, world_items=80, world_impressions=500, world_day_s=60))
    return url


def settings(root: str, **changes: object) -> TrafficConfig:
    return TrafficConfig.model_validate({"root": root, **FAST, **changes})


def world_of(config: TrafficConfig) -> World:
    return World(live_world(Storage(config.root), config)[0])


def over(server: FakeServer) -> httpx.ASGITransport:
    return httpx.ASGITransport(app=server.app)


def test_every_shown_item_is_reported_with_what_served_it(root: str) -> None:
    config = settings(root, requests=30, duplicate_share=0)
    server = FakeServer(world_of(config))
    result = run(config, over(server))
    assert result.total.requests == 30
    assert len(server.impressions) == result.total.impressions == 300
    for impression in server.impressions:
        answer = server.served[impression["request_id"]]
        shown = answer["items"][impression["position"]]
        for name in ("user_id", "timestamp_us", "version", "delta", "track", "page"):
            assert impression[name] == answer[name]
        assert (impression["item_id"], impression["score"]) == (shown["item_id"], shown["score"])


def test_actions_belong_to_shown_items_and_none_is_from_the_future(root: str) -> None:
    config = settings(root, requests=60)
    server = FakeServer(world_of(config))
    result = run(config, over(server))
    shown = {(i["request_id"], i["user_id"], i["item_id"]): i["timestamp_us"] for i in server.impressions}
    assert len(server.actions) > 60
    assert server.early == []
    for action in server.actions:
        delay = action["timestamp_us"] - shown[action["request_id"], action["user_id"], action["item_id"]]
        assert 50_000 <= delay <= 300_000
        assert ("value" in action) == (action["action"] == "watch")
    assert result.unmatched_actions == 0
    assert result.accepted == len(server.impressions) + len(server.actions)


def test_some_events_are_sent_twice_and_counted(root: str) -> None:
    config = settings(root, requests=40, duplicate_share=0.2)
    server = FakeServer(world_of(config))
    result = run(config, over(server))
    events = [json.dumps(event, sort_keys=True) for event in server.impressions + server.actions]
    assert len(events) - len(set(events)) == result.duplicates > 0
    assert result.total.impressions == 400


def test_users_act_on_their_true_preferences(root: str) -> None:
    """The click rate agrees with the mean of the world's own probabilities for what was shown."""
    config = settings(root, requests=150, duplicate_share=0)
    world = world_of(config)
    server = FakeServer(world)
    result = run(config, over(server))
    columns = ("user_id", "item_id", "page", "position", "timestamp_us")
    shown = (np.array([i[name] for i in server.impressions]) for name in columns)
    expected = world.probabilities(*shown)["click"]
    spread = np.sqrt((expected * (1 - expected)).sum()) / len(expected)
    assert result.total.click_rate == pytest.approx(expected.mean(), abs=4 * spread)
    assert result.total.random_click_rate == pytest.approx(expected.mean(), abs=0.05)


def test_the_same_seed_is_the_same_users_and_another_seed_is_others(root: str) -> None:
    def users(seed: int) -> list[tuple[int, int]]:
        config = settings(root, requests=20, seed=seed, concurrency=1)
        server = FakeServer(world_of(config))
        run(config, over(server))
        return [(a["user_id"], a["page"]) for a in server.served.values()]

    assert users(1) == users(1)
    assert users(1) != users(2)


class HoursPass(FakeServer):
    """After 20 requests it is two hours later."""

    def now_us(self) -> int:
        return super().now_us() + (7_200_000_000 if len(self.served) >= 20 else 0)


def test_clicks_are_counted_per_track_and_before_and_after_the_shift(root: str) -> None:
    shift = datetime.now(UTC) + timedelta(hours=1)
    config = settings(root, requests=60, day_s=7200, shift_at=shift.isoformat())
    server = HoursPass(world_of(config))
    result = run(config, over(server))
    assert set(result.tracks) == {"champion", "challenger"}
    assert set(result.phases) == {"before", "after"}
    for shares in (result.tracks, result.phases):
        assert sum(s.impressions for s in shares.values()) == result.total.impressions
        assert sum(s.clicks for s in shares.values()) == result.total.clicks
    before = sum(a["timestamp_us"] < shift.timestamp() * 1e6 for a in server.served.values())
    assert result.phases["before"].requests == before
    assert result.phases["after"].requests == 60 - before


def test_a_server_that_is_away_is_waited_for(root: str) -> None:
    config = settings(root, requests=10)
    server = FakeServer(world_of(config), failures=4)
    result = run(config, over(server))
    assert result.total.requests == 10
    assert result.retries == 4


def test_a_server_that_stays_away_is_a_clear_failure(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        arguments = [f"--root={root}", f"--server=http://127.0.0.1:{port}", "--give-up-s=0.5", "--rate=50"]
        assert cli(TrafficConfig, run, arguments) == 1
    message = capsys.readouterr().err
    assert "has not answered for 0.5 s" in message and "python -m components.serve" in message


def test_a_server_that_refuses_everything_is_a_clear_failure(root: str) -> None:
    config = settings(root, requests=5)
    server = FakeServer(world_of(config), recommend_status=404)
    with pytest.raises(FreshetError, match=r"refused every request \(1 times.*404.*unknown user"):
        run(config, over(server))


def test_something_else_than_a_freshet_server_is_a_clear_failure(root: str) -> None:
    def hello(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="hello")

    with pytest.raises(FreshetError, match="answered something else than expected"):
        run(settings(root, requests=5), httpx.MockTransport(hello))


def test_events_that_the_server_rejects_are_counted_by_reason(root: str) -> None:
    config = settings(root, requests=5, duplicate_share=0)
    server = FakeServer(world_of(config), reject_items=True)
    result = run(config, over(server))
    assert result.rejected == {"impressions: unknown item": 50}
    assert result.total.requests == 5 and result.accepted == len(server.actions)


def test_a_call_that_the_server_refuses_as_a_whole_ends_the_run(root: str) -> None:
    config = settings(root, requests=5)
    server = FakeServer(world_of(config))

    async def send(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/events":
            return httpx.Response(422, json={"error": "events: no list", "detail": []}, request=request)
        return await httpx.ASGITransport(server.app).handle_async_request(request)

    with pytest.raises(FreshetError, match=r"/v1/events answered 422: .*events: no list"):
        run(config, httpx.MockTransport(send))


def test_removed_items_are_counted_and_never_clicked(root: str) -> None:
    config = settings(root, requests=10)
    world = world_of(config)
    server = FakeServer(world, only=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    result = run(config, over(server))
    assert (result.unavailable_items, result.total.clicks, server.actions) == (100, 0, [])


def test_new_items_reach_the_catalogue_once_as_they_appear(root: str) -> None:
    config = settings(root, rate=5, duration_s=3.0, day_s=5.0, publish_every_s=0.5)
    storage = Storage(root)
    world = world_of(config)
    result = run(config, over(FakeServer(world)))
    files = [path for path in storage.list("items") if path.endswith("-world.parquet")]
    assert len(files) >= 2
    assert result.items_published == sum(storage.read_table(path).num_rows for path in files)
    published = {i for path in files for i in storage.read_table(path)["item_id"].to_pylist()}
    last_us = int(datetime.strptime(files[-1][6:], "%Y%m%dT%H%M%S%fZ-world.parquet").replace(tzinfo=UTC).timestamp())
    assert published >= set(world.catalogue(world.end_us, last_us * 1_000_000)["item_id"].to_pylist())


def test_the_shift_and_the_day_length_are_recorded_for_later_runs(root: str) -> None:
    shift = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    live_world(Storage(root), settings(root, shift_at=shift, day_s=30))
    world, changed = live_world(Storage(root), settings(root))
    assert (world.world_shift_at, world.world_day_s, changed) == (shift, 30.0, False)


def test_a_shift_inside_the_recorded_history_is_refused(root: str) -> None:
    with pytest.raises(BadInput, match="must not come before the end of the recorded history"):
        run(settings(root, shift_at="2020-01-01T00:00:00Z"))


def test_a_root_without_a_world_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run python -m components\.ingest --source=synthetic first"):
        run(settings(f"file://{tmp_path}"))


@contextmanager
def listening(server: FakeServer, port: int) -> Iterator[None]:
    """The fake server on a real port, in a thread."""
    running = uvicorn.Server(uvicorn.Config(server.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        running.should_exit = True
        thread.join(60)


@pytest.mark.integration
def test_a_restart_of_the_server_loses_no_event_and_sigterm_ends_with_the_summary(root: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = settings(root, server=f"http://127.0.0.1:{port}", rate=30, duration_s=0, duplicate_share=0)
    server = FakeServer(world_of(config))

    ended = threading.Event()

    def restart() -> None:
        for requests in (10, 20):
            with socket.create_server(("127.0.0.1", port)) as away:
                away.accept()[0].close()
            with listening(server, port):
                wait_for(lambda enough=requests: len(server.served) > enough)
                if requests == 20:
                    os.kill(os.getpid(), signal.SIGTERM)
                    ended.wait(60)

    other = threading.Thread(target=restart)
    other.start()
    try:
        result = run(config)
    finally:
        ended.set()
        other.join()
    assert result.retries >= 2 and result.total.requests > 20
    sent = {(i["request_id"], i["item_id"]) for i in server.impressions}
    assert len(sent) == result.total.impressions
    assert len({(a["request_id"], a["item_id"], a["action"]) for a in server.actions}) == sum(result.actions.values())
