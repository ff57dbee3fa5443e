"""Local services are started once, seen to be ready, and stopped by their own pid."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from components.errors import BadInput, FreshetError
from infra.local.services import Service, Supervisor, free_port

LISTENER = """
import socket, sys, threading, time
sockets = [socket.create_server(("127.0.0.1", int(sys.argv[1])))]
threads = [threading.Thread(target=time.sleep, args=(600,)) for _ in range(16)]
memory = bytearray(256 << 20)  # a process with memory and threads does not end in one moment
for thread in threads:
    thread.start()
"""


def listener(port: int) -> Service:
    return Service("listener", [sys.executable, "-c", LISTENER, str(port)], {}, port=port)


def web_server(port: int) -> Service:
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    return Service("web", command, {}, port=port, ready_url=f"http://127.0.0.1:{port}/")


def test_a_service_starts_once_and_stops(tmp_path: Path) -> None:
    supervisor, service = Supervisor(tmp_path), web_server(free_port())
    supervisor.start(service)
    supervisor.wait_ready(service, timeout=120)
    pid = (tmp_path / "run" / "web.pid").read_text()
    supervisor.start(service)
    assert (tmp_path / "run" / "web.pid").read_text() == pid
    assert supervisor.stop_all() == ["web"]
    assert not supervisor.running("web") and supervisor.names() == []


def test_a_taken_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        with pytest.raises(BadInput, match="FRESHET_PORT_WEB"):
            Supervisor(tmp_path).start(web_server(stranger.getsockname()[1]))


def test_a_service_that_dies_while_starting_shows_the_end_of_its_log(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    service = Service("dies", [sys.executable, "-c", "raise SystemExit('no such database')"], {}, port=free_port())
    supervisor.start(service)
    with pytest.raises(FreshetError, match="no such database"):
        supervisor.wait_ready(service, timeout=120)


def test_a_recycled_pid_is_never_signalled(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.pid").write_text("1 0")
    supervisor = Supervisor(tmp_path)
    assert not supervisor.running("old")
    supervisor.stop("old")
    assert supervisor.names() == []


def test_a_pid_file_without_content_is_that_of_no_service(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.pid").touch()
    supervisor = Supervisor(tmp_path)
    assert not supervisor.running("old")
    assert supervisor.stop_all() == ["old"] and supervisor.names() == []


def test_the_port_of_a_killed_service_is_free_when_kill_returns(tmp_path: Path) -> None:
    supervisor, service = Supervisor(tmp_path), listener(free_port())
    for _ in range(5):
        supervisor.start(service)  # BadInput if the one before still held the port
        supervisor.wait_ready(service, timeout=120)
        supervisor.kill("listener")
        assert not supervisor.running("listener")


def test_a_stopped_service_is_gone_and_can_start_again(tmp_path: Path) -> None:
    supervisor, service = Supervisor(tmp_path), listener(free_port())
    for _ in range(2):
        supervisor.start(service)
        supervisor.wait_ready(service, timeout=120)
        supervisor.stop("listener", grace=1.0)
        assert supervisor.names() == []
