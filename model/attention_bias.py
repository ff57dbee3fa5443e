"""The relative bias of HSTU attention: learned weights per position distance and per logarithmic bucket of time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIME_BUCKETS = 129


def _time_boundaries() -> Tensor:
    """Smallest integer number of seconds in each bucket b >= 1 of floor(ln(max(|seconds|, 1)) / 0.301).

    Integer boundaries make the bucket of a gap the same on every machine, in training and in serving.
    """
    bounds = []
    for bucket in range(1, TIME_BUCKETS):
        seconds = math.ceil(math.exp(0.301 * bucket))
        if seconds >= 2**62:
            break
        while math.floor(math.log(seconds) / 0.301) < bucket:
            seconds += 1
        while seconds > 1 and math.floor(math.log(seconds - 1) / 0.301) >= bucket:
            seconds -= 1
        bounds.append(seconds)
    return torch.tensor(bounds, dtype=torch.int64)


TIME_BOUNDARIES = _time_boundaries()
"""int64 (128,): bucket(gap) = how many of them are <= |gap|. Every path uses these."""


def time_bucket(seconds: Tensor) -> Tensor:
    """Bucket 0..128 of a time gap: floor(ln(max(|seconds|, 1)) / 0.301).  seconds: int64, any shape."""
    return torch.bucketize(seconds.abs(), TIME_BOUNDARIES.to(seconds.device), right=True)


@dataclass
class Bias:
    """Relative bias, shared by the heads: position_weights[clamp(end_i - j)] + time_weights[bucket(gap_ij)].

    position_weights (P,), time_weights (129,): parameters, either may be None (not both). The row itself has
    distance 0. query_time (R,), key_time (T,) int64 seconds: gap_ij = query_time_i - key_time_j.
    self_gap (R,) int64: the gap of a row to itself, default 0.
    """

    position_weights: Tensor | None
    time_weights: Tensor | None
    query_time: Tensor
    key_time: Tensor
    self_gap: Tensor | None = None
