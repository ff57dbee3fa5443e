"""Small made-up users for the model tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from components.schemas import action_bit
from model.catalogue import ItemCatalogue
from model.inputs import EVENT_DTYPES, UserEvents

SECOND = 1_000_000
START = 1_650_000_000 * SECOND


def catalogue(items: int = 40) -> ItemCatalogue:
    ids = np.arange(1, items + 1)
    return ItemCatalogue(ids, ids % 7 + 1, ids % 4 + 1, (ids % 9 * 10.0).astype(np.float32))


def user(user_id: int, count: int, seed: int = 0, *, items: int = 40, new_from: int = 0) -> UserEvents:
    """`count` impressions in requests of one to three; half are watched, some clicked, actions come late."""
    random = np.random.default_rng([seed, user_id, 7])
    request = np.sort(random.integers(0, max(count // 2, 1), count)).astype(np.int64)
    timestamp = START + request * 600 * SECOND + user_id * SECOND
    position = np.arange(count) - np.searchsorted(request, request)
    item = random.integers(1, items + 1, count)
    watched = random.random(count) < 0.5
    clicked = watched & (random.random(count) < 0.6)
    acted = np.flatnonzero(watched)
    late = random.integers(1, 2000, len(acted)) * SECOND
    of = np.concatenate([acted, np.flatnonzero(clicked)])
    known = np.concatenate([timestamp[acted] + late, timestamp[clicked] + late[clicked[acted]]])
    bits = np.r_[np.full(len(acted), action_bit("watch")), np.full(int(clicked.sum()), action_bit("click"))]
    value = np.r_[random.random(len(acted)) * 90 + 1, np.full(int(clicked.sum()), np.nan)]
    order = np.lexsort([bits, of, known])
    actions = watched * action_bit("watch") + clicked * action_bit("click")
    arrays = {
        "request_id": request, "item_id": item, "timestamp": timestamp, "known_at": timestamp,
        "position": position, "page": request % 3, "actions": actions, "watch_s": watched * 30.0,
        "score": np.full(count, np.nan), "version": np.full(count, -1), "delta": np.full(count, -1),
        "action_of": of[order], "action_known_at": known[order], "action_mask": bits[order],
        "action_value": value[order], "aux_slot": np.zeros(min(count, 1)), "aux_value": request[:1] % 3,
        "aux_known_at": timestamp[:1],
    }  # fmt: skip
    typed = {name: np.asarray(column).astype(EVENT_DTYPES[name]) for name, column in arrays.items()}
    return UserEvents(user_id=user_id, new_from=new_from, **typed)


def shown_alone(events: UserEvents) -> UserEvents:
    """Without action events and auxiliary values: each token is an impression."""
    kept = {name: getattr(events, name) for name in vars(events) if name in EVENT_DTYPES}
    none = {name: kept[name][:0] for name in kept if name.startswith(("action_", "aux_"))}
    return UserEvents(user_id=events.user_id, new_from=events.new_from, **kept | none)


def table(users: list[UserEvents]) -> pa.Table:
    """Users as rows of a sequence table."""
    columns = {"user_id": pa.array([u.user_id for u in users], pa.int64())}
    columns["new_from"] = pa.array([u.new_from for u in users], pa.int32())
    for name, dtype in EVENT_DTYPES.items():
        kind = pa.list_(pa.from_numpy_dtype(dtype))
        columns[name] = pa.array([getattr(u, name) for u in users], kind)
    return pa.table(columns)
