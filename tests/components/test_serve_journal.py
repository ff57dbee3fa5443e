"""The journal: what is acknowledged survives everything, and reaches the event log once."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from components.errors import BadInput
from components.serve import journal as journal_module
from components.serve.config import ServeConfig
from components.serve.journal import Journal, ship_orphans
from components.storage import Storage
from tests.components.serving import START_US, read_log, wait_for

NEVER = 3600.0


def impression(number: int) -> dict[str, Any]:
    return {
        "request_id": number, "user_id": 1, "item_id": 7, "timestamp": START_US + number, "received_at": START_US,
        "position": 0, "page": 0,
    }  # fmt: skip


def logged(storage: Storage) -> list[int]:
    return sorted(row["request_id"] for row in read_log(storage, "events/impressions"))


def test_acknowledged_events_reach_the_event_log_on_flush(storage: Storage, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", storage, NEVER)
    journal.append({"impressions": [impression(1)]}).result(60)
    assert logged(storage) == [] and journal.size() > 0
    journal.flush()
    assert logged(storage) == [1] and journal.size() == 0
    journal.close()


def test_events_are_flushed_by_themselves_and_on_close(storage: Storage, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", storage, 0.05)
    journal.append({"impressions": [impression(1)]}).result(60)
    wait_for(lambda: logged(storage) == [1])
    journal.append({"impressions": [impression(2)]})
    journal.close()
    assert logged(storage) == [1, 2]


def test_a_crash_after_the_acknowledgement_loses_nothing(storage: Storage, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", storage, NEVER)
    journal.append({"impressions": [impression(1)], "quarantine": []}).result(60)
    journal._lock_file.close()  # as the death of the process does
    Journal(tmp_path / "journal", storage, NEVER).close()
    assert logged(storage) == [1]


def test_a_crash_between_shipping_and_removing_a_segment_doubles_nothing(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, storage, NEVER)
    journal.append({"impressions": [impression(1)]}).result(60)
    (segment,) = folder.glob("*.wal")
    content = segment.read_bytes()
    journal.close()
    segment.write_bytes(content)  # the segment is back, as if it had never been removed
    before = storage.list("events")
    Journal(folder, storage, NEVER).close()
    assert storage.list("events") == before and logged(storage) == [1]


def test_every_crash_point_of_shipping_ends_in_the_same_log(storage: Storage, tmp_path: Path) -> None:
    rows = {
        "impressions": [impression(i * 3_600_000_000) for i in range(4)],
        "quarantine": [{"kind": "action", "reason": "r", "row": "{}", "source": "s"}],
    }
    for crash_at in range(5):
        folder, store = tmp_path / f"journal-{crash_at}", Storage(f"file://{tmp_path}/store-{crash_at}")
        journal = Journal(folder, store, NEVER)
        journal.append(rows).result(60)
        write, count = store.write_table, 0

        def failing(path: str, table: Any, write: Any = write, crash_at: int = crash_at) -> None:
            nonlocal count
            count += 1
            if count > crash_at:
                raise OSError("the store is gone")
            write(path, table)

        store.write_table = failing  # type: ignore[method-assign]
        with pytest.raises(OSError, match="store is gone"):
            journal.flush()
        journal._lock_file.close()
        again = Storage(store.root)
        Journal(folder, again, NEVER).close()
        assert logged(again) == [i * 3_600_000_000 for i in range(4)]
        assert len(read_log(again, "quarantine/serve")) == 1


def test_a_torn_record_at_the_end_is_left_out_and_kept_beside(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, storage, NEVER)
    for number in (1, 2):
        journal.append({"impressions": [impression(number)]}).result(60)
    (segment,) = folder.glob("*.wal")
    journal._lock_file.close()
    os.truncate(segment, segment.stat().st_size - 3)
    Journal(folder, storage, NEVER).close()
    assert logged(storage) == [1]
    assert len(list(folder.glob("*.torn"))) == 1


def test_zeros_that_a_power_cut_left_at_the_end_are_no_record(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, storage, NEVER)
    journal.append({"impressions": [impression(1)]}).result(60)
    (segment,) = folder.glob("*.wal")
    journal._lock_file.close()
    with segment.open("ab") as file:
        file.write(bytes(4096))
    Journal(folder, storage, NEVER).close()
    assert logged(storage) == [1]
    assert [path.read_bytes() for path in folder.glob("*.torn")] == [bytes(4096)]


@pytest.mark.parametrize("at", [1, 5, 20], ids=["length", "checksum", "payload"])
def test_a_damaged_record_takes_no_other_with_it(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    folder = tmp_path / "journal"
    journal = Journal(folder, storage, NEVER)
    ends = [0]
    for number in range(5):
        journal.append({"impressions": [impression(number)], "quarantine": []}).result(60)
        ends.append(journal.size())
    (segment,) = folder.glob("*.wal")
    journal._lock_file.close()
    data = bytearray(segment.read_bytes())
    for number in (1, 3):
        data[ends[number] + at] ^= 0xFF
    segment.write_bytes(data)
    Journal(folder, storage, NEVER).close()
    assert logged(storage) == [0, 2, 4]
    (torn,) = folder.glob("*.torn")
    assert torn.read_bytes() == data[ends[1] : ends[2]] + data[ends[3] : ends[4]]
    assert f"damaged: events in {ends[2] - ends[1]} bytes of it are lost" in caplog.text


def test_on_a_full_disk_what_was_acknowledged_is_shipped_all_the_same(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shipping is what makes room again; there is none for a copy of the record that the full disk tore."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "journal"
    journal = Journal(folder, storage, NEVER)
    journal.append({"impressions": [impression(1)]}).result(5)
    (segment,) = folder.glob("*.wal")
    with segment.open("ab") as file:
        file.write(b"half of a rec")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        journal.flush()
    assert logged(storage) == [1] and list(folder.glob("*.wal")) == []
    journal.close()


def test_segment_names_never_repeat(storage: Storage, tmp_path: Path) -> None:
    for number in range(3):
        journal = Journal(tmp_path / "journal", storage, NEVER)
        journal.append({"impressions": [impression(number)]}).result(60)
        journal.close()
    assert logged(storage) == [0, 1, 2]
    assert len(storage.list("events/impressions")) == 3


def test_requests_that_arrive_together_share_an_fsync(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, all_wait = [], threading.Event()

    def slow_fsync(descriptor: int) -> None:
        calls.append(descriptor)
        all_wait.wait(60)

    journal = Journal(tmp_path / "journal", storage, NEVER)
    monkeypatch.setattr(journal_module.os, "fsync", slow_fsync)
    requests = [journal.append({"impressions": [impression(i)]}) for i in range(200)]
    all_wait.set()
    done = wait(requests, timeout=60)
    monkeypatch.undo()
    assert not done.not_done and all(f.exception() is None for f in done.done)
    assert len(calls) <= 3, "the folder of the segment, the first request, and all that came while it was written"
    journal.close()
    assert logged(storage) == list(range(200))


def test_a_full_disk_is_an_error_and_later_records_are_safe(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", storage, NEVER)
    journal.append({"impressions": [impression(1)]}).result(60)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module.os, "fsync", full)
    with pytest.raises(OSError, match="check the disk"):
        journal.append({"impressions": [impression(2)]}).result(60)
    monkeypatch.undo()
    journal.append({"impressions": [impression(3)]}).result(60)
    journal.close()
    assert {1, 3} <= set(logged(storage))


def test_one_journal_serves_one_server_and_one_store(storage: Storage, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", storage, NEVER)
    with pytest.raises(BadInput, match="in use by another server"):
        Journal(tmp_path / "journal", storage, NEVER)
    journal.close()
    with pytest.raises(BadInput, match="holds events of"):
        Journal(tmp_path / "journal", Storage(f"file://{tmp_path}/other"), NEVER)


@pytest.mark.parametrize("root", ["", "s3://bucket/store"])
def test_journals_of_servers_that_are_gone_are_shipped_and_those_in_use_left_alone(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    monkeypatch.chdir(tmp_path)
    at = {port: ServeConfig(root=root or storage.root, port=port).journal_folder() for port in (1, 2, 3)}
    gone, used = (Journal(at[port], storage, NEVER) for port in (1, 2))
    for number, journal in enumerate((gone, used)):
        journal.append({"impressions": [impression(number)]}).result(60)
    gone._lock_file.close()
    ship_orphans(at[3], storage)
    assert logged(storage) == [0]
    used.close()
    assert logged(storage) == [0, 1]


@pytest.mark.parametrize("home", ["", "disk/freshet"])
def test_the_journal_of_a_bucket_is_where_freshet_keeps_things_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRESHET_HOME", home)
    folder = ServeConfig(root="s3://bucket/store").journal_folder()
    assert folder.parent == tmp_path / (home or ".freshet") / "journal"


def test_journals_of_another_store_are_left_alone(storage: Storage, tmp_path: Path) -> None:
    other = Storage(f"file://{tmp_path}/other")
    gone = Journal(tmp_path / "0123456789ab-port-1", other, NEVER)
    gone.append({"impressions": [impression(1)]}).result(60)
    gone._lock_file.close()
    ship_orphans(tmp_path / "ba9876543210-port-2", storage)
    assert logged(storage) == logged(other) == []


def test_an_append_that_its_caller_gave_up_stops_nobody_else(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", storage, NEVER)
    at_work, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def held(descriptor: int) -> None:
        at_work.set()
        go_on.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(journal_module.os, "fsync", held)
    first = journal.append({"impressions": [impression(1)]})
    assert at_work.wait(5)
    given_up, kept = (journal.append({"impressions": [impression(number)]}) for number in (2, 3))
    assert given_up.cancel() and not first.cancel()
    go_on.set()
    first.result(60)
    kept.result(60)
    journal.close()
    assert logged(storage) == [1, 3]


def test_an_unreachable_store_keeps_events_in_the_journal(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal", storage, NEVER)
    journal.append({"impressions": [impression(1)]}).result(60)

    def unreachable(*_: Any) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(storage, "write_table", unreachable)
    with pytest.raises(OSError, match="unreachable"):
        journal.flush()
    assert journal.size() > 0
    monkeypatch.undo()
    journal.close()
    assert logged(storage) == [1] and journal.size() == 0


_WRITERS = """
import itertools, os, sys, threading
from pathlib import Path
import pyarrow as pa
from components.schemas import IMPRESSIONS
from components.serve.journal import Journal
from components.storage import Storage

pa.Table.from_pylist([], IMPRESSIONS)  # loads what is slow to load, once for all children

def work(journal, numbers):
    for n in numbers:
        row = {"request_id": n, "user_id": 1, "item_id": 7, "timestamp": 1750000000000000 + n, "received_at": 0,
               "position": 0, "page": 0}
        journal.append({"impressions": [row]}).result()
        os.write(1, f"{n}\\n".encode())

for line in sys.stdin:  # each line: one more process that writes until it is killed
    if child := os.fork():
        os.waitpid(child, 0)
        os.write(1, b"dead\\n")
        continue
    os.write(1, f"{os.getpid()}\\n".encode())
    journal = Journal(Path(sys.argv[2]), Storage(sys.argv[1]), 0.02)
    for thread in range(3):
        threading.Thread(target=work, args=(journal, itertools.count(int(line) + thread, 3))).start()
    threading.Event().wait()
"""


def test_kill_9_at_any_moment_loses_nothing_acknowledged_and_doubles_nothing(storage: Storage, tmp_path: Path) -> None:
    acknowledged: set[int] = set()
    chance = random.Random(1)
    command = [sys.executable, "-c", _WRITERS, storage.root, str(tmp_path / "journal")]
    writers = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writers.stdin is not None and writers.stdout is not None
    for round_number in range(1, 9):
        writers.stdin.write(f"{round_number * 10**9}\n")
        writers.stdin.flush()
        child = int(writers.stdout.readline())
        lines = [writers.stdout.readline()]  # it works
        time.sleep(chance.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        lines += iter(writers.stdout.readline, "dead\n")
        acknowledged |= {int(line) for line in lines}
    writers.stdin.close()
    writers.wait()
    Journal(tmp_path / "journal", storage, NEVER).close()
    found = logged(storage)
    assert acknowledged <= set(found)
    assert len(found) == len(set(found))
