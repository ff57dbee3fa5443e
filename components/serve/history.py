"""What the server knows of each user, and when it came to know it.

Every event has a `known_at`; a request at time T sees the events with known_at < T, exactly as training will. An event
becomes known only once it is durable: it reserves its time first, is written, and then counts. Meanwhile the clock of
requests stands at the earliest reserved time, so no request ever claims a T at which it should have seen more.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

import pyarrow as pa

from components.serve.user import User, UserRows, split_by_user
from model.inputs import UserEvents


def clock_us() -> int:
    """Microseconds since the epoch, UTC."""
    return time.time_ns() // 1000


class History:
    """In-memory history of many users, bounded; one lock makes each snapshot exact. Thread-safe."""

    def __init__(self, interactions: int, users: int, attribution_us: int, clock: Callable[[], int] = clock_us) -> None:
        """interactions: kept per user. users: kept in all. attribution_us: how long after an impression it counts."""
        self.interactions, self.capacity, self.attribution_us = interactions, users, attribution_us
        self.evicted = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._users: OrderedDict[int, User] = OrderedDict()
        self._reserved: Counter[int] = Counter()
        self._latest = 0  # no reservation may come before this

    def __len__(self) -> int:
        return len(self._users)

    def reserve(self) -> int:
        """The `received_at` of events that are about to be written; call `commit` or `release` with it."""
        with self._lock:
            self._latest = max(self._clock(), self._latest)
            self._reserved[self._latest] += 1
            return self._latest

    def commit(self, received_at: int, impressions: pa.Table, actions: pa.Table) -> None:
        """The reserved events are durable: requests see them from now on."""
        rows = list(split_by_user(impressions, actions))
        with self._lock:
            self._apply(rows)
            self._release(received_at)
            self._latest = max(self._latest, received_at + 1)  # the next request comes after what was acknowledged

    def release(self, received_at: int) -> None:
        """The reserved events could not be written."""
        with self._lock:
            self._release(received_at)

    def load(self, impressions: pa.Table, actions: pa.Table) -> None:
        """Events of the event log, written by others or before this start; what is known already is ignored."""
        rows = list(split_by_user(impressions, actions))
        for first in range(0, len(rows), 256):  # requests get their turn between
            with self._lock:
                self._apply(rows[first : first + 256])

    def snapshot(self, user_id: int) -> tuple[int, UserEvents]:
        """(request time T in microseconds, the user's events with known_at < T)."""
        with self._lock:
            now = max(self._clock(), self._latest)
            if self._reserved:
                now = min(now, min(self._reserved))
            self._latest = max(self._latest, now)
            user = self._users.get(user_id)
            if user is None:
                return now, UserEvents.empty(user_id)
            self._users.move_to_end(user_id)
            return now, user.events(now, self.attribution_us)

    def shown(self, user_id: int, keys: Iterable[tuple[int, int]]) -> list[bool]:
        """For each (request_id, item_id): has this impression of the user been seen?"""
        with self._lock:
            user = self._users.get(user_id)
            if user is None:
                return [False for _ in keys]
            known = user.keys()
            return [key in known for key in keys]

    def _apply(self, rows: Iterable[tuple[int, UserRows]]) -> None:
        for user_id, new in rows:
            user = self._users.get(user_id)
            if user is None:
                user = self._users[user_id] = User(user_id)
            self._users.move_to_end(user_id)
            user.add(new, self.interactions)
        while len(self._users) > self.capacity:
            self._users.popitem(last=False)
            self.evicted += 1

    def _release(self, received_at: int) -> None:
        self._reserved[received_at] -= 1
        if not self._reserved[received_at]:
            del self._reserved[received_at]
