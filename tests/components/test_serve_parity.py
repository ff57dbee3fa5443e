"""Parity: the score that was served is the score that training computes from the event log."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.parameters import bridge
from components.parameters.reader import LogReader
from components.schemas import action_bit
from model.inputs import EVENT_DTYPES, UserEvents
from model.trainer import Trainer
from tests.components.serving import (
    Live,
    build,
    catalogue,
    now_us,
    read_log,
    shown,
)


def events_of(storage: Any, user_id: int) -> UserEvents:
    """A user's sequence from the event log alone, in plain Python."""
    rows = [r for r in read_log(storage, "events/impressions") if r["user_id"] == user_id]
    rows.sort(key=lambda r: (r["timestamp"], r["request_id"], r["position"]))
    place = {(r["request_id"], r["item_id"]): i for i, r in enumerate(rows)}
    acted = []
    for r in read_log(storage, "events/actions"):
        if r["user_id"] == user_id and (i := place.get((r["request_id"], r["item_id"]))) is not None:
            known = max(r["timestamp"], r["received_at"], rows[i]["received_at"])
            acted.append((known, i, action_bit(r["action"]), r["value"] or 0.0))
    acted.sort()
    columns: dict[str, list[Any]] = {
        **{name: [r[name] for r in rows] for name in ("request_id", "item_id", "timestamp", "position", "page")},
        "known_at": [max(r["received_at"], r["timestamp"]) for r in rows],
        "score": [float("nan") if r["score"] is None else r["score"] for r in rows],
        "action_known_at": [a[0] for a in acted], "action_of": [a[1] for a in acted],
        "action_mask": [a[2] for a in acted], "action_value": [a[3] for a in acted],
    }  # fmt: skip
    arrays = {name: np.array(columns.get(name, []), dtype) for name, dtype in EVENT_DTYPES.items()}
    for name in ("actions", "watch_s", "version", "delta"):
        arrays[name] = np.zeros(len(rows), EVENT_DTYPES[name])
    return UserEvents(user_id=user_id, new_from=0, **arrays)


def test_the_logged_score_equals_the_score_recomputed_from_the_event_log(toy_root: Path) -> None:
    user, failures = 50_000, []

    def browse(live: Live, seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(8):
                answer = live.recommend(user, k=5)
                impressions = shown(answer)
                live.events(impressions=impressions)
                acted = [i for i in impressions if random.random() < 0.5]
                copied = ("request_id", "user_id", "item_id")
                live.events(
                    actions=[{k: i[k] for k in copied} | {"timestamp_us": now_us(), "action": "click"} for i in acted]
                )
        except Exception as error:
            failures.append(error)

    with Live(toy_root, exploration=0.3) as live:
        threads = [threading.Thread(target=browse, args=(live, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        weights = live.server.recommender.weights
    assert failures == []
    events = events_of(live.storage, user)
    ranker = build("ranker")
    bridge.load_into(Trainer(ranker), LogReader(live.storage, "ranker", 1).load())
    ranker.catalogue = catalogue()
    ranker.eval()
    with torch.no_grad():
        tokens = ranker.tokens([events])
        probabilities = torch.sigmoid(ranker(tokens)).numpy()
    assert ranker.head_names == ["click", "like"]
    recomputed = np.zeros(len(events))
    recomputed[tokens.source.numpy()] = probabilities @ np.array([weights["click"], weights["like"]])
    assert len(events) == 3 * 8 * 5 and len(events.action_of) > 20
    np.testing.assert_allclose(events.score, recomputed, atol=1e-5)
    assert np.ptp(events.score) > 0.1
