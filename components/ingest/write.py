"""The event log's files: one per kind and UTC hour, with names that depend on the source's content alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from components.ingest.batch import times_of
from components.progress import progress
from components.storage import Storage
from components.windows import from_us

HOUR_US = 3_600_000_000
WRITERS = 16
"""Writing waits for the disk or the network, not for the CPU."""

ROWS_PER_FILE = 1_000_000
_AS_OF = "%Y%m%dT%H%M%S%fZ"


def partition(time_us: int) -> str:
    """dt=YYYY-MM-DD/hour=HH of a time in UTC microseconds."""
    return f"{from_us(time_us):dt=%Y-%m-%d/hour=%H}"


def items_path(as_of: datetime, name: str) -> str:
    """Later files win, so an items file's name begins with the time as of which it stands."""
    return f"items/{as_of.astimezone(UTC):{_AS_OF}}-{name}.parquet"


def last_items_path(paths: list[str], now: datetime, name: str) -> str:
    """The path of an items file that comes after all of `paths`, also if the clock was ahead when they were written."""
    stands = [moment for path in paths if (moment := _as_of(path)) is not None]
    return items_path(max([now, *(moment + timedelta(microseconds=1) for moment in stands)]), name)


def newest_items(paths: list[str]) -> str | None:
    """The items file that wins over all others, beside those that their owner named otherwise."""
    return max((path for path in paths if _as_of(path)), default=None)


def _as_of(path: str) -> datetime | None:
    """The time as of which an items file stands; None of a file that its owner named otherwise."""
    try:
        return datetime.strptime(path.removeprefix("items/").partition("-")[0], _AS_OF).replace(tzinfo=UTC)
    except ValueError:
        return None


def event_files(kind: str, events: pa.Table, name: str) -> list[tuple[str, pa.Table]]:
    """Path and rows of each file of `kind` (impressions or actions), rows in the log's total order."""
    if events.num_rows == 0:
        return []
    keys = [("timestamp", "ascending"), ("request_id", "ascending"), ("item_id", "ascending")]
    events = events.sort_by(keys)
    hours = times_of(events) // HOUR_US
    starts = np.flatnonzero(np.diff(hours, prepend=hours[:1] - 1))
    ends = np.append(starts[1:], len(hours))
    files = []
    for start, end in zip(starts, ends, strict=True):
        folder = f"events/{kind}/{partition(int(hours[start]) * HOUR_US)}"
        for n, first in enumerate(range(int(start), int(end), ROWS_PER_FILE)):
            rows = events.slice(first, min(ROWS_PER_FILE, int(end) - first))
            files.append((f"{folder}/{name}-{n:05d}.parquet", rows))
    return files


def write_files(storage: Storage, files: list[tuple[str, pa.Table]]) -> None:
    """Write all files, several at a time; the first failure is raised."""
    with progress("files of the event log") as advance, ThreadPoolExecutor(WRITERS) as pool:
        for done, _ in enumerate(pool.map(lambda file: storage.write_table(*file), files), 1):
            advance(done, len(files), "written")
