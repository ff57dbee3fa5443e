"""A tiny world of sequences for the training steps' tests.

In the history users like items of their own parity; on the days after it, everybody likes the items above 20.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from components.manifests import Manifest, new_attempt, publish
from components.schemas import ITEMS, action_bit
from components.storage import Storage
from components.windows import Window
from spark_jobs.sequences import SEQUENCES

START = datetime(2022, 5, 1, tzinfo=UTC)
HISTORY = Window(START, START + timedelta(days=2))
SMALL = {"dim": 8, "layers": 1, "attention_heads": 1, "head_dim": 8, "window": 16, "positions": 16}
"""Model settings that train in a moment."""

_MINUTE_US = 60_000_000


def day(number: int) -> Window:
    """The window of one day after the history: 1, 2, ..."""
    return Window.starting(HISTORY.end + timedelta(days=number - 1), timedelta(days=1))


def write_history(root: str, users: int = 30) -> str:
    """Items, and a full-history dataset split after a day and a half; returns its id."""
    storage, split = Storage(root), START + timedelta(hours=36)
    ids = np.arange(1, 41)
    items = {"item_id": ids, "author_id": ids % 7, "category": ids % 2, "duration_s": ids.astype(np.float32)}
    missing = pa.nulls(len(ids), ITEMS.field("available_from").type)
    times = {"available_from": missing, "available_until": missing}
    storage.write_table("items/world.parquet", pa.table({**items, **times}, schema=ITEMS))
    train = [_user(u, Window(START, split), events=14, context=0) for u in range(users)]
    seen = [_user(u, Window(split, HISTORY.end), events=6, context=4) for u in range(users)]
    return _write(storage, "history", [HISTORY.key], {"train": train, "eval": seen})


def write_day(root: str, number: int, users: int = 30, dataset: str = "") -> str:
    """The dataset of one day's window, with context before it; users=0: nothing happened. Returns its id."""
    rows = [_user(u, day(number), events=5, context=4, seed=number) for u in range(users)]
    return _write(Storage(root), dataset or f"day-{number}", [day(number).key], {"train": rows})


def _write(storage: Storage, dataset: str, windows: list[str], parts: dict[str, list[dict[str, object]]]) -> str:
    attempt = new_attempt(f"sequences/{dataset}")
    files: dict[str, list[str]] = {}
    for part, rows in parts.items():
        files[part] = []
        for place, chunk in enumerate((rows[::2], rows[1::2])):
            path = f"{attempt}/{part}-{place}.parquet"
            storage.write_table(path, pa.Table.from_pylist(chunk, schema=SEQUENCES))
            files[part].append(path)
    manifest = Manifest(kind="sequences", name=dataset, windows=windows, files=files, counts={"rows": len(rows)})
    publish(storage, f"sequences/{dataset}", manifest)
    return dataset


def _user(user: int, window: Window, events: int, context: int, seed: int = 0) -> dict[str, object]:
    random = np.random.default_rng([user, seed, window.start_us // _MINUTE_US])
    n = events + context
    before = np.sort(random.integers(window.start_us - 3600 * 1_000_000, window.start_us, context))
    time = np.concatenate([before, np.sort(random.integers(window.start_us, window.end_us - _MINUTE_US, events))])
    item = random.integers(1, 41, n)
    liked_item = item > 20 if seed else item % 2 == user % 2
    clicked = random.random(n) < np.where(liked_item, 0.9, 0.1)
    liked = clicked & (random.random(n) < 0.3)
    of = np.flatnonzero(clicked)
    mask = clicked * action_bit("click") + liked * action_bit("like")
    return {
        "user_id": user, "new_from": context, "request_id": random.integers(1, 1 << 50, n), "item_id": item,
        "timestamp": time, "known_at": time, "position": np.zeros(n, np.int32), "page": np.full(n, user % 3),
        "actions": mask.astype(np.int32), "watch_s": np.zeros(n, np.float32), "score": np.full(n, np.nan, np.float32),
        "version": np.full(n, -1, np.int32), "delta": np.full(n, -1), "action_of": of.astype(np.int32),
        "action_known_at": time[of] + 5_000_000, "action_mask": mask[of].astype(np.int32),
        "action_value": np.zeros(len(of), np.float32), "aux_slot": np.zeros(1, np.int32),
        "aux_value": np.full(1, user % 3), "aux_known_at": time[:1],
    }  # fmt: skip
