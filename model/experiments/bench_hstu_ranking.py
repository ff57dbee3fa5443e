"""Ranking 1,024 candidates over 512 history items: M-FALCON beside forwards without a cache (part of bench_hstu)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from components.errors import FreshetError
from components.schemas import action_bit
from model.catalogue import ItemCatalogue
from model.experiments.bench_hstu_timing import Figure, paired
from model.inputs import EVENT_DTYPES, UserEvents
from model.ranker import Ranker, RankerConfig

Scores = NDArray[np.float32]
HISTORY, CANDIDATES, CHUNK = 512, 1024, 32
SINGLES = 64
"""Candidates scored one by one in a repetition; their time is multiplied up to all candidates."""
START_US = 1_000_000_000_000_000
MINUTE_US = 60_000_000


def make_history(items: int) -> UserEvents:
    """Impressions a minute apart, each clicked half a minute later: two tokens per item."""
    time_us = START_US + np.arange(items) * MINUTE_US
    click = action_bit("click")
    arrays = {name: np.zeros(items, dtype=dtype) for name, dtype in EVENT_DTYPES.items() if not name.startswith("aux")}
    arrays |= {name: np.zeros(0, dtype=dtype) for name, dtype in EVENT_DTYPES.items() if name.startswith("aux")}
    arrays |= {"item_id": 1 + np.arange(items) * 7 % 3952, "timestamp": time_us, "known_at": time_us}
    arrays |= {"request_id": np.arange(items), "actions": np.full(items, click, np.int32)}
    arrays |= {"action_of": np.arange(items, dtype=np.int32), "action_known_at": time_us + MINUTE_US // 2}
    arrays |= {"action_mask": np.full(items, click, np.int32)}
    return UserEvents(user_id=1, new_from=0, **arrays)


def make_ranker() -> Ranker:
    """4 layers, 2 heads of 32, width 64; its window holds the whole history."""
    ids = np.arange(1, 3953)
    catalogue = ItemCatalogue(ids, ids % 500, ids % 18, np.full(len(ids), 60, np.float32))
    window = 2 * HISTORY
    config = RankerConfig(dim=64, layers=4, attention_heads=2, head_dim=32, window=window, heads="click,long_view,like")
    return Ranker(config, catalogue)


def measure(repetitions: int, *, items: int = HISTORY, candidates: int = CANDIDATES) -> list[Figure]:
    """rank_vs_chunks and rank_vs_single. Raises FreshetError when the scores differ."""
    model, history, ids = make_ranker(), make_history(items), np.arange(1, candidates + 1)
    now = START_US + (items + 1) * MINUTE_US

    def score() -> Scores:
        return model.score(history, ids, now)

    def plain(block: int, count: int) -> Scores:
        parts = [model.score_plain(history, ids[i : min(i + block, count)], now) for i in range(0, count, block)]
        return np.concatenate(parts)

    difference = float(np.abs(score() - plain(CHUNK, candidates)).max())
    if not difference < 1e-6:
        raise FreshetError(f"M-FALCON and the plain forward differ by {difference:.1e}")
    singles = min(SINGLES, candidates)
    return [
        paired("rank_vs_chunks", lambda: plain(CHUNK, candidates), score, repetitions),
        paired("rank_vs_single", _scaled(lambda: plain(1, singles), candidates / singles), score, repetitions),
    ]


def _scaled(run: Callable[[], object], factor: float) -> Callable[[], float]:
    def timed() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            run()
        return (time.perf_counter() - start) * factor

    return timed
