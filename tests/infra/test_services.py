"""Local services are started once, seen to be ready, and stopped by their own pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
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


LEADER = """
import subprocess, sys
subprocess.run([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", sys.argv[1]])
"""


@pytest.mark.parametrize("command", ["make down", "make up"])
def test_what_a_service_that_was_killed_has_left_is_ended_and_its_port_is_free(tmp_path: Path, command: str) -> None:
    """A web server's first process killed for its memory leaves the worker that listens."""
    supervisor, port = Supervisor(tmp_path), free_port()
    service = Service("web", [sys.executable, "-c", LEADER, str(port)], {}, port, f"http://127.0.0.1:{port}/")
    supervisor.start(service)
    supervisor.wait_ready(service, timeout=120)
    os.kill(int((tmp_path / "run" / "web.pid").read_text().split()[0]), signal.SIGKILL)
    while supervisor.running("web"):
        time.sleep(0.05)
    if command == "make down":
        supervisor.stop_all()
    supervisor.start(service)  # BadInput if the worker still held the port
    supervisor.wait_ready(service, timeout=120)
    supervisor.stop_all()


def test_processes_of_a_stranger_in_a_group_of_the_same_number_are_left_alone(tmp_path: Path) -> None:
    """A daemon's first process has ended, too; after a restart of the machine its group may have any number."""
    command = [sys.executable, "-c", "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert daemon.stdout is not None
    child = int(daemon.stdout.readline())
    daemon.wait()
    for folder in ("run", "logs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "web.pid").write_text(f"{daemon.pid} 1")
    (tmp_path / "logs" / "web.log").touch()
    try:
        assert Supervisor(tmp_path).stop_all() == ["web"]
        assert Path(f"/proc/{child}/cmdline").read_text().startswith("sleep")
    finally:
        os.kill(child, signal.SIGKILL)
