"""Events of users -> tokens. The same function serves training and serving, so they cannot drift apart.

A token is one event. An IMPRESSION asks at its request time and is known from `known_at` on; an ACTION (simultaneous
actions on one impression are one token) asks and is known when the action is known; an AUX token is one value of a
slowly changing feature. Token i sees the tokens with key_time < query_time_i (strictly), at most `window` of them,
and itself: so impressions of one request never see each other, and nothing is seen before it was known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.errors import BadInput
from components.schemas import action_bit
from model.attention import Visibility
from model.catalogue import Int64s, ItemCatalogue, log_bucket

IMPRESSION, ACTION, AUX, REQUEST = range(4)
KINDS = 4
VALUE_BUCKETS = 64
"""0 = none, 1..31 = watch seconds (1 + floor(2 log2(1 + s))), 32..63 = rating (32 + round(2 * stars))."""
PAGE_SLOT = 0
MICROSECONDS = 1_000_000


@dataclass
class UserEvents:
    """One user's interactions, action events and auxiliary series: the fields of a sequence row, as numpy arrays."""

    user_id: int
    new_from: int
    request_id: Int64s
    item_id: Int64s
    timestamp: Int64s
    known_at: Int64s
    position: NDArray[np.int32]
    page: Int64s
    actions: NDArray[np.int32]
    watch_s: NDArray[np.float32]
    score: NDArray[np.float32]
    version: NDArray[np.int32]
    delta: Int64s
    action_of: NDArray[np.int32]
    action_known_at: Int64s
    action_mask: NDArray[np.int32]
    action_value: NDArray[np.float32]
    aux_slot: NDArray[np.int32]
    aux_value: Int64s
    aux_known_at: Int64s

    @classmethod
    def empty(cls, user_id: int) -> UserEvents:
        """A user without any event."""
        arrays = {name: np.zeros(0, dtype=dtype) for name, dtype in EVENT_DTYPES.items()}
        return cls(user_id=user_id, new_from=0, **arrays)

    def __len__(self) -> int:
        """Number of interactions."""
        return len(self.item_id)


_DTYPES = {
    "int32": ("position", "actions", "version", "action_of", "action_mask", "aux_slot"),
    "float32": ("watch_s", "score", "action_value"),
}
EVENT_DTYPES: dict[str, np.dtype] = {
    f.name: np.dtype(next((kind for kind, names in _DTYPES.items() if f.name in names), "int64"))
    for f in fields(UserEvents)
    if f.name not in ("user_id", "new_from")
}
"""Array fields of UserEvents and their dtypes."""


@dataclass
class Queries:
    """Rows put at the end of a user's sequence, seen by nobody: candidates (kind IMPRESSION) or REQUEST rows."""

    kind: int
    item_id: Int64s
    time_us: Int64s
    page: Int64s

    @classmethod
    def candidates(cls, item_id: Int64s, request_time_us: int, page: int) -> Queries:
        """The candidates of one request: each sees the history known at request time, none sees another."""
        ids = np.asarray(item_id, dtype=np.int64)
        return cls(IMPRESSION, ids, np.full(len(ids), request_time_us), np.full(len(ids), page))

    @classmethod
    def requests(cls, time_us: Int64s, page: Int64s) -> Queries:
        """REQUEST rows: a moment and a page without an item."""
        times = np.asarray(time_us, dtype=np.int64)
        return cls(REQUEST, np.zeros(len(times), dtype=np.int64), times, np.asarray(page, dtype=np.int64))


@dataclass
class Tokens:
    """A jagged batch of B users and T tokens; all int64 unless noted, times in seconds."""

    seen: Visibility
    user: Tensor  # (T,)
    kind: Tensor  # (T,)
    item: Tensor  # (T,) 0 on AUX and REQUEST tokens
    author: Tensor  # (T,)
    category: Tensor  # (T,)
    duration: Tensor  # (T,) bucket
    page: Tensor  # (T,) 0 on ACTION tokens
    action: Tensor  # (T,) bitmask, ACTION tokens only
    value: Tensor  # (T,) bucket, ACTION tokens only
    query_time: Tensor  # (T,)
    key_time: Tensor  # (T,)
    targets: Tensor  # (N,) rows with a prediction: impressions from new_from on or, if given, the queries
    labels: Tensor  # (N,) action bitmask of these rows (0 for queries)
    source: Tensor  # (N,) index of the interaction in its user, or of the query in its Queries

    def __len__(self) -> int:
        return len(self.kind)


def build_tokens(
    users: Sequence[UserEvents],
    queries: Sequence[Queries] | None = None,
    *,
    window: int,
    catalogue: ItemCatalogue,
    use_aux: bool = False,
    layers: int | None = None,
) -> Tokens:
    """Tokens of a batch of users; with `queries` (one per user) these rows, instead of impressions, are predicted.

    window: how many tokens a row sees at most. layers: with queries, leave out the history that this many layers of
    attention cannot reach from them; their results stay the same. Raises BadInput when queries do not match users.
    """
    if queries is not None and len(queries) != len(users):
        raise BadInput(f"{len(users)} users but {len(queries)} queries; give one Queries per user")
    columns = _history(users, use_aux)
    order = np.lexsort(
        [columns[name] for name in ("position", "request_id", "kind", "key_time", "owner")]  # the last sorts first
    )
    columns = {name: column[order] for name, column in columns.items()}
    history_counts = np.bincount(columns["owner"], minlength=len(users))
    history_offsets = np.concatenate([[0], np.cumsum(history_counts)])
    if queries is not None:
        columns = _append(columns, queries)
    end = _known_before(columns, history_offsets)
    regroup = np.argsort(columns["owner"], kind="stable")  # a user's queries follow the user's history
    columns = {name: column[regroup] for name, column in columns.items()}
    end = end[regroup]
    if queries is not None and layers is not None:
        columns, end = _reachable(columns, end, window, layers)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(columns["owner"], minlength=len(users)))])
    seen = Visibility(_tensor(offsets), _tensor(np.maximum(end - window, 0)), _tensor(end))
    return _tokens(columns, users, seen, catalogue, queries is not None)


def _concatenate(users: Sequence[UserEvents], name: str) -> NDArray:
    return np.concatenate([getattr(u, name) for u in users]) if users else np.zeros(0, EVENT_DTYPES[name])


def _history(users: Sequence[UserEvents], use_aux: bool) -> dict[str, NDArray]:
    """Unordered history tokens of all users as columns; `source` is the interaction's index in its user."""
    get = {name: _concatenate(users, name) for name in EVENT_DTYPES}
    counts = np.array([len(u) for u in users], dtype=np.int64)
    owner = np.repeat(np.arange(len(users)), counts)
    start = np.concatenate([[0], np.cumsum(counts)])
    known = np.maximum(get["known_at"], get["timestamp"])  # nothing is known before it happened
    impressions = {
        "owner": owner, "kind": np.full(len(owner), IMPRESSION), "item": get["item_id"], "page": get["page"],
        "action": get["actions"], "value": np.zeros(len(owner), np.int64), "query_time": get["timestamp"],
        "key_time": known, "request_id": get["request_id"], "position": get["position"],
        "source": np.arange(len(owner)) - np.repeat(start[:-1], counts),
    }  # fmt: skip
    events = np.array([len(u.action_of) for u in users], dtype=np.int64)
    of = get["action_of"].astype(np.int64) + np.repeat(start[:-1], events)
    parts = [impressions, _actions(impressions, of, get)]
    if use_aux:
        parts.append(_aux(users, get))
    return {name: np.concatenate([part[name] for part in parts]).astype(np.int64) for name in impressions}


def _actions(impressions: dict[str, NDArray], of: Int64s, get: dict[str, NDArray]) -> dict[str, NDArray]:
    """One token per (interaction, moment): its actions merged by OR, with the largest value bucket."""
    time, mask = get["action_known_at"], get["action_mask"].astype(np.int64)
    watch, rating = (mask & action_bit("watch")) > 0, (mask & action_bit("rating")) > 0
    value = np.where(watch, log_bucket(get["action_value"], 31), 0)
    stars = np.clip(np.nan_to_num(get["action_value"]), 0, 15)
    value = np.where(rating, 32 + np.round(2 * stars).astype(np.int64), value)
    order = np.lexsort([time, of])
    of, time = of[order], time[order]
    first = np.flatnonzero(np.r_[True, (of[1:] != of[:-1]) | (time[1:] != time[:-1])][: len(of)])
    if len(first):
        mask = np.bitwise_or.reduceat(mask[order], first)
        value = np.maximum.reduceat(value[order], first)
    of, time = of[first], time[first]
    copied = {name: impressions[name][of] for name in ("owner", "item", "request_id", "position", "source")}
    zeros = np.zeros(len(of), np.int64)
    return copied | {
        "kind": zeros + ACTION, "page": zeros, "action": mask, "value": value, "query_time": time, "key_time": time,
    }  # fmt: skip


def _aux(users: Sequence[UserEvents], get: dict[str, NDArray]) -> dict[str, NDArray]:
    if (get["aux_slot"] != PAGE_SLOT).any():
        raise BadInput("unknown auxiliary slot; this model knows slot 0 (page)")
    owner = np.repeat(np.arange(len(users)), [len(u.aux_slot) for u in users])
    zeros, time = np.zeros(len(owner), np.int64), get["aux_known_at"]
    return {
        "owner": owner, "kind": zeros + AUX, "item": zeros, "page": get["aux_value"], "action": zeros,
        "value": zeros, "query_time": time, "key_time": time, "request_id": zeros, "position": zeros,
        "source": zeros - 1,
    }  # fmt: skip


def _append(columns: dict[str, NDArray], queries: Sequence[Queries]) -> dict[str, NDArray]:
    owner = np.repeat(np.arange(len(queries)), [len(q.item_id) for q in queries])
    time = np.concatenate([q.time_us for q in queries]).astype(np.int64)
    zeros = np.zeros(len(owner), np.int64)
    rows = {
        "owner": owner, "kind": np.repeat([q.kind for q in queries], [len(q.item_id) for q in queries]),
        "item": np.concatenate([q.item_id for q in queries]), "page": np.concatenate([q.page for q in queries]),
        "action": zeros, "value": zeros, "query_time": time, "key_time": time, "request_id": zeros,
        "position": zeros, "source": np.concatenate([np.arange(len(q.item_id)) for q in queries]),
    }  # fmt: skip
    size = len(columns["owner"])
    joined = {name: np.concatenate([columns[name], rows[name]]).astype(np.int64) for name in columns}
    return joined | {"query": (np.arange(size + len(owner)) >= size).astype(np.int64)}


def _known_before(columns: dict[str, NDArray], offsets: Int64s) -> Int64s:
    """end_i: how many history tokens of the same user have key_time < query_time_i."""
    size, owner = int(offsets[-1]), columns["owner"]
    moments, rank = np.unique(np.concatenate([columns["key_time"][:size], columns["query_time"]]), return_inverse=True)
    rank = rank.reshape(-1)
    base = len(moments) + 1
    keys = owner[:size] * base + rank[:size]  # history is ordered by (owner, key_time): sorted
    return np.searchsorted(keys, owner * base + rank[size:], side="left") - offsets[owner]


def _reachable(columns: dict[str, NDArray], end: Int64s, window: int, layers: int) -> tuple[dict[str, NDArray], Int64s]:
    """Drop what `layers` windows before the queries do not reach, and what is later than all of them."""
    owner, asked = columns["owner"], columns["query"] > 0
    keep = asked.copy()
    shift = np.zeros(int(owner.max(initial=-1)) + 1, dtype=np.int64)
    for user in np.unique(owner[asked]):
        rows = np.flatnonzero(owner == user)
        history, ends = rows[~asked[rows]], end[rows]
        low, high = int(ends[asked[rows]].min()), int(ends[asked[rows]].max())
        low = max(0, low - window)
        for _ in range(layers - 1):
            low = int(np.maximum(ends[low:high] - window, 0).min(initial=low))
        keep[history[low:high]] = True
        shift[user] = low
    return {name: column[keep] for name, column in columns.items()}, np.maximum(end - shift[owner], 0)[keep]


def _tensor(column: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column, dtype=np.int64))


def _tokens(
    columns: dict[str, NDArray], users: Sequence[UserEvents], seen: Visibility, catalogue: ItemCatalogue, asked: bool
) -> Tokens:
    owner, kind, source = columns["owner"], columns["kind"], columns["source"]
    new_from = np.array([u.new_from for u in users], dtype=np.int64)
    if asked:
        targets = np.flatnonzero(columns["query"])
    else:
        targets = np.flatnonzero((kind == IMPRESSION) & (source >= new_from[owner]))
    side = catalogue.features(columns["item"])
    has_item = (kind == IMPRESSION) | (kind == ACTION)
    side[~has_item] = 0
    user_ids = np.array([u.user_id for u in users], dtype=np.int64)
    return Tokens(
        seen=seen, user=_tensor(user_ids[owner]), kind=_tensor(kind), item=_tensor(columns["item"]),
        author=_tensor(side[:, 0]), category=_tensor(side[:, 1]), duration=_tensor(side[:, 2]),
        page=_tensor(columns["page"]), action=_tensor(np.where(kind == ACTION, columns["action"], 0)),
        value=_tensor(columns["value"]), query_time=_tensor(columns["query_time"] // MICROSECONDS),
        key_time=_tensor(columns["key_time"] // MICROSECONDS), targets=_tensor(targets),
        labels=_tensor(columns["action"][targets]), source=_tensor(source[targets]),
    )  # fmt: skip
