"""Jagged pointwise attention: one signature, reference implementation.

Row i of a sequence sees the half-open interval [begin_i, end_i) of its own sequence and, once, itself:

    y_i = sum_j SiLU(alpha * q_i . k_j + bias_ij) / normaliser * v_j          (HSTU, eq. 2; no softmax)

The normaliser is a declared constant, never a property of the batch, so a row's result depends on neither padding nor
on the other sequences. Inside, sequences of similar length are padded together; that is an implementation detail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from components.errors import BadInput

TIME_BUCKETS = 129
ROW_BLOCK = 256


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


_BOUNDARIES = _time_boundaries()


def time_bucket(seconds: Tensor) -> Tensor:
    """Bucket 0..128 of a time gap: floor(ln(max(|seconds|, 1)) / 0.301).  seconds: int64, any shape."""
    return torch.bucketize(seconds.abs(), _BOUNDARIES.to(seconds.device), right=True)


@dataclass
class Bias:
    """Relative bias, shared by the heads: position_weights[clamp(end_i - j)] + time_weights[bucket(gap_ij)].

    position_weights (P,), time_weights (129,): parameters, either may be None. The row itself has distance 0.
    query_time, key_time (T,) int64 seconds: gap_ij = query_time_i - key_time_j; self_gap (T,) int64, default 0.
    """

    position_weights: Tensor | None
    time_weights: Tensor | None
    query_time: Tensor
    key_time: Tensor
    self_gap: Tensor | None = None


@dataclass
class _Block:
    """One padded group of sequences: rows (G, R), keys (G, K) as indices into the jagged rows."""

    rows: Tensor
    row_valid: Tensor
    keys: Tensor
    visible: Tensor  # (G, R, K) bool
    distance: Tensor  # (G, R, K) int64, end_i - j, >= 0
    gap_bucket: Tensor | None = None


@dataclass
class Visibility:
    """Who sees whom. offsets (B+1,) int64; begin, end (T,) int64 relative to the row's own sequence.

    Build it once per batch and share it between layers: the padded layout is kept in it.
    """

    offsets: Tensor
    begin: Tensor
    end: Tensor
    _blocks: list[_Block] = field(default_factory=list, repr=False)

    def blocks(self) -> list[_Block]:
        """The padded groups; every row is in exactly one of them."""
        if not self._blocks and self.begin.numel():
            self._check()
            self._blocks = _layout(self.offsets, self.begin, self.end)
        return self._blocks

    def to(self, device: torch.device) -> Visibility:
        """The same visibility on another device; itself when it is there already."""
        if self.begin.device == device:
            return self
        return Visibility(self.offsets.to(device), self.begin.to(device), self.end.to(device))

    def _check(self) -> None:
        lengths = self.offsets[1:] - self.offsets[:-1]
        if int(self.offsets[-1]) != self.begin.numel() or self.begin.shape != self.end.shape:
            raise BadInput("offsets do not cover the rows; give offsets (B+1) with offsets[-1] = number of rows")
        limit = torch.repeat_interleave(lengths, lengths)
        if bool(((self.begin < 0) | (self.end > limit) | (self.begin > self.end)).any()):
            raise BadInput("a visibility interval leaves its sequence; keep 0 <= begin <= end <= length")


def _layout(offsets: Tensor, begin: Tensor, end: Tensor) -> list[_Block]:
    """Group sequences by the power of two of their length, cut long groups into blocks of rows."""
    lengths = (offsets[1:] - offsets[:-1]).tolist()
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(sequence)
    blocks = []
    for members in groups.values():
        index = torch.tensor(members, device=offsets.device)
        start = offsets[index]
        longest = max(lengths[i] for i in members)
        for first in range(0, longest, ROW_BLOCK):
            blocks.append(_block(start, offsets[index + 1], begin, end, first, min(longest, first + ROW_BLOCK)))
    return blocks


def _block(start: Tensor, stop: Tensor, begin: Tensor, end: Tensor, first: int, last: int) -> _Block:
    rows = start[:, None] + torch.arange(first, last, device=start.device)
    valid = rows < stop[:, None]
    rows = torch.where(valid, rows, start[:, None])
    row_begin = begin[rows]
    row_end = torch.where(valid, end[rows], row_begin)
    seen = row_end > row_begin
    low = int(row_begin[seen].min()) if bool(seen.any()) else 0
    high = int(row_end[seen].max()) if bool(seen.any()) else 0
    position = torch.arange(low, high, device=start.device)
    keys = torch.minimum(start[:, None] + position, stop[:, None] - 1)
    visible = (position >= row_begin[..., None]) & (position < row_end[..., None])
    visible &= position != torch.arange(first, last, device=start.device)[:, None]  # itself is added apart, once
    distance = (row_end[..., None] - position).clamp_(min=0)
    return _Block(rows, valid, keys, visible, distance)


def attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, alpha: float, normaliser: float, bias: Bias | None = None
) -> Tensor:
    """Pointwise attention over jagged rows.

    q, k (T, H, dqk), v (T, H, dv) in one floating dtype -> (T, H, dv). alpha: score scale. normaliser: constant > 0.
    Raises BadInput for shapes or intervals that do not fit together.
    """
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or q.shape[0] != seen.begin.numel():
        raise BadInput(f"attention needs q, k (T, H, dqk) and v (T, H, dv); got {q.shape}, {k.shape}, {v.shape}")
    if normaliser <= 0:
        raise BadInput("the attention normaliser must be positive; use a constant such as the attention window")
    score = alpha * (q * k).sum(-1)  # every row sees itself
    if bias is not None:
        score = score + _self_bias(bias, q.shape[0])[:, None]
    own = F.silu(score).unsqueeze(-1) * v
    parts, places = [], []
    for block in seen.blocks():
        if block.keys.shape[1]:
            parts.append(_attend(q, k, v, block, alpha, bias)[block.row_valid])
            places.append(block.rows[block.row_valid])
    if parts:
        own = own.index_add(0, torch.cat(places), torch.cat(parts))
    return own / normaliser


def _attend(q: Tensor, k: Tensor, v: Tensor, block: _Block, alpha: float, bias: Bias | None) -> Tensor:
    rows = F.embedding(block.rows, q.flatten(1)).unflatten(2, q.shape[1:]).transpose(1, 2)  # (G, H, R, dqk)
    keys = F.embedding(block.keys, k.flatten(1)).unflatten(2, k.shape[1:]).transpose(1, 2)
    values = F.embedding(block.keys, v.flatten(1)).unflatten(2, v.shape[1:]).transpose(1, 2)
    score = (rows * alpha) @ keys.transpose(2, 3)
    if bias is not None:
        score = score + _pair_bias(bias, block)[:, None]
    weight = F.silu(score) * block.visible[:, None]
    return (weight @ values).transpose(1, 2)


def _lookup(weights: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, weights[:, None]).squeeze(-1)


def _self_bias(bias: Bias, rows: int) -> Tensor:
    total = None
    if bias.position_weights is not None:
        total = bias.position_weights[:1].expand(rows)
    if bias.time_weights is not None:
        gap = bias.self_gap if bias.self_gap is not None else torch.zeros_like(bias.query_time)
        time = _lookup(bias.time_weights, time_bucket(gap))
        total = time if total is None else total + time
    if total is None:
        raise BadInput("an attention bias without weights; give position or time weights, or no bias at all")
    return total


def _pair_bias(bias: Bias, block: _Block) -> Tensor:
    total = None
    if bias.position_weights is not None:
        total = _lookup(bias.position_weights, block.distance.clamp(max=len(bias.position_weights) - 1))
    if bias.time_weights is not None:
        if block.gap_bucket is None:  # the same for every layer
            gap = bias.query_time[block.rows][..., None] - bias.key_time[block.keys][:, None]
            block.gap_bucket = time_bucket(gap)
        time = _lookup(bias.time_weights, block.gap_bucket)
        total = time if total is None else total + time
    assert total is not None  # _self_bias has refused a bias without weights
    return total


def causal(
    lengths: Tensor, *, num_targets: Tensor | None = None, max_attn_len: int = 0, contextual_len: int = 0
) -> Visibility:
    """Intervals of the published masks (row index i, sequence length n; the row itself is always seen).

    lengths (B,) int64. Plain: [0, i). num_targets (B,): the last rows are candidates; they see the history and
    themselves, never each other. max_attn_len > 0: only the last max_attn_len positions. contextual_len C: a prefix
    that counts as one position and sees the whole history. A prefix with a window is not one interval: BadInput.
    """
    if contextual_len and max_attn_len:
        raise BadInput("a contextual prefix together with max_attn_len is not one interval; use one of the two")
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    length = torch.repeat_interleave(lengths, lengths)
    index = torch.arange(int(offsets[-1]), device=lengths.device) - torch.repeat_interleave(offsets[:-1], lengths)
    history = length if num_targets is None else length - torch.repeat_interleave(num_targets, lengths)
    end = torch.minimum(index, history)
    begin = (end - max_attn_len).clamp(min=0) if max_attn_len else torch.zeros_like(end)
    if contextual_len:
        end = torch.where(index < contextual_len, history, end)
    return Visibility(offsets, begin, end)
