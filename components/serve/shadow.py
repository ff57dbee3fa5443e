"""The challenger scores what the champion scored, off the response path; users never see it."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from components.serve.engine import Track
from components.serve.journal import Journal
from components.serve.metrics import Metrics
from components.serve.tally import Tally
from model.catalogue import Int64s
from model.inputs import UserEvents

if TYPE_CHECKING:
    from components.serve.recommender import Scores

QUEUE = 64
LOGGED_ITEMS = 200
log = logging.getLogger("freshet.serve.shadow")


@dataclass(frozen=True)
class Scored:
    """A request as the champion answered it."""

    request_id: int
    timestamp_us: int
    user_id: int
    page: int
    events: UserEvents
    candidates: Int64s
    scores: NDArray[np.float32]
    shown: Sequence[int]  # indices into candidates, as shown
    allowed: Int64s | None  # items the retriever could choose from; None = the candidates were given


class Shadow:
    """A background thread with a bounded queue: under load shadow requests are dropped and counted, never served."""

    def __init__(self, weights: dict[str, float], candidates: int, tally: Tally, metrics: Metrics) -> None:
        self.weights, self.candidates, self.tally, self.metrics = weights, candidates, tally, metrics
        self.journal: Journal | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._room = threading.BoundedSemaphore(QUEUE)

    def consider(self, challenger: Track, share: float, scored: Scored) -> None:
        """Score this request with the challenger, if it is in the sampled share (by request id)."""
        if not sampled(scored.request_id, share):
            return
        if not self._room.acquire(blocking=False):
            self.metrics.shadow.labels("dropped").inc()
            return
        self._pool.submit(self._work, challenger, scored)

    def close(self) -> None:
        """Finish what is queued."""
        self._pool.shutdown(wait=True)

    def _work(self, challenger: Track, scored: Scored) -> None:
        started = time.perf_counter()
        error: str | None = None
        empty, scores = False, None
        try:
            empty, scores = self._score(challenger, scored)
        except Exception as problem:  # whatever a candidate version does, it is counted and stays invisible
            log.exception("the challenger failed on request %d", scored.request_id)
            error = f"{type(problem).__name__}: {problem}"
        finally:
            self._room.release()
        seconds = time.perf_counter() - started
        failed = error is not None
        self.tally.add(challenger.since, challenger.release, "shadow", seconds, failed=failed, empty=empty)
        self.metrics.shadow.labels("failed" if error else "scored").inc()
        if self.journal is not None:
            rows = shadow_rows(challenger, scored, scores, error, seconds)
            self.journal.append({"shadow": rows}).add_done_callback(_report)

    def _score(self, challenger: Track, scored: Scored) -> tuple[bool, Scores]:
        from components.serve.recommender import retrieve, score

        s, empty = scored, False
        if s.allowed is not None:
            found = retrieve(challenger, s.events, s.timestamp_us, s.page, self.candidates, s.allowed)
            empty = not len(found)
        return empty, score(challenger, self.weights, s.events, s.candidates, s.timestamp_us, s.page)


def sampled(request_id: int, share: float) -> bool:
    """Whether a request is in the sample: a function of its id."""
    digest = hashlib.blake2b(b"shadow" + request_id.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def shadow_rows(
    challenger: Track, scored: Scored, scores: Scores | None, error: str | None, seconds: float
) -> list[dict[str, Any]]:
    """Rows of the shadow log: one per shown item, or one with the error."""
    same = {
        "request_id": scored.request_id,
        "user_id": scored.user_id,
        "timestamp": scored.timestamp_us,
        "version": challenger.ranker.version,
        "delta": challenger.ranker.n if scores is None else scores.delta,
        "latency_ms": seconds * 1e3,
        "error": error,
    }
    if scores is None:
        return [same]
    return [
        same
        | {
            "item_id": int(scored.candidates[i]),
            "score": float(scores.score[i]),
            "champion_score": float(scored.scores[i]),
        }
        for i in scored.shown[:LOGGED_ITEMS]
    ]


def _report(future: Any) -> None:
    if future.exception() is not None:
        log.error("a shadow result is lost: %s", future.exception())
