"""Events waiting for their time and for the server's acknowledgement."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from components.traffic.client import Acknowledgement, Client

BATCH = 500


@dataclass(order=True)
class _Waiting:
    due: float
    number: int
    kind: str = field(compare=False)
    event: dict[str, Any] = field(compare=False)


class Outbox:
    """Sends each event once its time has come, so that none is from the future; keeps it until acknowledged."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rejected: Counter[str] = Counter()
        self.accepted = self.unmatched = 0
        self._heap: list[_Waiting] = []
        self._number = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, kind: str, event: dict[str, Any], due: float) -> None:
        """Queue an event; kind is impressions or actions, `due` is on the event loop's clock."""
        heapq.heappush(self._heap, _Waiting(due, next(self._number), kind, event))

    async def flush(self) -> None:
        """Send all events that are due."""
        now = asyncio.get_running_loop().time()
        while batch := self._due(now):
            events: dict[str, list[dict[str, Any]]] = {"impressions": [], "actions": []}
            for waiting in batch:
                events[waiting.kind].append(waiting.event)
            self._count(await self.client.send(**events))

    def _due(self, now: float) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._heap and self._heap[0].due <= now and len(batch) < BATCH:
            batch.append(heapq.heappop(self._heap))
        return batch

    def _count(self, answer: Acknowledgement) -> None:
        self.accepted += answer.accepted
        self.unmatched += answer.unmatched_actions
        self.rejected.update(f"{entry.kind}: {entry.reason}" for entry in answer.rejected)
