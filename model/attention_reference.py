"""The attention function in plain PyTorch: slow and obvious, any device, any floating dtype.

Sequences of similar length are padded together and every score of a block of rows is in memory at once. The kernels
are tested against this; it runs where they do not (float64, softmax).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.errors import BadInput
from model.attention_bias import Bias, time_bucket
from model.attention_visibility import Visibility

ROW_BLOCK = 256


@dataclass
class _Block:
    """One padded group of sequences: rows (G, R), keys (G, K) as indices into the jagged rows and keys."""

    rows: Tensor
    row_valid: Tensor
    keys: Tensor
    itself: Tensor  # (G, R, K) bool: the key is the row
    visible: Tensor  # (G, R, K) bool, the row itself included
    distance: Tensor  # (G, R, K) int64: 0 for itself, else end_i - j, at least 0


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Visibility,
    *,
    alpha: float,
    normaliser: float,
    bias: Bias | None = None,
    softmax: bool = False,
) -> Tensor:
    """q (R, H, dqk), k (T, H, dqk), v (T, H, dv) -> (R, H, dv). See model.attention.attention."""
    parts, places = [], []
    for block in _blocks(seen):
        weight = _weights(_scores(q, k, block, alpha, bias), block.visible[:, None], normaliser, softmax)
        values = _gather(v, block.keys)
        parts.append((weight @ values).transpose(1, 2)[block.row_valid])
        places.append(block.rows[block.row_valid])
    out = v.new_zeros(len(q), *v.shape[1:])
    if not parts:  # no rows; the sum keeps an empty batch differentiable
        return out + (q.sum() + k.sum() + v.sum())
    return out.index_add(0, torch.cat(places), torch.cat(parts))


def _scores(q: Tensor, k: Tensor, block: _Block, alpha: float, bias: Bias | None) -> Tensor:
    """(G, H, R, K): alpha q_i . k_j + bias_ij."""
    score = (_gather(q, block.rows) * alpha) @ _gather(k, block.keys).transpose(2, 3)
    return score if bias is None else score + _pair_bias(bias, block).to(score.dtype)[:, None]


def _weights(score: Tensor, visible: Tensor, normaliser: float, softmax: bool) -> Tensor:
    if softmax:
        return score.masked_fill(~visible, float("-inf")).softmax(-1)
    return (F.silu(score) / normaliser).masked_fill(~visible, 0)


def _gather(jagged: Tensor, index: Tensor) -> Tensor:
    """jagged (T, H, d), index (G, N) -> (G, H, N, d). An embedding lookup, for the sake of its fast gradient."""
    return F.embedding(index, jagged.flatten(1)).unflatten(2, jagged.shape[1:]).transpose(1, 2)


def _lookup(weights: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, weights[:, None]).squeeze(-1)


def _pair_bias(bias: Bias, block: _Block) -> Tensor:
    """(G, R, K)."""
    parts = []
    if bias.position_weights is not None:
        parts.append(_lookup(bias.position_weights, block.distance.clamp(max=len(bias.position_weights) - 1)))
    if bias.time_weights is not None:
        query_time = bias.query_time[block.rows]
        self_gap = torch.zeros_like(query_time) if bias.self_gap is None else bias.self_gap[block.rows]
        gap = query_time[..., None] - bias.key_time[block.keys][:, None]
        parts.append(_lookup(bias.time_weights, time_bucket(torch.where(block.itself, self_gap[..., None], gap))))
    if not parts:
        raise BadInput("an attention bias without weights; give position or time weights, or no bias at all")
    return torch.stack(parts).sum(0)


def _blocks(seen: Visibility) -> list[_Block]:
    """The padded groups; every row is in exactly one of them."""
    blocks: list[_Block] = seen.cache.setdefault("reference_blocks", [])
    if not blocks and seen.begin.numel():
        seen.check()
        blocks.extend(_layout(seen))
    return blocks


def _layout(seen: Visibility) -> list[_Block]:
    """Group sequences by the power of two of their length, cut long groups into blocks of rows."""
    counts = seen.first_row.diff().tolist()
    groups: dict[int, list[int]] = {}
    for sequence, count in enumerate(counts):
        if count:
            groups.setdefault((count - 1).bit_length(), []).append(sequence)
    own = seen.own
    blocks = []
    for members in groups.values():
        index = torch.tensor(members, device=seen.begin.device)
        longest = max(counts[i] for i in members)
        for first in range(0, longest, ROW_BLOCK):
            blocks.append(_block(seen, own, index, first, min(longest, first + ROW_BLOCK)))
    return blocks


def _block(seen: Visibility, own: Tensor, sequence: Tensor, first: int, last: int) -> _Block:
    row_start, row_stop = seen.first_row[sequence], seen.first_row[sequence + 1]
    key_start, key_stop = seen.offsets[sequence], seen.offsets[sequence + 1]
    rows = row_start[:, None] + torch.arange(first, last, device=own.device)
    valid = rows < row_stop[:, None]
    rows = torch.where(valid, rows, row_start[:, None])
    begin, end, itself = seen.begin[rows], seen.end[rows], own[rows]
    prefix = torch.zeros_like(end) if seen.prefix is None else seen.prefix[rows]
    low = 0 if bool((prefix > 0).any()) else int(torch.minimum(begin, itself).min())
    high = int(torch.stack([end, prefix, itself + 1]).max())
    position = torch.arange(low, high, device=own.device)
    keys = torch.minimum(key_start[:, None] + position, key_stop[:, None] - 1)
    is_itself = position == itself[..., None]
    visible = ((position >= begin[..., None]) & (position < end[..., None])) | (position < prefix[..., None])
    distance = (end[..., None] - position).clamp_(min=0).masked_fill_(is_itself, 0)
    return _Block(rows, valid, keys, is_itself, visible | is_itself, distance)
