"""Durable events: an event is acknowledged once it is on disk, and reaches the event log exactly once.

Records are appended to a local segment file; requests that arrive together share one fsync (group commit). Every
few seconds the segment is closed and turned into Parquet files whose names are a pure function of the segment's, then
removed. A process killed anywhere leaves segments; the next start ships them, and files that exist already are left
alone, so nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import secrets
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from components.errors import BadInput
from components.serve.shipping import ship
from components.storage import Storage, make_folder, sync_folder

Rows = dict[str, list[dict[str, Any]]]
"""Kind (impressions, actions, quarantine, shadow) -> rows; times in int microseconds."""

_HEADER = struct.Struct("<II")  # length, crc32 of the payload
_SUFFIX = ".wal"
log = logging.getLogger("freshet.serve.journal")


class Journal:
    """Write-ahead journal of one server process. Thread-safe."""

    def __init__(self, folder: Path, storage: Storage, flush_interval_s: float = 2.0) -> None:
        """Take the folder (BadInput when another server holds it) and ship the segments that a crash left."""
        self.folder, self.storage = folder, storage
        self.server = secrets.token_hex(6)  # new for each start, so that segment names never repeat
        make_folder(folder.absolute())
        self._lock_file = _take(folder, storage.root)
        self._segment: BinaryIO | None = None
        self._number = 0
        self._segment_lock = threading.Lock()
        self._ship_lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[bytes, Future[None]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self.flush()
        self._writer = threading.Thread(target=self._write_forever, name="journal-writer", daemon=True)
        self._flusher = threading.Thread(
            target=self._flush_forever, args=(flush_interval_s,), name="journal-flusher", daemon=True
        )
        self._writer.start()
        self._flusher.start()

    def append(self, rows: Rows) -> Future[None]:
        """Queue one record; the future resolves once the record is on disk, or raises OSError."""
        payload = json.dumps(rows, separators=(",", ":")).encode()
        done: Future[None] = Future()
        self._queue.put((_HEADER.pack(len(payload), zlib.crc32(payload)) + payload, done))
        return done

    def flush(self) -> None:
        """Close the current segment and write every closed segment to the event log."""
        with self._ship_lock:
            _ship_all(self._rotate(), self.storage)

    def size(self) -> int:
        """Bytes that are durable here but not yet in the event log."""
        total = 0
        for path in self.folder.glob(f"*{_SUFFIX}"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue  # shipped between the listing and here
        return total

    def close(self) -> None:
        """Write out everything that was appended, flush, and let go of the folder."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._queue.put(None)
        self._writer.join()
        self._flusher.join()
        self.flush()
        self._lock_file.close()

    def _write_forever(self) -> None:
        more = True
        while more:
            group = [self._queue.get()]
            while not self._queue.empty() and len(group) < 1000:
                group.append(self._queue.get())
            more = None not in group
            if wanted := [each for each in group if each and each[1].set_running_or_notify_cancel()]:
                self._commit(wanted)

    def _commit(self, group: list[tuple[bytes, Future[None]]]) -> None:
        """Write the records of running futures; nobody can cancel these any more."""
        try:
            with self._segment_lock:
                segment = self._segment or self._open()
                segment.write(b"".join(data for data, _ in group))
                segment.flush()
                os.fsync(segment.fileno())
        except OSError as error:
            log.error("journal write failed (%s): %d records are not acknowledged", error, len(group))
            self._abandon()
            for _, done in group:
                done.set_exception(OSError(f"the journal cannot be written ({error}); check the disk of {self.folder}"))
            return
        for _, done in group:
            done.set_result(None)

    def _open(self) -> BinaryIO:
        self._number += 1
        path = self.folder / f"{self.server}-{self._number:08d}{_SUFFIX}"
        self._segment = path.open("xb")
        sync_folder(self.folder)
        return self._segment

    def _abandon(self) -> None:
        """After a failed write the end of the segment is unknown: later records go to a new one."""
        with self._segment_lock:
            segment, self._segment = self._segment, None
            if segment is not None:
                try:
                    segment.close()
                except OSError as error:
                    log.error("segment %s cannot be closed (%s); its readable part will be shipped", segment, error)

    def _rotate(self) -> list[Path]:
        """Close the current segment; all closed segments, oldest first within a start.

        Listed under the lock: a segment that is opened a moment later must not be taken for a closed one.
        """
        with self._segment_lock:
            if self._segment is not None:
                self._segment.close()
                self._segment = None
            return sorted(self.folder.glob(f"*{_SUFFIX}"))

    def _flush_forever(self, interval: float) -> None:
        while not self._closed.wait(interval):
            try:
                self.flush()
            except Exception:
                log.exception("the event log cannot be written; %d bytes wait in the journal", self.size())


def ship_orphans(folder: Path, storage: Storage) -> None:
    """Ship what servers that no longer run have left in the journals beside `folder`."""
    for other in sorted(folder.parent.glob("*port-*")):  # as ServeConfig.journal_folder names them
        if other == folder or not any(other.glob(f"*{_SUFFIX}")):
            continue
        try:
            lock_file = _take(other, storage.root)
        except BadInput as error:
            log.info("%s is left alone: %s", other, error)
            continue
        with lock_file:
            _ship_all(sorted(other.glob(f"*{_SUFFIX}")), storage)


def _ship_all(segments: list[Path], storage: Storage) -> None:
    for segment in segments:
        ship(storage, f"server-{segment.stem}", read_segment(segment))
        segment.unlink()


def read_segment(path: Path) -> Iterator[Rows]:
    """The whole records of a segment. Bytes that are none go to <name>.torn, if they can.

    At the end they were never acknowledged; a full disk tears records, and must not keep those before them from being
    shipped, which makes room. Before whole records something has damaged what had been acknowledged.
    """
    data = path.read_bytes()
    torn, place = b"", 0
    while place < len(data):
        if (payload := _record(data, place)) is not None:
            yield json.loads(payload)
            place += _HEADER.size + len(payload)
            continue
        following = _next_record(data, place + 1)
        if following < len(data):
            log.error("%s is damaged: events in %d bytes of it are lost", path.name, following - place)
        else:
            log.warning("%s ends in %d bytes of an unacknowledged record", path.name, following - place)
        torn += data[place:following]
        place = following
    if torn:
        try:
            path.with_suffix(".torn").write_bytes(torn)
        except OSError as error:
            log.warning("they cannot be kept beside it: %s", error)


def _record(data: bytes, place: int) -> bytes | None:
    """The payload of the record at `place`, or None where there is no whole one."""
    begin = place + _HEADER.size
    if begin > len(data):
        return None
    length, checksum = _HEADER.unpack_from(data, place)
    if not 0 < length <= len(data) - begin:  # zeros would be an empty record; damaged text, one of gigabytes
        return None
    payload = data[begin : begin + length]
    return payload if zlib.crc32(payload) == checksum else None


def _next_record(data: bytes, place: int) -> int:
    """Where the next whole record begins, at `place` or later, or the end."""
    while (payload := data.find(b"{", place + _HEADER.size)) >= 0:
        if _record(data, payload - _HEADER.size) is not None:
            return payload - _HEADER.size
        place = payload - _HEADER.size + 1
    return len(data)


def _take(folder: Path, root: str) -> BinaryIO:
    """Lock the folder for this process, and tie it to one storage root."""
    lock_file = (folder / "lock").open("a+b")
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"journal {folder} is in use by another server; stop it or choose another --journal") from None
    lock_file.seek(0)
    owner = lock_file.read().decode()
    if owner and owner != root:
        raise BadInput(f"journal {folder} holds events of {owner}, not of {root}; choose another --journal")
    if not owner:
        lock_file.write(root.encode())
        lock_file.flush()
    return lock_file
