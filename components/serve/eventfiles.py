"""The event log as a source of history: read at start, then followed for what others write."""

from __future__ import annotations

import logging
import time
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa

from components.errors import BadInput
from components.schemas import ACTION_EVENTS, IMPRESSIONS
from components.serve.history import History
from components.storage import Storage

_KINDS = {"impressions": IMPRESSIONS, "actions": ACTION_EVENTS}
_ROWS_AT_ONCE = 2_000_000
FULL_LISTING_S = 300.0
"""Seconds between listings of all days; in between only days where new events are likely are looked at."""
log = logging.getLogger("freshet.serve.history")


class EventFiles:
    """Hands each event file to the history once; the files of this very server are skipped (it knows them)."""

    def __init__(self, storage: Storage, history: History, days: int) -> None:
        """days: how far back, counted from the newest day in the log."""
        self.storage, self.history, self.days = storage, history, days
        self._seen: set[str] = set()
        self._newest: date | None = None
        self._full_at = 0.0

    def refresh(self, own: str) -> int:
        """Load files not loaded yet, except those named `own`...; returns the number of rows."""
        new = [p for p in self._recent() if p not in self._seen and not p.rpartition("/")[2].startswith(own)]
        tables: dict[str, list[pa.Table]] = {kind: [schema.empty_table()] for kind, schema in _KINDS.items()}
        rows = total = 0
        for i, path in enumerate(new):
            kind = path.split("/")[1]
            table = self._read(path, kind)
            tables[kind].append(table)
            rows += table.num_rows
            if rows >= _ROWS_AT_ONCE or i == len(new) - 1:
                self.history.load(*(pa.concat_tables(tables[kind]) for kind in ("impressions", "actions")))
                tables, total, rows = {kind: part[:1] for kind, part in tables.items()}, total + rows, 0
        self._seen.update(new)
        return total

    def _recent(self) -> list[str]:
        """Event files within the horizon, by day."""
        paths = [path for prefix in self._prefixes() for path in self.storage.list(prefix) if path.endswith(".parquet")]
        dated = sorted((_day(path), path) for path in paths)
        if not dated:
            return []
        before, self._newest = self._newest, max(self._newest or date.min, dated[-1][0])
        horizon = self._newest - timedelta(days=self.days)
        if before != self._newest:  # servers write thousands of files a day: those of days gone by are forgotten
            self._seen = {path for path in self._seen if _day(path) >= horizon}
        return [path for day, path in dated if day >= horizon]

    def _prefixes(self) -> list[str]:
        if self._newest is None or time.monotonic() >= self._full_at:
            self._full_at = time.monotonic() + FULL_LISTING_S
            return [f"events/{kind}" for kind in _KINDS]
        today, one = datetime.now(UTC).date(), timedelta(days=1)
        days = {today - one, today, self._newest - one, self._newest, self._newest + one}
        return [f"events/{kind}/dt={day}" for kind in _KINDS for day in sorted(days)]

    def _read(self, path: str, kind: str) -> pa.Table:
        try:
            return self.storage.read_table_as(path, _KINDS[kind])
        except BadInput as error:
            log.error("%s is left out of the history: %s", path, error)
            return _KINDS[kind].empty_table()


def _day(path: str) -> date:
    """The dt= of a path; files outside a partition count as the oldest."""
    for part in path.split("/"):
        if part.startswith("dt="):
            try:
                return date.fromisoformat(part[3:])
            except ValueError:
                break
    return date.min + timedelta(days=4000)
