"""What goes in and out of an embedding table: ids and floats."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]
Ids = torch.Tensor | Int64Array
Floats = torch.Tensor | Float32Array

MAX_TIME_US = (2**32 - 1) * 1_000_000
"""The newest event time that a table takes, in the year 2106: it keeps seconds in 32 bits (csrc/table/row_meta.h)."""


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
