"""What goes in and out of an embedding table: ids, floats, deltas."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from model._native import freshet_table

Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
UInt16Array = npt.NDArray[np.uint16]
Float32Array = npt.NDArray[np.float32]
Ids = torch.Tensor | Int64Array
Floats = torch.Tensor | Float32Array

MAX_TIME_US = (2**32 - 1) * 1_000_000
"""The newest event time that a table takes, in the year 2106: it keeps seconds in 32 bits (csrc/table/row_meta.h)."""


def _no_ids() -> Int64Array:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class TableDelta:
    """Erased keys, changed rows and candidates, to be applied in this order; each in ascending order of key.

    keys and tombstones are disjoint. state None: that of new rows; last_update_us None: unknown; counts (occurrences of
    each row in updates) None: 0. candidates: ids that were seen but not admitted yet, as words of hour << 16 | count.
    """

    keys: Int64Array  # [n]
    weights: Float32Array  # [n, dim]
    state: Float32Array | None = None  # [n, state_dim]: optimiser state
    tombstones: Int64Array = field(default_factory=_no_ids)  # [m]
    last_update_us: Int64Array | None = None  # [n]: event time of each row's newest update, whole seconds, 0 = unknown
    counts: UInt16Array | None = None  # [n]
    candidate_keys: Int64Array = field(default_factory=_no_ids)  # [c]
    candidates: UInt32Array = field(default_factory=lambda: np.empty(0, np.uint32))  # [c]

    @classmethod
    def of(cls, arrays: freshet_table.Delta) -> TableDelta:
        """As the compiled table exports it."""
        keys, weights, state, last_update_us, counts, candidate_keys, candidates, tombstones = arrays
        return cls(keys, weights, state, tombstones, last_update_us, counts, candidate_keys, candidates)


def slot_hash(slot: str) -> int:
    """The stable 64-bit hash that, with the seed and the id, decides a new row's weights."""
    if not isinstance(slot, str):
        raise TypeError(f"slot must be a text, got {slot!r}; it names the table")
    return int.from_bytes(hashlib.blake2b(slot.encode(), digest_size=8).digest(), "little")


def is_mean(pooling: str, bags: bool = True) -> bool:
    """Whether bags are averaged; ValueError for what is neither "sum" nor "mean", and for "mean" without bags."""
    if pooling not in ("sum", "mean"):
        raise ValueError(f'pooling must be "sum" or "mean", got {pooling!r}')
    if pooling == "mean" and not bags:
        raise ValueError('pooling="mean" needs offsets, which say where each bag of ids begins; or average the result')
    return pooling == "mean"


def tensor_ids(ids: torch.Tensor) -> Int64Array:
    """`as_ids` of what a module is called with; TypeError also for an array."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"ids must be a torch tensor, got {type(ids).__name__}; use torch.as_tensor(ids)")
    return as_ids(ids)


def as_ids(ids: Ids, name: str = "ids") -> Int64Array:
    """ids as a flat, contiguous array; TypeError unless they are int64 already (a cast could merge ids)."""
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be an int64 tensor or array, got {type(ids).__name__}")
    if array.dtype != np.int64:
        raise TypeError(f"{name} must be int64, got {array.dtype}; convert with .long() or .astype(np.int64)")
    return np.require(array.reshape(-1), np.int64, ["C_CONTIGUOUS", "ALIGNED"])


def as_floats(values: Floats, name: str) -> Float32Array:
    """values [n, width] as a contiguous array; TypeError unless they are float32 already."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a float32 tensor or array, got {type(values).__name__}")
    if array.dtype != np.float32:
        raise TypeError(f"{name} must be float32, got {array.dtype}; use .float() or .astype(np.float32)")
    return np.require(array, np.float32, ["C_CONTIGUOUS", "ALIGNED"])
