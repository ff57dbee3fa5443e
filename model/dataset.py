"""Sequence rows (Parquet) -> users, and users -> batches in a declared order."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from components.errors import BadInput
from model.events import EVENT_DTYPES, UserEvents

if TYPE_CHECKING:
    from model.stochastic_length import StochasticLength

POOL = 16
"""Batches drawn together: lengths are sorted within such a pool, so that a batch holds users of similar length."""


class SequenceDataset:
    """Users of one sequence dataset, by index, without copying their events."""

    _context = 0  # tokens of each row before its history

    def __init__(self, table: pa.Table) -> None:
        """table: each row a stretch of a user's events; columns: the fields of `UserEvents`, arrays as lists.

        Raises BadInput for a missing column, for nulls and fractions among whole numbers (in a column of float numbers
        a null reads as NaN), and for a new_from below 0.
        """
        wanted = ["user_id", "new_from", *EVENT_DTYPES]
        if missing := [name for name in wanted if name not in table.column_names]:
            raise BadInput(f"the sequences lack the columns {', '.join(missing)}; build them with components.sequences")
        for name in ("user_id", "new_from"):
            _check_whole(table[name], name)
        self.user_id = table["user_id"].to_numpy().astype(np.int64)
        self.new_from = table["new_from"].to_numpy().astype(np.int64)
        if (self.new_from < 0).any():
            raise BadInput("new_from is below 0; it is the index of the first new interaction, 0 if all are new")
        self._values: dict[str, NDArray] = {}
        self._offsets: dict[str, NDArray[np.int64]] = {}
        for name, dtype in EVENT_DTYPES.items():
            self._values[name], self._offsets[name] = _lists(table[name], name, dtype)
        self._asked = np.zeros(len(self), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.user_id)

    def __getitem__(self, index: int) -> UserEvents:
        """The events of one user, as views."""
        arrays = {}
        for name, values in self._values.items():
            offsets = self._offsets[name]
            arrays[name] = values[offsets[index] : offsets[index + 1]]
        return UserEvents(user_id=int(self.user_id[index]), new_from=int(self.new_from[index]), **arrays)

    def asking(self, actions: int) -> SequenceDataset:
        """The same users, with one token more for each new interaction that has one of these action bits."""
        asking = copy.copy(self)
        asked = self.is_new() & ((self._values["actions"] & actions) > 0)
        asking._asked = np.bincount(self.owners()[asked], minlength=len(self))
        return asking

    def with_context(self, count: int) -> SequenceDataset:
        """The same rows, each with `count` context tokens before its history."""
        changed = copy.copy(self)
        changed._context = count
        return changed

    def users(self, indices: Iterable[int]) -> list[UserEvents]:
        """Several users."""
        return [self[int(index)] for index in indices]

    def targets(self) -> int:
        """Number of interactions that are trained on or evaluated."""
        return int(np.maximum(self.counts() - self.new_from, 0).sum())

    def counts(self) -> NDArray[np.int64]:
        """(users,) number of interactions."""
        return np.diff(self._offsets["item_id"])

    def owners(self) -> NDArray[np.int64]:
        """(interactions,) index of the user that each is of."""
        return np.repeat(np.arange(len(self)), self.counts())

    def is_new(self) -> NDArray[np.bool_]:
        """(interactions,) which are trained on or evaluated."""
        owner = self.owners()
        return np.arange(len(owner)) - self._offsets["item_id"][owner] >= self.new_from[owner]

    def column(self, name: str) -> NDArray:
        """An array field of all users, joined; `bounds` says where each user's part begins."""
        return self._values[name]

    def bounds(self, name: str) -> NDArray[np.int64]:
        """(users + 1,) where each user's part of a column begins."""
        return self._offsets[name]

    def tokens(self) -> NDArray[np.int64]:
        """(users,) an upper bound of each user's tokens."""
        events = sum(np.diff(self._offsets[name]) for name in ("item_id", "action_of", "aux_slot"))
        return self._asked + self._context + events

    def first_new(self) -> NDArray[np.int64]:
        """(users,) time of the first new interaction in microseconds; the largest int64 if there is none."""
        offsets = self._offsets["item_id"]
        place = offsets[:-1] + self.new_from
        times = np.full(len(self), np.iinfo(np.int64).max)
        some = place < offsets[1:]
        times[some] = self._values["timestamp"][place[some]]
        return times

    def shuffled(
        self, budget: int, seed: int, epoch: int, lengths: StochasticLength | None = None, sampled: bool = False
    ) -> list[NDArray[np.int64]]:
        """Batches of row indices for one epoch: a function of the dataset and these arguments alone.

        lengths: count only the tokens that this rule leaves, about. sampled: only the rows that are `emitted`.
        """
        random = np.random.default_rng([seed, epoch])
        tokens = self._left(lengths, epoch, keep_new=False)
        rows = self._with_targets()
        order = random.permutation(rows[self.emitted(seed, epoch)[rows]] if sampled else rows)
        batches: list[NDArray[np.int64]] = []
        for pool in _cut(order, tokens, budget * POOL):
            batches.extend(_cut(pool[np.argsort(tokens[pool], kind="stable")], tokens, budget))
        return [batches[i] for i in random.permutation(len(batches))]

    def in_event_order(
        self, budget: int, lengths: StochasticLength | None = None, epoch: int = 0
    ) -> list[NDArray[np.int64]]:
        """Batches for one pass, rows ordered by their first new interaction.

        lengths: count only the tokens that this rule leaves, about, when it drops from the context alone.
        """
        rows = self._with_targets()
        order = rows[np.argsort(self.first_new()[rows], kind="stable")]
        return list(_cut(order, self._left(lengths, epoch, keep_new=True), budget))

    def emitted(self, seed: int, epoch: int) -> NDArray[np.bool_]:
        """Generative sampling at rate 1/n per event: a row is a user's whole sequence already, so all are emitted."""
        return np.ones(len(self), dtype=bool)

    def _left(self, lengths: StochasticLength | None, epoch: int, *, keep_new: bool) -> NDArray[np.int64]:
        """(rows,) tokens that a rule leaves in this epoch, about: as if all interactions had equally many."""
        tokens, counts = self.tokens(), self.counts()
        if lengths is None:
            return tokens
        kept = lengths.lengths(counts, self.user_id, epoch)
        fixed = np.full_like(tokens, self._context)
        if keep_new:
            kept, fixed = np.maximum(kept, counts - self.new_from), fixed + self._asked
        return fixed + np.ceil((tokens - fixed) * (kept / np.maximum(counts, 1))).astype(np.int64)

    def _with_targets(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.counts() > self.new_from)


def _lists(column: pa.ChunkedArray, name: str, dtype: np.dtype) -> tuple[NDArray, NDArray[np.int64]]:
    """Values and offsets of a list column; large and plain lists alike."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise BadInput(f"sequence column {name} must hold lists and no nulls; it is {column.type}")
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    if dtype.kind == "i":
        _check_whole(array.values, name)
    values = array.values.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values, dtype=dtype), offsets


def _check_whole(column: pa.Array | pa.ChunkedArray, name: str) -> None:
    """One null would turn the whole column into float64, and merge ids."""
    if column.null_count or not pa.types.is_signed_integer(column.type):
        raise BadInput(
            f"sequence column {name} must hold whole numbers of at most 64 bits and no nulls; "
            f"it holds {column.type} with {column.null_count} nulls"
        )


def _cut(order: NDArray[np.int64], tokens: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Cut into runs of at most `budget` tokens; a longer user is a run of its own."""
    total, first = 0, 0
    for place, count in enumerate(tokens[order].tolist()):
        if total + count > budget and place > first:
            yield order[first:place]
            total, first = 0, place
        total += count
    if first < len(order):
        yield order[first:]
