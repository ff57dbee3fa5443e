"""Request ids made from what is known about a request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.hashing import splitmix64

REQUEST_ID_BITS = 53
"""Request ids stay below 2^53, so that clients that keep numbers as doubles keep them exactly."""


def request_ids(*parts: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Ids in [0, 2^53) that depend on all parts (splitmix64 over each in turn); int64 arrays that broadcast.

    Two given requests share an id with probability 2^-53, and joins compare user and item, too.
    """
    arrays = np.broadcast_arrays(*(np.asarray(part, dtype=np.int64) for part in parts))
    mixed = np.zeros(arrays[0].shape, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for array in arrays:
            mixed = splitmix64(mixed ^ array.astype(np.uint64))
    return (mixed >> np.uint64(64 - REQUEST_ID_BITS)).astype(np.int64)
