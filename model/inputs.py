"""Events of users -> tokens. The same function serves training and serving, so they cannot drift apart.

A token is one event. An IMPRESSION asks at its request time and is known from `known_at` on; an ACTION (simultaneous
actions on one impression are one token) asks and is known when the action is known; an AUX token is one value of a
slowly changing feature. Token i sees the tokens with key_time < query_time_i (strictly), at most `window` of them,
and itself: so impressions of one request never see each other, and nothing is seen before it was known. CONTEXT tokens
stand before the history; all tokens see them. They see each other alone: would they see the history, as in the
published production network, then a token would see through them what came after it, and no history could be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.errors import BadInput
from components.schemas import action_bit
from model.attention import Visibility
from model.catalogue import Int64s, ItemCatalogue, log_bucket
from model.events import (
    ACTION,
    AUX,
    BEFORE_ALL_US,
    CONTEXT,
    EVENT_DTYPES,
    IMPRESSION,
    REQUEST,
    Queries,
    UserEvents,
    check_events,
)

__all__ = [
    "ACTION", "AUX", "CONTEXT", "EVENT_DTYPES", "IMPRESSION", "KINDS", "MICROSECONDS", "PAGE_SLOT", "REQUEST",
    "VALUE_BUCKETS", "Queries", "Tokens", "UserEvents", "build_tokens",
]  # fmt: skip

KINDS = 4
"""Kinds of tokens without context."""
VALUE_BUCKETS = 64
"""0 = none, 1..31 = watch seconds (1 + floor(2 log2(1 + s))), 32..63 = rating (32 + round(2 * stars))."""
PAGE_SLOT = 0
MICROSECONDS = 1_000_000
NO_EVENT = -1
"""In place of the time of an event: what was learned from before, and must not be counted again."""


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
    watch: Tensor  # (N,) float32 seconds watched of these rows (0 for queries)
    source: Tensor  # (N,) index of the interaction in its user, or of the query in its Queries
    event_us: Tensor  # (T,) when the token's event happened, if it was not learned from before; else NO_EVENT

    def __len__(self) -> int:
        return len(self.kind)

    def targets_at_end(self) -> Tensor | None:
        """(B,) how many targets each user has, if they are all at the end of their users' tokens; else None."""
        offsets = self.seen.offsets
        owner = torch.searchsorted(offsets, self.targets, right=True) - 1
        counts = torch.bincount(owner, minlength=len(offsets) - 1)
        place = torch.arange(len(self.targets)) - (counts.cumsum(0) - counts)[owner]
        return counts if torch.equal(self.targets, (offsets[1:] - counts)[owner] + place) else None

    def rows(self, start: int, stop: int) -> Tokens:
        """The features of some consecutive tokens; visibility and targets stay those of the whole batch."""
        per_token = [f.name for f in fields(self) if f.name not in ("seen", "targets", "labels", "watch", "source")]
        return replace(self, **{name: getattr(self, name)[start:stop] for name in per_token})


def build_tokens(
    users: Sequence[UserEvents],
    queries: Sequence[Queries] | None = None,
    *,
    window: int,
    catalogue: ItemCatalogue,
    use_aux: bool = False,
    layers: int | None = None,
    context: int = 0,
) -> Tokens:
    """Tokens of a batch of users; with `queries` (one per user) these rows, instead of impressions, are predicted.

    window: how many tokens a row sees at most. layers: with queries, leave out the history that this many layers of
    attention cannot reach from them; their results stay the same. context: number of CONTEXT tokens before each
    history. Raises BadInput when queries do not match users, and for events that cannot be (see check_events).
    """
    if queries is not None and len(queries) != len(users):
        raise BadInput(f"{len(users)} users but {len(queries)} queries; give one Queries per user")
    if any(not len(q.item_id) == len(q.time_us) == len(q.page) for q in queries or ()):
        raise BadInput("queries have as many items as times and pages; give one each")
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
    begin, prefix = np.maximum(end - window, 0), None
    if context:
        columns, begin, end, prefix = _put_context(columns, begin, end, context, users, queries)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(columns["owner"], minlength=len(users)))])
    seen = Visibility(
        _tensor(offsets), _tensor(begin), _tensor(end), prefix=None if prefix is None else _tensor(prefix)
    )
    return _tokens(columns, users, seen, catalogue, queries is not None)


def _concatenate(users: Sequence[UserEvents], name: str) -> NDArray:
    return np.concatenate([getattr(u, name) for u in users]) if users else np.zeros(0, EVENT_DTYPES[name])


def _history(users: Sequence[UserEvents], use_aux: bool) -> dict[str, NDArray]:
    """Unordered history tokens of all users as columns; `source` is the interaction's index in its user."""
    get = {name: _concatenate(users, name) for name in EVENT_DTYPES}
    check_events(users, get)
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
    if not queries:
        return columns | {"query": np.zeros(len(columns["owner"]), np.int64)}
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


def _put_context(
    columns: dict[str, NDArray],
    begin: Int64s,
    end: Int64s,
    count: int,
    users: Sequence[UserEvents],
    queries: Sequence[Queries] | None,
) -> tuple[dict[str, NDArray], Int64s, Int64s, Int64s]:
    """Columns with `count` tokens before each user's, and begin, end and prefix of all rows."""
    owner = np.repeat(np.arange(len(users)), count)
    pages = [int(q.page[0]) if len(q.page) else 0 for q in queries] if queries is not None else [0] * len(users)
    rows = {name: np.zeros(len(owner), np.int64) for name in columns}
    rows |= {"owner": owner, "kind": rows["kind"] + CONTEXT, "page": np.repeat(np.array(pages, np.int64), count)}
    rows |= {name: np.full(len(owner), BEFORE_ALL_US) for name in ("query_time", "key_time")}
    order = np.argsort(np.concatenate([owner, columns["owner"]]), kind="stable")
    joined = {name: np.concatenate([rows[name], columns[name]])[order] for name in columns}
    zeros, ones = np.zeros(len(owner), np.int64), np.ones(len(end), np.int64)
    begin = np.concatenate([zeros, begin + count])[order]
    end = np.concatenate([zeros + count, end + count])[order]
    return joined, begin, end, np.concatenate([zeros, ones * count])[order]


def _tensor(column: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column, dtype=np.int64))


def _tokens(
    columns: dict[str, NDArray], users: Sequence[UserEvents], seen: Visibility, catalogue: ItemCatalogue, asked: bool
) -> Tokens:
    owner, kind, source = columns["owner"], columns["kind"], columns["source"]
    new_from = np.array([u.new_from for u in users], dtype=np.int64)
    if asked:
        targets = np.flatnonzero(columns["query"])
        watch = np.zeros(len(targets), dtype=np.float32)
    else:
        targets = np.flatnonzero((kind == IMPRESSION) & (source >= new_from[owner]))
        start = np.cumsum([0, *(len(u) for u in users)])
        watch = _concatenate(users, "watch_s")[start[owner[targets]] + source[targets]]
    event_us = _new_events(columns, users)
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
        labels=_tensor(columns["action"][targets]), watch=torch.from_numpy(watch), source=_tensor(source[targets]),
        event_us=_tensor(event_us),
    )  # fmt: skip


def _new_events(columns: dict[str, NDArray], users: Sequence[UserEvents]) -> Int64s:
    """The time of each token that was not learned from before, else NO_EVENT; a context token has its user's newest.

    In a user's sequence these are the new interactions and the actions on them: a window has its interactions with all
    their actions, so what became known of an earlier one meanwhile was learned from with that one.
    An impression that is put as a candidate of its request is new there, and not again in the history of later ones.
    To a request what became known since the one before is new, be it older: that one did not see it.
    """
    owner, kind, time = columns["owner"], columns["kind"], columns["query_time"]
    asked = columns.get("query", np.zeros_like(kind)) > 0
    new_from = np.array([u.new_from for u in users], dtype=np.int64)[owner]
    since = np.array([u.new_since() for u in users], dtype=np.int64)[owner]
    one_request = np.array([u.new_since_us is not None for u in users], dtype=bool)[owner]
    by_time = one_request | (kind == AUX)  # an auxiliary value stands for no single interaction
    new = asked | np.where(by_time, columns["key_time"] >= since, columns["source"] >= new_from)
    if (asked & (kind == IMPRESSION)).any():
        new &= asked | (kind != IMPRESSION)
    event = np.where(new, time, NO_EVENT)
    newest = np.full(len(users), NO_EVENT)
    np.maximum.at(newest, owner, event)
    return np.where(kind == CONTEXT, newest[owner], event)
