"""Random numbers that are a function of what they are for: the same in any batch, on any machine, after a restart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.catalogue import Int64s

_STEP, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform(seed: int, *columns: Int64s | int) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each row of the int64 columns (scalars are repeated): splitmix64 over the fields."""
    rows = np.broadcast_arrays(*(np.asarray(column, dtype=np.int64) for column in columns))
    state = np.full(rows[0].shape, seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for row in rows:
            state = splitmix64(state ^ splitmix64(row.astype(np.uint64) + _STEP))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each number mixed to one that looks random. The sums overflow: with np.errstate(over="ignore")."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))
