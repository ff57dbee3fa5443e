"""Start and stop the processes of a local Freshet, each by a pid file; nothing else is ever signalled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from components.errors import BadInput, FreshetError


@dataclass(frozen=True)
class Service:
    """A process that stays up: how to start it and how to see that it is ready."""

    name: str
    command: list[str]
    environment: dict[str, str]
    port: int | None = None
    ready_url: str | None = None
    folder: Path = field(default_factory=Path.cwd)


class Supervisor:
    """Pid files and logs of one home folder."""

    def __init__(self, home: Path) -> None:
        self.pids, self.logs = home / "run", home / "logs"

    def start(self, service: Service) -> bool:
        """Start `service`; False if it runs already. BadInput when a stranger holds its port."""
        if self.running(service.name):
            return False
        self.stop(service.name)  # what an earlier one left when it died: it may hold the port
        if service.port and _listening(service.port):
            raise BadInput(
                f"port {service.port} for {service.name} is taken by another program; stop that, or choose another "
                f"with FRESHET_PORT_{service.name.upper().replace('-', '_')}"
            )
        self.pids.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(service.name).open("ab") as log:
            process = subprocess.Popen(
                service.command,
                env={**os.environ, **service.environment},
                cwd=service.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._pid_file(service.name).write_text(f"{process.pid} {_started(process.pid)}")
        return True

    def wait_ready(self, service: Service, timeout: float) -> None:
        """Wait until `service` answers; FreshetError with the end of its log if it dies or never does."""
        deadline = time.monotonic() + timeout
        while not _answers(service):
            if not self.running(service.name):
                raise FreshetError(f"{service.name} ended while starting:\n{self.tail(service.name)}")
            if time.monotonic() > deadline:
                raise FreshetError(f"{service.name} is not ready after {timeout:.0f} s:\n{self.tail(service.name)}")
            time.sleep(0.3)

    def running(self, name: str) -> bool:
        return self._pid(name) is not None

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.pids.glob("*.pid"))

    def stop(self, name: str, grace: float = 15.0) -> None:
        """End the process group of `name`: asked first, forced when the first process has ended, or after `grace` s."""
        if (group := self._group(name)) is not None:
            _signal_group(group, signal.SIGTERM)
            deadline = time.monotonic() + grace
            while self.running(name) and time.monotonic() < deadline:
                time.sleep(0.1)
        self.kill(name)

    def stop_all(self) -> list[str]:
        """Ask all to end at once, then wait for each; returns their names."""
        names = self.names()
        for name in names:
            if (group := self._group(name)) is not None:
                _signal_group(group, signal.SIGTERM)
        for name in names:
            self.stop(name)
        return names

    def kill(self, name: str) -> None:
        """End `name` without warning, as a crash would; it is gone, and its port free, when this returns."""
        if (group := self._group(name)) is not None:
            _signal_group(group, signal.SIGKILL)
            while self._group(name) is not None:
                time.sleep(0.05)
        self._pid_file(name).unlink(missing_ok=True)

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def tail(self, name: str, lines: int = 15) -> str:
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-lines:])

    def _pid_file(self, name: str) -> Path:
        return self.pids / f"{name}.pid"

    def _pid(self, name: str) -> int | None:
        """The live process behind the pid file; the start time guards against a recycled pid."""
        if (recorded := self._recorded(name)) is None:
            return None
        pid, started = recorded
        _reap(pid)
        return pid if _started(pid) == started else None

    def _group(self, name: str) -> int | None:
        """The process group of `name` while any process of it lives: the first may have died before the others.

        Those who are left write to the service's log; strangers, who may have got a group of that number, do not.
        """
        if (recorded := self._recorded(name)) is None:
            return None
        group, _ = recorded
        live = self.running(name) or any(_writes_to(pid, self.log(name)) for pid in _members(group))
        return group if live else None

    def _recorded(self, name: str) -> tuple[int, str] | None:
        """Pid, which is the number of the process group, too, and start time."""
        try:
            pid, started = self._pid_file(name).read_text().split()
        except (FileNotFoundError, ValueError):  # the machine or its disk failed while it was written
            return None
        return int(pid), started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(service: Service) -> bool:
    if service.ready_url is None:
        return service.port is None or _listening(service.port)
    try:
        return httpx.get(service.ready_url, timeout=2.0).status_code < 500
    except httpx.TransportError:
        return False


def _started(pid: int) -> str:
    """The kernel's start time of `pid`, or '' when there is no such process, or only one that ended altogether.

    A killed process is a zombie as soon as its first thread has ended; while others end, its port is still taken.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended = fields[0] == "Z" and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if ended else fields[19]


def _members(group: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                yield int(folder.name)
        except ProcessLookupError:
            continue  # it ended meanwhile


def _writes_to(pid: int, log: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/fd/2", log)
    except OSError:
        return False  # it ended, or is another user's, or there is no log


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return  # started by an earlier command: its own parent reaps it


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # already gone, which is what was wanted
