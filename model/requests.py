"""Requests as training examples: what the production network needs, whose input is relative to one request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from components.errors import BadInput
from model.dataset import SequenceDataset
from model.events import BEFORE_ALL_US, UserEvents
from model.hashing import uniform

if TYPE_CHECKING:
    from model.stochastic_length import StochasticLength


class RequestDataset(SequenceDataset):
    """Row = one request of a user: the interactions before it as context, those of the request as targets.

    Neighbouring interactions of one user with equal timestamps and pages are one request, since they see the same
    history and a context token of the page. Every new interaction is a target of exactly one row. Raises BadInput when
    a user's interactions are not ordered by time.
    """

    def __init__(self, users: SequenceDataset, reach: int, positive: int | None = None) -> None:
        """reach: history tokens that matter to a request, as `ModelConfig.reach` says; it bounds `tokens`.

        positive: only the requests with one of these action bits on a new interaction.
        """
        self._users, self._reach = users, reach
        offsets, time, page = users.bounds("item_id"), users.column("timestamp"), users.column("page")
        owner = users.owners()
        place = np.arange(len(time)) - offsets[owner]
        same = owner[1:] == owner[:-1]
        if (same & (time[1:] < time[:-1])).any():
            raise BadInput("request examples need interactions in order of time; sort them by (timestamp, request_id)")
        other = (time[1:] != time[:-1]) | (page[1:] != page[:-1])
        first = np.r_[True, ~same | other | (place[1:] == users.new_from[owner[1:]])][: len(time)]
        start = np.flatnonzero(first)
        stop = np.append(start[1:], len(time))[: len(start)]
        new = place[start] >= users.new_from[owner[start]]
        if positive is not None and len(start):
            new &= (np.bitwise_or.reduceat(users.column("actions"), start) & positive) > 0
        start, stop = start[new], stop[new]
        self.owner, self.start, self.stop = owner[start], place[start], place[start] + stop - start
        self.user_id = users.user_id[self.owner]
        self.new_from = self.start
        self._time = time[start]
        asked = np.arange(len(time)) if positive is None else np.flatnonzero(users.column("actions") & positive)
        before = np.append(-1, asked)[np.searchsorted(asked, start)]  # the last example before; maybe another user's
        self._since = np.where(before >= offsets[self.owner], time[before], BEFORE_ALL_US)

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: int) -> UserEvents:
        """The user's events up to and with the request; new is what became known since the example before.

        That may be one of an earlier window. What happened at requests that were no example is new to the next one.
        """
        events = self._users[int(self.owner[index])]
        request = events.take(np.arange(self.stop[index]), int(self.start[index]))
        request.new_since_us = int(self._since[index])
        return request

    def bounds(self, name: str) -> NDArray[np.int64]:
        """Not known for requests: their histories overlap."""
        raise BadInput("requests share their histories; ask the dataset of users for its columns")

    def counts(self) -> NDArray[np.int64]:
        return self.stop

    def targets(self) -> int:
        return int((self.stop - self.start).sum())

    def tokens(self) -> NDArray[np.int64]:
        return self._tokens(np.ones(len(self)))

    def _tokens(self, share: NDArray[np.float64]) -> NDArray[np.int64]:
        """(rows,) about an upper bound (see reach), with this share of the interactions before the request."""
        of_user = self._users.tokens() - self._users.counts()  # action and auxiliary events, at most
        before = np.ceil((self.start + of_user[self.owner]) * share).astype(np.int64)
        return np.minimum(before, self._reach) + self._context + self.stop - self.start

    def _left(self, lengths: StochasticLength | None, epoch: int, *, keep_new: bool) -> NDArray[np.int64]:
        """Targets are kept in any case; the reach cuts what the rule has left."""
        if lengths is None:
            return self.tokens()
        kept = lengths.lengths(self.stop, self.user_id, epoch) - (self.stop - self.start)
        return self._tokens(np.maximum(kept, 0) / np.maximum(self.start, 1))

    def first_new(self) -> NDArray[np.int64]:
        return self._time

    def emitted(self, seed: int, epoch: int) -> NDArray[np.bool_]:
        """Generative sampling: each of a user's n requests with probability 1/n, so about one per user and pass."""
        per_user = np.bincount(self.owner, minlength=len(self._users))[self.owner]
        return uniform(seed, epoch, self.user_id, self.start, self._time) < 1.0 / per_user

    def _with_targets(self) -> NDArray[np.int64]:
        return np.arange(len(self))
