"""The kernel of y: one program per tile of rows and head, over the tiles of keys that one of these rows sees."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from model.triton.pairs import (
    add_bias,
    intervals,
    key_tiles,
    load_matrix,
    load_times,
    locate,
    multiply,
    self_score,
    silu,
    store_matrix,
    visible,
)


@triton.jit
def forward(
    q, k, v, y, tiles, offsets, row_offsets, begin, end, prefix,
    position, positions, time, cells, bounds, query_time, key_time, self_gap,
    alpha, scale, heads, q_stride, k_stride, v_stride, q_head, k_head, v_head,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y_i = scale * sum_j SiLU(alpha q_i . k_j + bias_ij) v_j. Grid: tiles of rows x heads."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    start, first_row, rows, first_key, keys = locate(tiles, tl.program_id(0) // heads, offsets, row_offsets)
    row = start + tl.arange(0, BLOCK)
    inside = row < rows
    place = first_row + row
    own = keys - rows + row
    low, high, front = intervals(begin, end, prefix, place, inside)
    asked = load_times(query_time, place, inside)
    q_tile = load_matrix(q + head * q_head, place, inside, q_stride, DQK, BLOCK_DQK)

    k_own = load_matrix(k + head * k_head, first_key + own, inside, k_stride, DQK, BLOCK_DQK)
    v_own = load_matrix(v + head * v_head, first_key + own, inside, v_stride, DV, BLOCK_DV)
    own_score, _own_bucket = self_score(
        q_tile, k_own, place, inside, alpha, position, positions, time, cells, bounds, self_gap
    )
    total = silu(own_score)[:, None] * v_own.to(tl.float32)
    split, first, count = key_tiles(low, high, front, keys, OTHER)
    for step in range(0, count):
        key = tl.where(step < split, step, step - split + first) * OTHER + tl.arange(0, OTHER)
        known = key < keys
        k_tile = load_matrix(k + head * k_head, first_key + key, known, k_stride, DQK, BLOCK_DQK)
        v_tile = load_matrix(v + head * v_head, first_key + key, known, v_stride, DV, BLOCK_DV)
        score = alpha * multiply(q_tile, tl.trans(k_tile), None, INTERPRETED)
        gap = asked[:, None] - load_times(key_time, first_key + key, known)[None, :]
        distance = high[:, None] - key[None, :]
        score, _bucket = add_bias(score, distance, gap, position, positions, time, cells, bounds)
        seen = visible(key[None, :], low[:, None], high[:, None], front[:, None], own[:, None]) & known[None, :]
        weight = tl.where(seen, silu(score), 0.0)
        total = multiply(weight.to(v_tile.dtype), v_tile, total, INTERPRETED)
    store_matrix(y + head * DV, place, inside, heads * DV, total * scale, DV, BLOCK_DV)
