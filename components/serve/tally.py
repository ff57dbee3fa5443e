"""Counts of requests per release: what the rollout asks the server for."""

from __future__ import annotations

import threading
from collections import Counter, deque

import numpy as np

from components.rollout.state import Release
from components.serve.api import Counts

_LATENCIES = 2000


class Tally:
    """Requests, failures, empty answers and latencies per (release, serving or shadow). Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[Release, str, str]] = Counter()
        self._latencies: dict[tuple[Release, str], deque[float]] = {}

    def add(self, release: Release, role: str, seconds: float, *, failed: bool = False, empty: bool = False) -> None:
        """One request; role: serving or shadow."""
        with self._lock:
            self._counts[release, role, "requests"] += 1
            self._counts[release, role, "errors"] += failed
            self._counts[release, role, "empty"] += empty
            self._latencies.setdefault((release, role), deque(maxlen=_LATENCIES)).append(seconds)

    def read(self, release: Release, role: str) -> Counts:
        """The counts so far."""
        with self._lock:
            seconds = list(self._latencies.get((release, role), ()))
            counts = {name: self._counts[release, role, name] for name in ("requests", "errors", "empty")}
        return Counts(**counts, p99_ms=float(np.percentile(seconds, 99)) * 1e3 if seconds else None)
