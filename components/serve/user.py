"""One user's events in memory: small immutable arrays, replaced when something new arrives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from components.schemas import ACTIONS, action_bit
from model.inputs import PAGE_SLOT, UserEvents

IMPRESSION_ROW = np.dtype(
    [
        ("request_id", "i8"), ("item_id", "i8"), ("timestamp", "i8"), ("known_at", "i8"), ("position", "i4"),
        ("page", "i8"), ("version", "i4"), ("delta", "i8"), ("score", "f4"),
    ]
)  # fmt: skip
ACTION_ROW = np.dtype(
    [
        ("request_id", "i8"), ("item_id", "i8"), ("timestamp", "i8"), ("known_at", "i8"), ("mask", "i4"),
        ("value", "f4"),
    ]
)  # fmt: skip
_FIRST_IMPRESSION = ("known_at", "timestamp", "position", "page", "version", "delta")
_FIRST_ACTION = ("timestamp", "known_at", "value")
"""Of copies the smallest in these columns stays, as in the join: two may come in one batch."""
_MASKS = {name: action_bit(name) for name in ACTIONS}


@dataclass(frozen=True)
class UserRows:
    """Impressions (IMPRESSION_ROW) and actions (ACTION_ROW) of one user."""

    impressions: NDArray[np.void]
    actions: NDArray[np.void]


_NOTHING = UserRows(np.zeros(0, IMPRESSION_ROW), np.zeros(0, ACTION_ROW))


class User:
    """The newest interactions of one user. Not thread-safe: History holds the lock."""

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self._rows = _NOTHING
        self._keys: set[tuple[int, int]] | None = set()
        self._events: UserEvents | None = UserEvents.empty(user_id)

    def add(self, new: UserRows, limit: int) -> None:
        """Add events; of equal keys one stays, the same as in the join. Keeps about `limit` interactions."""
        impressions = _first(self._rows.impressions, new.impressions, ("request_id", "item_id"), _FIRST_IMPRESSION)
        actions = _first(self._rows.actions, new.actions, ("request_id", "item_id", "mask"), _FIRST_ACTION)
        rows = UserRows(impressions, actions)
        if len(impressions) > limit + limit // 4 or len(actions) > 8 * limit:
            rows = _newest(rows, limit)
        self._rows, self._keys, self._events = rows, None, None

    def keys(self) -> set[tuple[int, int]]:
        """(request_id, item_id) of the impressions."""
        if self._keys is None:
            rows = self._rows.impressions
            self._keys = set(zip(rows["request_id"].tolist(), rows["item_id"].tolist(), strict=True))
        return self._keys

    def events(self, now_us: int, attribution_us: int) -> UserEvents:
        """The events known before `now_us`, with attributed actions only. `now_us` never falls from call to call."""
        if self._events is not None:
            return self._events
        impressions, actions = self._rows.impressions, self._rows.actions
        seen = UserRows(impressions[impressions["known_at"] < now_us], actions[actions["known_at"] < now_us])
        events = build_events(self.user_id, seen, attribution_us)
        if len(seen.impressions) == len(impressions) and len(seen.actions) == len(actions):
            self._events = events  # no later request has an earlier time, so it sees all of these, too
        return events


def build_events(user_id: int, rows: UserRows, attribution_us: int) -> UserEvents:
    """The row of a sequence that training would see: interactions in order, attributed actions, auxiliary series."""
    shown = np.sort(rows.impressions, order=["timestamp", "request_id", "position"])
    place = {key: i for i, key in enumerate(zip(shown["request_id"].tolist(), shown["item_id"].tolist(), strict=True))}
    acted = rows.actions
    of = np.array(
        [place.get(key, -1) for key in zip(acted["request_id"].tolist(), acted["item_id"].tolist(), strict=True)],
        dtype=np.int64,
    )
    gap = acted["timestamp"] - (shown["timestamp"][of] if len(shown) else 0)
    attributed = (of >= 0) & (gap >= 0) & (gap <= attribution_us)
    acted, of = acted[attributed], of[attributed]
    known = np.maximum(acted["known_at"], shown["known_at"][of]) if len(of) else acted["known_at"]
    order = np.lexsort([acted["mask"], of, known])
    acted, of, known = acted[order], of[order], known[order]
    actions = np.zeros(len(shown), np.int32)
    np.bitwise_or.at(actions, of, acted["mask"])
    watch = np.zeros(len(shown), np.float32)
    watched = acted["mask"] == _MASKS["watch"]
    np.fmax.at(watch, of[watched], acted["value"][watched])
    by_known = np.argsort(shown["known_at"], kind="stable")
    page = shown["page"][by_known]
    changed = np.sort(by_known[np.r_[True, page[1:] != page[:-1]][: len(page)]])
    columns = {name: np.ascontiguousarray(shown[name]) for name in IMPRESSION_ROW.names or ()}
    return UserEvents(
        user_id=user_id,
        new_from=0,
        **columns,
        actions=actions,
        watch_s=watch,
        action_of=of.astype(np.int32),
        action_known_at=known,
        action_mask=np.ascontiguousarray(acted["mask"]),
        action_value=np.ascontiguousarray(acted["value"]),
        aux_slot=np.full(len(changed), PAGE_SLOT, np.int32),
        aux_value=shown["page"][changed],
        aux_known_at=shown["known_at"][changed],
    )


def split_by_user(impressions: pa.Table, actions: pa.Table) -> Iterator[tuple[int, UserRows]]:
    """Tables of the event log -> each user's rows; unknown actions, which the join sets aside, are left out."""
    actions = actions.filter(pc.is_in(actions["action"], pa.array(ACTIONS)))
    shown, acted = _impression_rows(impressions), _action_rows(actions)
    by_shown = _groups(impressions, shown)
    by_acted = _groups(actions, acted)
    for user_id in sorted(by_shown.keys() | by_acted.keys()):
        yield (
            user_id,
            UserRows(
                by_shown.get(user_id, _NOTHING.impressions),
                by_acted.get(user_id, _NOTHING.actions),
            ),
        )


def _groups(table: pa.Table, rows: NDArray[np.void]) -> dict[int, NDArray[np.void]]:
    users = table["user_id"].to_numpy()
    order = np.argsort(users, kind="stable")
    ids, first = np.unique(users[order], return_index=True)
    parts = np.split(rows[order], first[1:])
    return dict(zip(ids.tolist(), parts, strict=False))


def _impression_rows(table: pa.Table) -> NDArray[np.void]:
    rows = np.zeros(table.num_rows, IMPRESSION_ROW)
    missing: dict[str, float] = {"version": -1, "delta": -1, "score": np.nan}
    for name in ("request_id", "item_id", "timestamp", "position", "page", "version", "delta", "score"):
        rows[name] = _numbers(table[name], missing.get(name, 0))
    rows["known_at"] = np.maximum(rows["timestamp"], _numbers(table["received_at"], 0))
    return rows


def _action_rows(table: pa.Table) -> NDArray[np.void]:
    rows = np.zeros(table.num_rows, ACTION_ROW)
    for name in ("request_id", "item_id", "timestamp"):
        rows[name] = _numbers(table[name], 0)
    rows["known_at"] = np.maximum(rows["timestamp"], _numbers(table["received_at"], 0))
    rows["value"] = _numbers(table["value"], 0.0)
    names = table["action"].to_pylist()
    rows["mask"] = [_MASKS[name] for name in names]
    return rows


def _numbers(column: pa.ChunkedArray, missing: float) -> NDArray:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    return column.fill_null(pa.scalar(missing, column.type)).to_numpy()


def _first(old: NDArray[np.void], new: NDArray[np.void], key: tuple[str, ...], by: tuple[str, ...]) -> NDArray[np.void]:
    """Old and new rows; of rows with equal keys the smallest in the columns `by`, then the one that came first."""
    if not len(new):
        return old
    rows = np.concatenate([old, new])
    order = np.lexsort([rows[name] for name in reversed((*key, *by))])
    rows = rows[order]
    same = np.ones(len(rows) - 1, dtype=bool)
    for name in key:
        same &= rows[name][1:] == rows[name][:-1]
    return rows[np.r_[True, ~same]]


def _newest(rows: UserRows, limit: int) -> UserRows:
    """The interactions with the newest activity: the newest n tokens all belong to the newest n of these."""
    shown, acted = rows.impressions, rows.actions
    keys = list(zip(shown["request_id"].tolist(), shown["item_id"].tolist(), strict=True))
    active = dict(zip(keys, shown["known_at"].tolist(), strict=True))
    acted_keys = list(zip(acted["request_id"].tolist(), acted["item_id"].tolist(), strict=True))
    for key, known in zip(acted_keys, acted["known_at"].tolist(), strict=True):
        if key in active:
            active[key] = max(active[key], known)
    order = np.argsort([active[key] for key in keys], kind="stable")[-limit:]
    kept = {keys[i] for i in order}
    ours = np.array([key in kept for key in acted_keys], dtype=bool)
    waiting = np.flatnonzero(~ours & np.array([key not in active for key in acted_keys], dtype=bool))
    waiting = waiting[np.argsort(acted["known_at"][waiting], kind="stable")[-limit:]]  # their impression may come yet
    return UserRows(shown[np.sort(order)], acted[np.sort(np.r_[np.flatnonzero(ours), waiting])])
