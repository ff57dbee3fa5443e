"""Gradients that wait between a table's forwards and its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.table_arrays import MAX_TIME_US, Float32Array, Int64Array, UInt32Array, as_floats


@dataclass(frozen=True, eq=False)
class Events:
    """What the ids of a forward stand for: position i for counts[i] events of its id, the newest at newest_us[i].

    None for a sampled negative, or what was counted before. Only events admit an id and keep its row from expiring.
    """

    counts: UInt32Array  # [n]
    newest_us: Int64Array  # [n], 0 (unknown) to the year 2106

    def check(self, n: int) -> None:
        """Raises ValueError unless they are of n ids and in time, TypeError for other dtypes."""
        if not len(self.counts) == len(self.newest_us) == n:
            raise ValueError(f"events are of {len(self.counts)} ids, but {n} are looked up; give one for each")
        if (self.counts.dtype, self.newest_us.dtype) != (np.uint32, np.int64):
            raise TypeError(
                f"events need uint32 counts and int64 times, got {self.counts.dtype}, {self.newest_us.dtype}"
            )
        if n and not 0 <= self.newest_us.min() <= self.newest_us.max() <= MAX_TIME_US:
            raise ValueError("times of events must be microseconds from 0 (unknown) to the year 2106")

    @classmethod
    def at(cls, times_us: torch.Tensor) -> Events:
        """One event each at int64 times_us [n]; below 0: none."""
        times = times_us.numpy()
        return cls((times >= 0).astype(np.uint32), np.maximum(times, 0))

    @classmethod
    def none(cls, n: int) -> Events:
        """For n ids that stand for no event."""
        return cls(np.zeros(n, np.uint32), np.zeros(n, np.int64))

    @classmethod
    def of_items(cls, n: int, place: torch.Tensor, times_us: torch.Tensor) -> Events:
        """For n ids, of which place[k] has an event at times_us[k] (below 0: none)."""
        single, where = cls.at(times_us), place.numpy()
        counts, newest = np.zeros(n, np.uint32), np.zeros(n, np.int64)
        np.add.at(counts, where, single.counts)
        np.maximum.at(newest, where, single.newest_us)
        return cls(counts, newest)


@dataclass
class Forward:
    """The rows, or pooled bags, that one training forward handed out; autograd leaves the gradients in `out.grad`."""

    ids: Int64Array  # [n]
    out: torch.Tensor  # [n, dim], or [bags, dim] with offsets; leaf
    offsets: Int64Array | None = None  # [bags + 1]
    mean: bool = False
    events: Events | None = None  # None: one each, at the time of the step

    def events_at(self, now_us: int) -> Events:
        """With the time of the step where the forward has none of its own."""
        n = len(self.ids)
        return self.events or Events(np.ones(n, np.uint32), np.full(n, now_us, np.int64))

    def reads_at(self, now_us: int) -> tuple[Int64Array, Int64Array]:
        """The ids, and when each was last read for an event; 0 for those that stand for none."""
        events = self.events_at(now_us)
        return self.ids, np.where(events.counts > 0, events.newest_us, 0)

    def bags(self) -> tuple[UInt32Array, Float32Array]:
        """For each id, the row of `out` that it went into, and its share of it."""
        if self.offsets is None:
            return np.arange(len(self.ids), dtype=np.uint32), np.ones(len(self.ids), np.float32)
        sizes = np.diff(self.offsets)
        share = 1 / np.maximum(sizes, 1) if self.mean else np.ones(len(sizes))
        return np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes), np.repeat(share, sizes).astype(np.float32)


@dataclass(frozen=True)
class Gradients:
    """One batch: id i has gradient scale[i] * grads[row[i]]; row and scale None: grads[i]."""

    ids: Int64Array  # [n]
    grads: Float32Array  # [m, dim]
    row: UInt32Array | None = None  # [n]
    scale: Float32Array | None = None  # [n]
    events: Events | None = None  # None: one each, at the time of the step

    @classmethod
    def of(cls, forwards: list[Forward], now_us: int = 0) -> Gradients | None:
        """Of all forwards with a gradient, in order, for a step at now_us; None if there is none."""
        done = [f for f in forwards if f.out.grad is not None]
        if not done:
            return None
        ids = np.concatenate([f.ids for f in done])
        grads = np.concatenate([as_floats(f.out.grad, "gradient") for f in done])  # type: ignore[arg-type]
        events = _joined(done, now_us)
        if all(f.offsets is None for f in done):
            return cls(ids, grads, events=events)
        rows, scales, before = [], [], 0
        for f in done:
            row, scale = f.bags()
            rows.append(row + np.uint32(before))
            scales.append(scale)
            before += len(f.out)
        return cls(ids, grads, np.concatenate(rows), np.concatenate(scales), events)

    def squared_norm(self) -> float:
        """Sum of squares, first summed per id as in a dense table's gradient."""
        ids, inverse = np.unique(self.ids, return_inverse=True)
        grads = torch.from_numpy(self.grads).double()
        if self.row is not None and self.scale is not None:
            grads = grads[torch.from_numpy(self.row.astype(np.int64))] * torch.from_numpy(self.scale)[:, None]
        summed = torch.zeros(len(ids), grads.shape[1], dtype=torch.float64)
        summed.index_add_(0, torch.from_numpy(inverse.reshape(-1)), grads)
        return float(summed.square().sum())


def _joined(forwards: Sequence[Forward], now_us: int) -> Events | None:
    if all(f.events is None for f in forwards):
        return None
    each = [f.events_at(now_us) for f in forwards]
    return Events(np.concatenate([e.counts for e in each]), np.concatenate([e.newest_us for e in each]))
