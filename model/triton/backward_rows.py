"""The kernel of the gradients of q and of the bias weights.

The weights' gradients are sums over all pairs. Atomic additions would make them depend on the order of the day, so a
fixed number of programs take the tiles in turn, and each adds into partial sums of its own; these are added up after.
"""

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
    silu_slope,
    store_matrix,
    visible,
)


@triton.jit
def add_by_distance(partial, slope, high, inside, key, positions, BLOCK: tl.constexpr):
    """partial[clamp(high_i - j, 0, positions - 1)] += slope_ij, for the keys j = key .. key + BLOCK - 1.

    The rows are turned until column c holds the distances that are c modulo BLOCK: columns then add up within the
    chunks of BLOCK distances that meet in the tile (two of them where the intervals end at the diagonal).
    """
    lane = tl.arange(0, BLOCK)
    shift = (high - key)[:, None]
    turn = (shift - lane[None, :]) & (BLOCK - 1)
    turned = tl.gather(slope, turn, 1)
    distance = shift - turn
    bin_of = tl.minimum(tl.maximum(distance, 0), positions - 1)
    first = tl.min(tl.where(inside[:, None], bin_of, positions - 1)) // BLOCK
    last = tl.max(tl.where(inside[:, None], bin_of, 0)) // BLOCK
    between = (distance > 0) & (distance < positions - 1)
    near = tl.sum(tl.where(distance <= 0, turned, 0.0))
    far = tl.sum(tl.where((distance > 0) & (distance >= positions - 1), turned, 0.0))
    turned = tl.where(between, turned, 0.0)
    for chunk in range(first, last + 1):
        place = chunk * BLOCK + lane
        total = tl.sum(tl.where(distance == place[None, :], turned, 0.0), 0)
        total += tl.where(place == 0, near, 0.0) + tl.where(place == positions - 1, far, 0.0)
        tl.debug_barrier()  # what the tile before has stored is there for every thread
        before = tl.load(partial + place, mask=place < positions, other=0.0)
        tl.store(partial + place, before + total, mask=place < positions)


@triton.jit
def add_by_bucket(totals, slope, bucket, seen, BUCKETS: tl.constexpr):
    """totals[b] + the sum of slope where seen and bucket == b. A tile of sorted times meets few buckets."""
    place = tl.arange(0, BUCKETS)
    first = tl.min(tl.where(seen, bucket, BUCKETS))
    last = tl.max(tl.where(seen, bucket, -1))
    for number in range(first, last + 1):
        totals += tl.where(place == number, tl.sum(tl.where(bucket == number, slope, 0.0)), 0.0)
    return totals


@triton.jit
def backward_rows(
    q, k, v, g, q_gradient, position_partial, time_partial, tiles, tasks, offsets, row_offsets, begin, end, prefix,
    position, positions, time, cells, bounds, query_time, key_time, self_gap,
    alpha, scale, heads, q_stride, k_stride, v_stride, g_stride, q_head, k_head, v_head, g_head,
    DQK: tl.constexpr, DV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, BUCKETS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """g: gradient of y (R, H, DV). Program p takes the tasks (tile of rows, head) p, p + programs, ...

    position_partial (programs, positions), zeros before, and time_partial (programs, BUCKETS) lack the factor scale.
    """
    program = tl.program_id(0).to(tl.int64)
    time_total = tl.zeros([BUCKETS], tl.float32)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        head = (task % heads).to(tl.int64)
        start, first_row, rows, first_key, keys = locate(tiles, task // heads, offsets, row_offsets)
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        place = first_row + row
        own = keys - rows + row
        low, high, front = intervals(begin, end, prefix, place, inside)
        asked = load_times(query_time, place, inside)
        q_tile = load_matrix(q + head * q_head, place, inside, q_stride, DQK, BLOCK_DQK)
        g_tile = load_matrix(g + head * g_head, place, inside, g_stride, DV, BLOCK_DV)

        k_own = load_matrix(k + head * k_head, first_key + own, inside, k_stride, DQK, BLOCK_DQK)
        v_own = load_matrix(v + head * v_head, first_key + own, inside, v_stride, DV, BLOCK_DV)
        own_score, own_bucket = self_score(
            q_tile, k_own, place, inside, alpha, position, positions, time, cells, bounds, self_gap
        )
        own_slope = silu_slope(own_score) * tl.sum(g_tile.to(tl.float32) * v_own.to(tl.float32), 1)
        q_total = own_slope[:, None] * k_own.to(tl.float32)
        if position is not None:  # distance 0; a row that is not inside has slope 0
            tl.debug_barrier()
            at = position_partial + program * positions
            tl.store(at, tl.load(at) + tl.sum(own_slope))
        if time is not None:
            time_total = add_by_bucket(time_total, own_slope, own_bucket, inside, BUCKETS)

        split, first, count = key_tiles(low, high, front, keys, OTHER)
        for step in range(0, count):
            key_start = tl.where(step < split, step, step - split + first) * OTHER
            key = key_start + tl.arange(0, OTHER)
            known = key < keys
            k_tile = load_matrix(k + head * k_head, first_key + key, known, k_stride, DQK, BLOCK_DQK)
            v_tile = load_matrix(v + head * v_head, first_key + key, known, v_stride, DV, BLOCK_DV)
            score = alpha * multiply(q_tile, tl.trans(k_tile), None, INTERPRETED)
            gap = asked[:, None] - load_times(key_time, first_key + key, known)[None, :]
            distance = high[:, None] - key[None, :]
            score, bucket = add_bias(score, distance, gap, position, positions, time, cells, bounds)
            seen = visible(key[None, :], low[:, None], high[:, None], front[:, None], own[:, None]) & known[None, :]
            slope = silu_slope(score) * multiply(g_tile, tl.trans(v_tile), None, INTERPRETED)
            slope = tl.where(seen, slope, 0.0)
            q_total = multiply(slope.to(k_tile.dtype), k_tile, q_total, INTERPRETED)
            if position is not None:
                add_by_distance(
                    position_partial + program * positions, slope, high, inside, key_start, positions, OTHER
                )
            if time is not None:
                time_total = add_by_bucket(time_total, slope, bucket, seen, BUCKETS)
        store_matrix(q_gradient + head * DQK, place, inside, heads * DQK, q_total * (alpha * scale), DQK, BLOCK_DQK)
    if time is not None:
        tl.store(time_partial + program * BUCKETS + tl.arange(0, BUCKETS), time_total)
