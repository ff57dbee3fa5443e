"""The server as a process: start, kill, restart, stop."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from components.config import cli
from components.serve.config import ServeConfig
from components.serve.run import run
from components.storage import Storage
from infra.local.services import free_port
from tests.components.serving import (
    ITEM_IDS,
    answer,
    clicks,
    items_of,
    read_log,
    serving,
    train_delta,
)

USER = 4242
FIRST_REQUEST = """
import sys, threading
from components.serve.api import RecommendBody
from components.serve.config import ServeConfig
from components.serve.server import Server

server = Server(ServeConfig(root=sys.argv[1], sync_interval_s=0.01))
server.start()
while server.engine.why_not_ready():
    threading.Event().wait(0.05)
before = set(sys.modules)
server.recommender.recommend(RecommendBody(user_id=4242, k=3))
print(sorted(name for name in set(sys.modules) - before if name.startswith("torch")))
server.stop()
"""


@pytest.mark.integration
def test_a_killed_server_comes_back_with_the_same_parameters_and_histories(toy_root: Path) -> None:
    storage, port = Storage(f"file://{toy_root}"), free_port()
    for name in ("ranker", "retriever"):
        train_delta(storage, name)
    body = {"user_id": USER, "candidates": ITEM_IDS}
    with serving(toy_root, port, "--flush-interval-s=3600", "--exploration=0") as server:
        empty = answer(server.client.post("/v1/rank", json=body))
        answer(server.client.post("/v1/events", json=clicks(USER, items_of(3)[:5], request_id=1)))
        before = answer(server.client.post("/v1/rank", json=body))
        server.kill()  # the events are acknowledged, and in the journal only
    assert read_log(storage, "events") == []
    with serving(toy_root, port, "--flush-interval-s=3600", "--exploration=0") as server:
        after = answer(server.client.post("/v1/rank", json=body))
        answer(server.client.post("/v1/events", json=clicks(USER, items_of(3)[5:7], request_id=2)))
        assert server.terminate() == 0
    assert after["delta"] == before["delta"] == 1
    assert after["items"] == before["items"] != empty["items"]
    rows = read_log(storage, "events/impressions")
    assert sorted(row["request_id"] for row in rows) == [1] * 5 + [2] * 2  # SIGTERM has flushed the rest
    result = json.loads(server.log.read_text().splitlines()[-1])
    assert result["events"] == 4 and result["address"].endswith(str(port))


@pytest.mark.integration
def test_a_server_that_cannot_write_its_last_events_says_where_they_are(toy_root: Path) -> None:
    port, log = free_port(), toy_root / "events"
    with serving(toy_root, port, "--flush-interval-s=3600") as server:
        answer(server.client.post("/v1/events", json=clicks(USER, items_of(3)[:5], request_id=1)))
        log.touch()  # no folder can have this name now
        assert server.terminate() == 1
    told = server.log.read_text().splitlines()[-1]
    assert told.startswith("error: ") and f"They are safe in {toy_root}/serving/journal/port-{port}; start" in told
    log.unlink()
    with serving(toy_root, port) as server:
        assert server.terminate() == 0
    assert len(read_log(Storage(f"file://{toy_root}"), "events/impressions")) == 5


@pytest.mark.integration
def test_a_client_that_never_ends_its_request_does_not_keep_events_from_the_log(toy_root: Path) -> None:
    """Kubernetes kills a server 30 seconds after it asked, `make down` after 15, Docker after 10."""
    port = free_port()
    with serving(toy_root, port, "--flush-interval-s=3600") as server:
        answer(server.client.post("/v1/events", json=clicks(USER, items_of(3)[:5], request_id=1)))
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(b"POST /v1/events HTTP/1.1\r\nHost: freshet\r\nContent-Length: 100\r\n\r\n{")
            assert server.answers("/livez") == 200  # so that the beginning of the other request has been read
            server.terminate()
    assert len(read_log(Storage(f"file://{toy_root}"), "events/impressions")) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--root=nonsense"], "neither file:///"),
        (["--port=abc"], "--port"),
        (["--score-weights=clik=1"], "unknown action 'clik'"),
        (["--score-weights=click=much"], "not a number"),
        (["--host=203.0.113.1"], "choose another --host"),
        (["--host=no.such.host.invalid"], "choose another --host"),
    ],
)
def test_wrong_settings_end_with_exit_code_2_and_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli(ServeConfig, run, [f"--root=file://{tmp_path}", "--port=0", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_is_an_error_that_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli(ServeConfig, run, [f"--root=file://{tmp_path}", f"--port={port}"]) == 2
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.integration
def test_a_server_that_is_ready_has_loaded_what_its_first_request_needs(toy_root: Path) -> None:
    """Seconds of loading in one request would be the 99th percentile that a rollout's guardrail judges."""
    command = [sys.executable, "-c", FIRST_REQUEST, f"file://{toy_root}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
