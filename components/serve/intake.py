"""Events in: checked one by one, written to the journal, then known to the history."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from components.schemas import ACTION_EVENTS, EARLIEST_US, IMPRESSIONS
from components.serve.api import ActionIn, EventsBody, EventsRecorded, ImpressionIn, Refused, Rejection
from components.serve.history import History, clock_us
from components.serve.journal import Journal, Rows
from components.serve.metrics import Metrics

_FIELDS = {"timestamp_us": "timestamp"}


class Intake:
    """Records events; an event counts once its journal record is on disk."""

    def __init__(self, history: History, metrics: Metrics, future_tolerance_s: float) -> None:
        self.history, self.metrics = history, metrics
        self.tolerance_us = int(future_tolerance_s * 1e6)

    async def record(self, body: EventsBody, journal: Journal) -> EventsRecorded:
        """Write the good rows to the event log and the bad ones to quarantine; OSError when the disk refuses."""
        now = clock_us()
        rejected: list[Rejection] = []
        quarantine: list[dict[str, Any]] = []
        impressions = self._good("impression", body.impressions, now, rejected, quarantine)
        actions = self._good("action", body.actions, now, rejected, quarantine)
        unmatched = self._unmatched(impressions, actions)
        if impressions or actions or quarantine:
            rows = {"impressions": impressions, "actions": actions, "quarantine": quarantine}
            await asyncio.wrap_future(self._write(rows, journal))
        self._count(now, impressions, actions, rejected, unmatched)
        return EventsRecorded(accepted=len(impressions) + len(actions), rejected=rejected, unmatched_actions=unmatched)

    def _good(
        self, kind: Any, rows: list[Any], now: int, rejected: list[Rejection], quarantine: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        good = []
        for index, row in enumerate(rows):
            reason = row.reason if isinstance(row, Refused) else self._wrong_time(row, now)
            if reason is None:
                good.append({_FIELDS.get(name, name): value for name, value in row.model_dump().items()})
                continue
            raw = row.row if isinstance(row, Refused) else row.model_dump(mode="json", exclude_unset=True)
            rejected.append(Rejection(kind=kind, index=index, reason=reason))
            quarantine.append({"kind": kind, "reason": reason, "row": json.dumps(raw), "source": "POST /v1/events"})
        return good

    def _wrong_time(self, row: ImpressionIn | ActionIn, now: int) -> str | None:
        ahead = row.timestamp_us - now
        if ahead > self.tolerance_us:
            return (
                f"timestamp_us is {ahead / 1e6:.1f} s in the future; at most {self.tolerance_us / 1e6:g} s are "
                "allowed: check the sender's clock and that the unit is microseconds"
            )
        if row.timestamp_us < EARLIEST_US:
            return "timestamp_us is before 1990; it is in microseconds since 1970-01-01 UTC"
        return None

    def _unmatched(self, impressions: list[dict[str, Any]], actions: list[dict[str, Any]]) -> int:
        here = {(row["user_id"], row["request_id"], row["item_id"]) for row in impressions}
        missing: dict[int, list[tuple[int, int]]] = {}
        for row in actions:
            if (row["user_id"], row["request_id"], row["item_id"]) not in here:
                missing.setdefault(row["user_id"], []).append((row["request_id"], row["item_id"]))
        return sum(self.history.shown(user, keys).count(False) for user, keys in missing.items())

    def _write(self, rows: Rows, journal: Journal) -> Future[None]:
        received_at = self.history.reserve()
        try:
            for row in rows["impressions"] + rows["actions"]:
                row["received_at"] = received_at
            impressions = pa.Table.from_pylist(rows["impressions"], IMPRESSIONS)
            actions = pa.Table.from_pylist(rows["actions"], ACTION_EVENTS)
            written = journal.append({kind: part for kind, part in rows.items() if part})
        except BaseException:
            self.history.release(received_at)
            raise

        def known(done: Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.history.commit(received_at, impressions, actions)
            else:
                self.history.release(received_at)

        written.add_done_callback(known)  # even if the client hangs up: what is on disk is known
        return written

    def _count(
        self,
        now: int,
        impressions: list[dict[str, Any]],
        actions: list[dict[str, Any]],
        rejected: list[Rejection],
        unmatched: int,
    ) -> None:
        for kind, rows in (("impression", impressions), ("action", actions)):
            self.metrics.events.labels(kind, "accepted").inc(len(rows))
            self.metrics.events.labels(kind, "rejected").inc(sum(r.kind == kind for r in rejected))
            delay = self.metrics.delay.labels(kind)
            for row in rows:
                delay.observe((now - row["timestamp"]) / 1e6)
        self.metrics.unmatched.inc(unmatched)
