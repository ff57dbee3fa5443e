"""Counts of requests per release and stage of the rollout: what the rollout asks the server for."""

from __future__ import annotations

import threading
from collections import Counter, deque
from datetime import UTC, datetime

import numpy as np

from components.rollout.state import Release
from components.serve.api import Counts

_LATENCIES = 2000


class Tally:
    """Requests, failures, empty answers and latencies per (release, serving or shadow) in one stage. Thread-safe.

    `since` names a stage: when it began, as the rollout's record says. A stage is judged by the requests that were
    assigned in it: those of an earlier one are forgotten when a later one begins, also if they end only then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = datetime.min.replace(tzinfo=UTC)
        self._counts: Counter[tuple[Release, str, str]] = Counter()
        self._latencies: dict[tuple[Release, str], deque[float]] = {}

    def add(
        self,
        since: datetime,
        release: Release,
        role: str,
        seconds: float,
        *,
        failed: bool = False,
        empty: bool = False,
    ) -> None:
        """One request; since: of the stage in which it was assigned to `release`; role: serving or shadow."""
        with self._lock:
            if since > self._since:
                self._since = since
                self._counts.clear()
                self._latencies.clear()
            if since < self._since:
                return
            self._counts[release, role, "requests"] += 1
            self._counts[release, role, "errors"] += failed
            self._counts[release, role, "empty"] += empty
            self._latencies.setdefault((release, role), deque(maxlen=_LATENCIES)).append(seconds)

    def read(self, since: datetime, release: Release, role: str) -> Counts:
        """The counts so far of this stage."""
        with self._lock:
            if since != self._since:
                return Counts(requests=0, errors=0, empty=0, p99_ms=None)
            seconds = list(self._latencies.get((release, role), ()))
            counts = {name: self._counts[release, role, name] for name in ("requests", "errors", "empty")}
        return Counts(**counts, p99_ms=float(np.percentile(seconds, 99)) * 1e3 if seconds else None)
