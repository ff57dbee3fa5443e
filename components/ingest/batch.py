"""What an adapter hands over: valid events and items, and everything it set aside."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from components.schemas import ACTION_EVENTS, IMPRESSIONS, ITEMS, QUARANTINE, TIMESTAMP

Ints = NDArray[np.int64]


@dataclass
class Batch:
    """IMPRESSIONS, ACTION_EVENTS, ITEMS and QUARANTINE tables of one source, and how many rows were read."""

    event_rows: int = 0
    item_rows: int = 0
    duplicates: int = 0
    impressions: pa.Table = field(default_factory=IMPRESSIONS.empty_table)
    actions: pa.Table = field(default_factory=ACTION_EVENTS.empty_table)
    items: pa.Table = field(default_factory=ITEMS.empty_table)
    bad: pa.Table = field(default_factory=QUARANTINE.empty_table)

    def set_aside(self, *bad: pa.Table) -> None:
        self.bad = pa.concat_tables([self.bad, *bad])

    @property
    def bad_share(self) -> float:
        return self.bad.num_rows / max(self.event_rows + self.item_rows, 1)

    def span(self) -> tuple[int, int] | None:
        """First and last event time in UTC microseconds, or None without events."""
        times = np.concatenate([times_of(self.impressions), times_of(self.actions)])
        return (int(times.min()), int(times.max())) if len(times) else None


def impressions_table(
    request_id: Ints,
    user_id: Ints,
    item_id: Ints,
    time_us: Ints,
    received_us: Ints | None = None,
    position: Ints | None = None,
    page: Ints | None = None,
) -> pa.Table:
    """IMPRESSIONS from arrays; what the source does not know is 0, and `received_at` is the event's own time."""
    zeros = np.zeros(len(request_id), dtype=np.int64)
    columns = [
        pa.array(request_id),
        pa.array(user_id),
        pa.array(item_id),
        pa.array(time_us).cast(TIMESTAMP),
        pa.array(time_us if received_us is None else received_us).cast(TIMESTAMP),
        pa.array((zeros if position is None else position).astype(np.int32)),
        pa.array(zeros if page is None else page),
    ]
    served = [pa.nulls(len(zeros), field_.type) for field_ in list(IMPRESSIONS)[len(columns) :]]
    return pa.table(columns + served, schema=IMPRESSIONS)


def actions_table(
    request_id: Ints,
    user_id: Ints,
    item_id: Ints,
    time_us: Ints,
    action: str | NDArray[np.object_],
    value: NDArray[np.float64] | None = None,
    received_us: Ints | None = None,
) -> pa.Table:
    """ACTION_EVENTS from arrays; NaN values become null."""
    size = len(request_id)
    columns = [
        pa.array(request_id),
        pa.array(user_id),
        pa.array(item_id),
        pa.array(time_us).cast(TIMESTAMP),
        pa.array(time_us if received_us is None else received_us).cast(TIMESTAMP),
        pa.array([action] * size if isinstance(action, str) else action, pa.string()),
        pa.nulls(size, pa.float64()) if value is None else pa.array(value, from_pandas=True),
    ]
    return pa.table(columns, schema=ACTION_EVENTS)


def items_table(
    item_id: Ints, author_id: Ints, category: Ints, duration_s: NDArray[np.float64] | None = None
) -> pa.Table:
    """ITEMS that are available always; a duration of NaN becomes null."""
    size = len(item_id)
    duration = pa.nulls(size, pa.float32()) if duration_s is None else _nullable(duration_s)
    columns = [pa.array(item_id), pa.array(author_id), pa.array(category), duration]
    return pa.table([*columns, pa.nulls(size, TIMESTAMP), pa.nulls(size, TIMESTAMP)], schema=ITEMS)


def times_of(events: pa.Table) -> Ints:
    return np.asarray(events["timestamp"].cast(pa.int64()).to_numpy())


def in_slice(time_us: Ints, from_us: int | None, until_us: int | None) -> NDArray[np.bool_]:
    """Which times are in [from, until), None being unbounded; a row without a time (0) belongs to every slice."""
    inside = np.ones(len(time_us), dtype=bool)
    if from_us is not None:
        inside &= time_us >= from_us
    if until_us is not None:
        inside &= time_us < until_us
    return inside | (time_us == 0)


def repeated(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """True for each row that equals an earlier one in all columns."""
    return pd.DataFrame(dict(enumerate(columns))).duplicated().to_numpy()


def _nullable(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values.astype(np.float32), from_pandas=True)
