"""Who gets a table's deltas, each with a cursor of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from model.table_delta import TableDelta

if TYPE_CHECKING:
    from model._native import freshet_table


class DeltaConsumers:
    """Consumers of one table by name. Any thread.

    A cursor is the epoch up to which its consumer has acknowledged everything; a newcomer has acknowledged nothing yet,
    and its first delta has all rows and candidates. Tombstones that every consumer has are dropped.
    """

    def __init__(self, table: freshet_table.Table) -> None:
        self._table = table
        self._cursors: dict[str, int] = {}
        self._newcomers: set[str] = set()
        self._lock = threading.Lock()

    def subscribe(self, consumer: str) -> None:
        """From now on `export(consumer)` gives what changed."""
        with self._lock:
            if consumer not in self._cursors:
                self._cursors[consumer] = self._table.advance_epoch()
                self._newcomers.add(consumer)

    def export(self, consumer: str) -> tuple[TableDelta, int]:
        """All that changed since what the consumer acknowledged, and the epoch to acknowledge once it is safe there.

        Until then it comes again: a consumer that fails loses nothing. KeyError for an unknown consumer.
        """
        with self._lock:  # meanwhile no acknowledgement drops tombstones that this export needs
            since, new = self._cursors[consumer], consumer in self._newcomers
            epoch = self._table.advance_epoch()
            delta = TableDelta.of(self._table.export_delta(since))
            if not new:
                return delta, epoch
            everything = TableDelta.of(self._table.export_all())  # what came back since the delta is no longer gone
        gone = np.setdiff1d(delta.tombstones, everything.keys, assume_unique=True)
        return replace(everything, tombstones=gone), epoch

    def acknowledge(self, consumer: str, epoch: int) -> None:
        """The consumer has all up to that epoch; one that is no later than its cursor changes nothing.

        KeyError for an unknown consumer, ValueError for an open epoch.
        """
        with self._lock:
            if not 0 <= epoch < self._table.epoch():
                raise ValueError(f"epoch {epoch} is not closed; acknowledge what export returned")
            if epoch > self._cursors[consumer]:  # else it is of an export from before: of a newcomer, before it came
                self._cursors[consumer] = epoch
                self._newcomers.discard(consumer)
            self._drop_tombstones()

    def unsubscribe(self, consumer: str) -> None:
        """The consumer is gone for good: tombstones wait for it no longer. KeyError for an unknown consumer.

        After the last one they stay until somebody drops them: whoever exports without a consumer may want them.
        """
        with self._lock:
            del self._cursors[consumer]
            self._newcomers.discard(consumer)
            self._drop_tombstones()

    def _drop_tombstones(self) -> None:
        if (everyone := min(self._cursors.values(), default=0)) > 0:
            self._table.drop_tombstones(everyone)

    @contextmanager
    def held(self) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
        """Cursors and newcomers; nobody's cursor moves meanwhile."""
        with self._lock:
            yield dict(self._cursors), tuple(sorted(self._newcomers))

    def restore(self, cursors: Mapping[str, int], newcomers: Sequence[str]) -> None:
        """As `held` gave them."""
        with self._lock:
            self._cursors, self._newcomers = dict(cursors), set(newcomers)
