"""What happened to a user, and what is asked about the user: the raw side of the model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from components.errors import BadInput
from components.schemas import ACTIONS
from model.catalogue import Int64s, int64_ids

IMPRESSION, ACTION, AUX, REQUEST, CONTEXT = range(5)
"""Kinds of tokens."""
BEFORE_ALL_US = -(2**62)
"""Before any event. Also the time of context tokens: their gap to any event falls into one and the same time bucket."""
NEVER_US = 2**62


@dataclass
class UserEvents:
    """One user's interactions, action events and auxiliary series: the fields of a sequence row, as numpy arrays.

    Times are UTC microseconds. The n interactions are in order of (timestamp, request_id, position).
    """

    user_id: int
    new_from: int  # index of the first interaction that is trained on; those before it are context
    request_id: Int64s  # [n] of the impression; one request showed one or more items
    item_id: Int64s  # [n]
    timestamp: Int64s  # [n] of the request
    known_at: Int64s  # [n] from when on others may see it: not before its own time
    position: NDArray[np.int32]  # [n] in the list that was shown
    page: Int64s  # [n] where it was shown, any id
    actions: NDArray[np.int32]  # [n] labels: bits of components.schemas.ACTIONS, 0 = none, a negative
    watch_s: NDArray[np.float32]  # [n] label: seconds watched, 0 = none
    score: NDArray[np.float32]  # [n] with version and delta: what it was shown with; NaN, -1, -1 = unknown
    version: NDArray[np.int32]  # [n]
    delta: Int64s  # [n]
    action_of: NDArray[np.int32]  # [m] input: what became known of the user's actions; index of the interaction
    action_known_at: Int64s  # [m] when
    action_mask: NDArray[np.int32]  # [m] which actions, bits as in `actions`
    action_value: NDArray[np.float32]  # [m] seconds of a watch, stars of a rating
    aux_slot: NDArray[np.int32]  # [a] a slowly changing feature: 0 = page
    aux_value: Int64s  # [a] its new value
    aux_known_at: Int64s  # [a] when
    new_since_us: int | None = field(default=None, init=False)  # None: the time of the interaction new_from

    def new_since(self) -> int:
        """From this time on an event was not learned from before (with new_since_us: what became known, not happened).

        NEVER_US if none is new.
        """
        if self.new_since_us is not None:
            return self.new_since_us
        return int(self.timestamp[self.new_from]) if self.new_from < len(self) else NEVER_US

    @classmethod
    def empty(cls, user_id: int) -> UserEvents:
        """A user without any event."""
        arrays = {name: np.zeros(0, dtype=dtype) for name, dtype in EVENT_DTYPES.items()}
        return cls(user_id=user_id, new_from=0, **arrays)

    def __len__(self) -> int:
        """Number of interactions."""
        return len(self.item_id)

    def take(self, places: Int64s, new_from: int) -> UserEvents:
        """Some of the interactions (ascending indices), with the action events on them; the auxiliary series stays.

        Raises BadInput as `check_events` does for what does not fit together.
        """
        _check_lengths(self)
        _check_action_of(self.action_of, len(self))
        place = np.full(len(self), -1)
        place[places] = np.arange(len(places))
        of = place[self.action_of]
        kept = of >= 0
        arrays: dict[str, NDArray] = {}
        for name, dtype in EVENT_DTYPES.items():
            value = getattr(self, name)
            if name.startswith("action_"):
                arrays[name] = (of if name == "action_of" else value)[kept].astype(dtype, copy=False)
            else:
                arrays[name] = value if name.startswith("aux_") else value[places]
        taken = UserEvents(user_id=self.user_id, new_from=new_from, **arrays)
        taken.new_since_us = self.new_since_us
        return taken


_DTYPES = {
    "int32": ("position", "actions", "version", "action_of", "action_mask", "aux_slot"),
    "float32": ("watch_s", "score", "action_value"),
}
EVENT_DTYPES: dict[str, np.dtype] = {
    f.name: np.dtype(next((kind for kind, names in _DTYPES.items() if f.name in names), "int64"))
    for f in fields(UserEvents)
    if f.name not in ("user_id", "new_from", "new_since_us")
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
        """The candidates of one request: each sees the history known at request time, none sees another.

        Raises BadInput for ids that are no int64.
        """
        ids = int64_ids(item_id, "candidates")
        return cls(IMPRESSION, ids, np.full(len(ids), request_time_us), np.full(len(ids), page))

    @classmethod
    def impressions(cls, item_id: Int64s, time_us: Int64s, page: Int64s) -> Queries:
        """Impressions that were shown, put as candidates of their moments."""
        return cls(IMPRESSION, item_id, time_us, page)

    @classmethod
    def requests(cls, time_us: Int64s, page: Int64s) -> Queries:
        """REQUEST rows: a moment and a page without an item."""
        times = np.asarray(time_us, dtype=np.int64)
        return cls(REQUEST, np.zeros(len(times), dtype=np.int64), times, np.asarray(page, dtype=np.int64))


_SERIES = {"action_of": "action events", "aux_slot": "auxiliary values", "item_id": "interactions"}
_LEADS = {
    name: "action_of" if name.startswith("action_") else "aux_slot" if name.startswith("aux_") else "item_id"
    for name in EVENT_DTYPES
}
"""Each array field's series, by the field that says how long it is."""
_KNOWN_ACTIONS = (1 << len(ACTIONS)) - 1


def check_events(users: Sequence[UserEvents], columns: dict[str, NDArray]) -> None:
    """Refuse what cannot be a user's history; `columns` holds the array fields of all users, joined.

    Raises BadInput for arrays of one series that differ in length, actions on interactions that are not there, and
    bits of unknown actions. Order and ties of timestamps, unknown ids and NaN values are no errors.
    """
    for user in users:  # one by one: joined, an entry too few of one would be filled by an entry too many of another
        _check_lengths(user)
    counts = np.array([len(u) for u in users], dtype=np.int64)
    limits = np.repeat(counts, np.array([len(u.action_of) for u in users], dtype=np.int64))
    _check_action_of(columns["action_of"], limits)
    for name in ("actions", "action_mask"):
        if unknown := int(np.bitwise_or.reduce(columns[name], initial=0)) & ~_KNOWN_ACTIONS:
            raise BadInput(f"{name} has bits of unknown actions ({unknown:#x}); known actions are {', '.join(ACTIONS)}")


def _check_lengths(user: UserEvents) -> None:
    for name, lead in _LEADS.items():
        count, wanted = len(getattr(user, name)), len(getattr(user, lead))
        if count != wanted:
            raise BadInput(
                f"{name} has {count} entries for {wanted} {_SERIES[lead]} of user {user.user_id}; give one each"
            )


def _check_action_of(of: NDArray[np.int32], limits: Int64s | int) -> None:
    if ((of < 0) | (of >= limits)).any():
        raise BadInput("action_of points outside the user's interactions; it holds indices from 0 up")
