"""Answers: retriever -> ranker -> order, for one user at one moment."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.request_ids import request_ids
from components.serve.api import RankBody, Ranked, RankedItem, RecommendBody, Recommended, RecommendedItem
from components.serve.config import ServeConfig
from components.serve.engine import Engine, NotReady, Track
from components.serve.history import History, clock_us
from components.serve.items import ItemFolder
from components.serve.loaded import Served, weight_vector
from components.serve.metrics import Metrics
from components.serve.shadow import Scored, Shadow
from components.serve.tally import Tally
from model.catalogue import Int64s
from model.inputs import UserEvents
from model.ranker import Ranker
from model.retriever import Retriever

log = logging.getLogger("freshet.serve")


class RequestIds:
    """Request ids below 2^53, mixed from this server's start and a clock that never repeats.

    Two answers of all servers share an id with probability 2^-53, and events are keyed by the item, too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server = secrets.randbits(62)
        self._last = 0

    def next(self) -> int:
        """A new id."""
        with self._lock:
            self._last = max(clock_us(), self._last + 1)
            return int(request_ids(self._server, self._last))


@dataclass(frozen=True)
class Scores:
    """What the ranker says of some items: probability of each head, weighted score."""

    heads: list[str]
    probabilities: NDArray[np.float32]  # (C, heads)
    score: NDArray[np.float32]  # (C,)
    known: NDArray[np.bool_]  # (C,)
    delta: int


class Recommender:
    """Thread-safe; every call is one request."""

    def __init__(
        self,
        config: ServeConfig,
        engine: Engine,
        history: History,
        items: ItemFolder,
        shadow: Shadow,
        tally: Tally,
        metrics: Metrics,
    ) -> None:
        self.config, self.engine, self.history, self.items = config, engine, history, items
        self.shadow, self.tally, self.metrics = shadow, tally, metrics
        self.weights = config.weights()
        self.ids = RequestIds()

    def recommend(self, body: RecommendBody) -> Recommended:
        """The best available items for a user. NotReady while there is no champion or no item."""
        if reason := self.engine.why_not_ready():
            raise NotReady(reason)
        track = self.engine.assign(body.user_id)
        request_id = self.ids.next()
        now, events = self.history.snapshot(body.user_id)
        with self._counted(track) as found:
            allowed = self.items.items.available(now, now)
            if body.exclude:
                allowed = allowed[~np.isin(allowed, np.array(body.exclude, np.int64))]
            ids = retrieve(track, events, now, body.page, max(self.config.candidates, body.k), allowed)
            slots, explored = explore(request_id, body.k, allowed, self.config.exploration)
            ids = np.concatenate([ids, np.setdiff1d(explored, ids)])
            scores = score(track, self.weights, events, ids, now, body.page)
            order = arrange(ids, scores.score, body.k, slots, explored)
            found["empty"] = not order
        shown = [i for i, _ in order]
        self._consider_shadow(
            Scored(request_id, now, body.user_id, body.page, events, ids, scores.score, shown, allowed)
        )
        items = [
            RecommendedItem(item_id=int(ids[i]), score=float(scores.score[i]), position=place, explored=is_explored)
            for place, (i, is_explored) in enumerate(order)
        ]
        return Recommended(
            request_id=request_id,
            timestamp_us=now,
            user_id=body.user_id,
            items=items,
            version=track.ranker.version,
            retriever_version=track.retriever.version,
            delta=scores.delta,
            track=track.name,
        )

    def rank(self, body: RankBody) -> Ranked:
        """Candidates in order of score. NotReady while there is no champion."""
        track = self.engine.assign(body.user_id)
        request_id = self.ids.next()
        now, events = self.history.snapshot(body.user_id)
        ids = np.array(list(dict.fromkeys(body.candidates)), np.int64)
        with self._counted(track):
            scores = score(track, self.weights, events, ids, now, body.page)
        order = best_first(ids, scores.score)
        self._consider_shadow(Scored(request_id, now, body.user_id, body.page, events, ids, scores.score, order, None))
        items = [
            RankedItem(
                item_id=int(ids[i]),
                score=float(scores.score[i]),
                scores=dict(zip(scores.heads, map(float, scores.probabilities[i]), strict=True)),
                position=place,
                known=bool(scores.known[i]),
            )
            for place, i in enumerate(order)
        ]
        return Ranked(
            request_id=request_id,
            timestamp_us=now,
            user_id=body.user_id,
            items=items,
            version=track.ranker.version,
            delta=scores.delta,
            track=track.name,
        )

    @contextmanager
    def _counted(self, track: Track) -> Iterator[dict[str, bool]]:
        found = {"empty": False}
        started = time.perf_counter()
        failed = True
        try:
            yield found
            failed = False
        finally:
            seconds = time.perf_counter() - started
            self.tally.add(track.since, track.release, "serving", seconds, failed=failed, empty=found["empty"])
            self.metrics.scoring.labels(track.name).observe(seconds)

    def _consider_shadow(self, scored: Scored) -> None:
        tracks = self.engine.tracks
        if tracks is not None and tracks.challenger is not None and tracks.state.stage == "shadow":
            self.shadow.consider(tracks.challenger, tracks.state.shadow_share, scored)


def retrieve(track: Track, events: UserEvents, now: int, page: int, k: int, allowed: Int64s) -> Int64s:
    """At most k of the allowed items, the retriever's best first."""
    with track.retriever.reading() as served:
        assert isinstance(served.model, Retriever)
        ids, _ = served.model.retrieve(events, now, page, k, allowed=allowed, vectors=served.item_vectors)
    return np.asarray(ids, np.int64)


def score(track: Track, weights: dict[str, float], events: UserEvents, ids: Int64s, now: int, page: int) -> Scores:
    """Scores of items; the delta number belongs to exactly these parameters."""
    with track.ranker.reading() as served:
        ranker = served.model
        assert isinstance(ranker, Ranker)
        vector = weight_vector(ranker.head_names, weights, track.ranker.label())
        nothing = np.zeros((0, len(vector)), np.float32)
        probabilities = ranker.score(events, ids, now, page) if len(ids) else nothing
        known = learned(served, ids)
        delta = served.n
    return Scores(ranker.head_names, probabilities, weighted(probabilities, vector), known, delta)


def learned(served: Served, ids: Int64s) -> NDArray[np.bool_]:
    """Which items have a row of their own in the ranker's tables; a ranker without such tables knows its catalogue."""
    present = [served.tables[slot] for slot in ("item", "item_bias") if slot in served.tables]
    if not present:
        return np.isin(ids, served.model.catalogue.item_id)
    rows = [(table.lookup(ids, missing="zeros") != 0).any(1).numpy() for table in present]
    return np.logical_or.reduce(rows)


def weighted(probabilities: NDArray[np.float32], vector: NDArray[np.float64]) -> NDArray[np.float32]:
    """The ranking score: sum of weight * probability, row by row (so independent of the batch), in float32."""
    return (probabilities.astype(np.float64) * vector).sum(1).astype(np.float32)


def explore(request_id: int, k: int, allowed: Int64s, share: float) -> tuple[Int64s, Int64s]:
    """Slots to explore and a random item for each: a function of the request id and the available items."""
    random = np.random.default_rng(request_id)
    slots = np.flatnonzero(random.random(k) < share)[: len(allowed)]
    return slots, random.choice(allowed, size=len(slots), replace=False) if len(slots) else allowed[:0]


def best_first(ids: Int64s, scores: NDArray[np.float32]) -> list[int]:
    """Indices by descending score, equal scores by ascending id."""
    order: list[int] = np.lexsort((ids, -scores)).tolist()
    return order


def arrange(
    ids: Int64s, scores: NDArray[np.float32], k: int, slots: Int64s, explored: Int64s
) -> list[tuple[int, bool]]:
    """At most k (index in ids, explored) in the order to show: by score, with the explored items at their slots."""
    place = {int(item): i for i, item in enumerate(ids)}
    random = dict(zip(slots.tolist(), (place[int(item)] for item in explored), strict=True))
    taken = set(random.values())
    best = iter([i for i in best_first(ids, scores) if i not in taken])
    order: list[tuple[int, bool]] = []
    for slot in range(k):
        if slot in random:
            order.append((random[slot], True))
        elif (i := next(best, None)) is not None:
            order.append((i, False))
    return order
