"""The kernel of the gradients of k and v: one program per tile of keys and head, over the rows that see them."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from model.triton.pairs import (
    add_bias,
    intervals,
    load_matrix,
    load_times,
    locate,
    multiply,
    rows_seeing,
    self_score,
    silu,
    silu_slope,
    store_matrix,
    visible,
)


@triton.jit
def backward_keys(
    q, k, v, g, k_gradient, v_gradient, tiles, offsets, row_offsets, begin, end, prefix,
    position, positions, time, cells, bounds, query_time, key_time, self_gap,
    alpha, scale, heads, q_stride, k_stride, v_stride, g_stride, q_head, k_head, v_head, g_head,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, SCAN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """g: gradient of y (R, H, DV). Scores are computed again, keys x rows. Grid: tiles of keys x heads."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    start, first_row, rows, first_key, keys = locate(tiles, tl.program_id(0) // heads, offsets, row_offsets)
    key = start + tl.arange(0, BLOCK)
    known = key < keys
    place = first_key + key
    k_tile = load_matrix(k + head * k_head, place, known, k_stride, DQK, BLOCK_DQK)
    v_tile = load_matrix(v + head * v_head, place, known, v_stride, DV, BLOCK_DV)
    happened = load_times(key_time, place, known)

    own_row = first_row + key - (keys - rows)  # the row that is this key, if it is one
    asks = known & (key >= keys - rows)
    q_own = load_matrix(q + head * q_head, own_row, asks, q_stride, DQK, BLOCK_DQK)
    g_own = load_matrix(g + head * g_head, own_row, asks, g_stride, DV, BLOCK_DV)
    own_score, _own_bucket = self_score(
        q_own, k_tile, own_row, asks, alpha, position, positions, time, cells, bounds, self_gap
    )
    own_slope = silu_slope(own_score) * tl.sum(g_own.to(tl.float32) * v_tile.to(tl.float32), 1)
    k_total = own_slope[:, None] * q_own.to(tl.float32)
    v_total = silu(own_score)[:, None] * g_own.to(tl.float32)
    first, last = rows_seeing(begin, end, prefix, first_row, rows, start, BLOCK, SCAN)
    for at in range(first // OTHER * OTHER, last, OTHER):
        row = at + tl.arange(0, OTHER)
        inside = row < rows
        low, high, front = intervals(begin, end, prefix, first_row + row, inside)
        q_tile = load_matrix(q + head * q_head, first_row + row, inside, q_stride, DQK, BLOCK_DQK)
        g_tile = load_matrix(g + head * g_head, first_row + row, inside, g_stride, DV, BLOCK_DV)
        score = alpha * multiply(k_tile, tl.trans(q_tile), None, INTERPRETED)
        gap = load_times(query_time, first_row + row, inside)[None, :] - happened[:, None]
        distance = high[None, :] - key[:, None]
        score, _bucket = add_bias(score, distance, gap, position, positions, time, cells, bounds)
        own = keys - rows + row
        seen = visible(key[:, None], low[None, :], high[None, :], front[None, :], own[None, :]) & known[:, None]
        weight = tl.where(seen, silu(score), 0.0)
        v_total = multiply(weight.to(g_tile.dtype), g_tile, v_total, INTERPRETED)
        slope = silu_slope(score) * multiply(v_tile, tl.trans(g_tile), None, INTERPRETED)
        slope = tl.where(seen, slope, 0.0)
        k_total = multiply(slope.to(q_tile.dtype), q_tile, k_total, INTERPRETED)
    store_matrix(k_gradient + head * DQK, place, known, heads * DQK, k_total * (alpha * scale), DQK, BLOCK_DQK)
    store_matrix(v_gradient + head * DV, place, known, heads * DV, v_total * scale, DV, BLOCK_DV)
