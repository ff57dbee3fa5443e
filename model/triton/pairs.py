"""What the kernels share: where a tile lies, which keys a row sees, the bias of a pair (row, key), SiLU.

Positions are int32 and relative to the sequence; places in the jagged arrays are int64. `None` for an argument that a
call does not have is a compile-time constant, so its branch is not in the kernel (each has its `else`: what follows a
return would be compiled as well).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def locate(tiles, tile, offsets, row_offsets):
    """Of a tile: its start in the sequence, and the sequence's first row, rows, first key and keys."""
    sequence, start = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    first_row, first_key = tl.load(row_offsets + sequence), tl.load(offsets + sequence)
    rows = (tl.load(row_offsets + sequence + 1) - first_row).to(tl.int32)
    keys = (tl.load(offsets + sequence + 1) - first_key).to(tl.int32)
    return start, first_row, rows, first_key, keys


@triton.jit
def load_matrix(base, place, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `place` of a matrix of WIDTH columns as (len(place), BLOCK); zeros past its width and where not inside."""
    column = tl.arange(0, BLOCK)
    pointers = base + place.to(tl.int64)[:, None] * stride + column[None, :]
    if WIDTH == BLOCK:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_matrix(base, place, inside, stride, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the rows that are inside, in the type of `base`."""
    column = tl.arange(0, BLOCK)
    pointers = base + place.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def multiply(a, b, total, INTERPRETED: tl.constexpr):
    """total + a b in float32, a and b of one type; total None = nothing to add to."""
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def intervals(begin, end, prefix, place, inside):
    """begin, end and prefix of the rows; all 0, and so nothing seen, where not inside."""
    low = tl.load(begin + place, mask=inside, other=0).to(tl.int32)
    high = tl.load(end + place, mask=inside, other=0).to(tl.int32)
    front = tl.zeros_like(low)
    if prefix is not None:
        front = tl.load(prefix + place, mask=inside, other=0).to(tl.int32)
    return low, high, front


@triton.jit
def visible(key, low, high, front, own):
    """Whether the row sees the key; itself apart, which every kernel adds by its own rule."""
    return (((key >= low) & (key < high)) | (key < front)) & (key != own)


@triton.jit
def time_bucket(gap, cells, bounds):
    """Bucket 0..128 of a gap in int64 seconds, as model.attention_bias.time_bucket has it.

    The cell of a gap is the exponent and the two highest bits of the fraction of its float32. `cells` has the bucket
    in which a cell starts; a cell holds one boundary at most, and the exact integer is compared with that.
    """
    size = tl.maximum(tl.abs(gap), 1)  # also for the smallest int64, whose absolute value is itself
    cell = (size.to(tl.float32).to(tl.int32, bitcast=True) >> 21) - 508
    bucket = tl.load(cells + cell)
    above = (size >= tl.load(bounds + bucket)).to(tl.int32)
    return tl.minimum(bucket + above, 128)


@triton.jit
def add_bias(score, distance, gap, position, positions, time, cells, bounds):
    """The score with its bias, and the time bucket (0 without times). All of one shape, or gap None."""
    bucket = tl.zeros_like(distance)
    if position is not None:
        score += tl.load(position + tl.minimum(tl.maximum(distance, 0), positions - 1))
    if time is not None:
        bucket = time_bucket(gap, cells, bounds)
        score += tl.load(time + bucket)
    return score, bucket


@triton.jit
def self_score(q, k, place, inside, alpha, position, positions, time, cells, bounds, self_gap):
    """Of rows q and their own keys k: the score (distance 0, gap self_gap) and the time bucket."""
    score = alpha * tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    distance = tl.zeros_like(place).to(tl.int32)
    gap = tl.zeros_like(place).to(tl.int64)
    if self_gap is not None:
        gap = tl.load(self_gap + place, mask=inside, other=0)
    return add_bias(score, distance, gap, position, positions, time, cells, bounds)


@triton.jit
def load_times(times, place, inside):
    """Seconds; zeros where not inside or where the call has no times."""
    if times is None:
        return tl.zeros_like(place).to(tl.int64)
    else:
        return tl.load(times + place, mask=inside, other=0)


@triton.jit
def silu(score):
    return score / (1.0 + tl.exp(-score))


@triton.jit
def silu_slope(score):
    sigmoid = 1.0 / (1.0 + tl.exp(-score))
    return sigmoid * (1.0 + score * (1.0 - sigmoid))


@triton.jit
def key_tiles(low, high, front, keys, BLOCK: tl.constexpr):
    """The tiles of keys that a tile of rows sees: [0, split) and from `first` on; and how many they are in all."""
    some = low < high
    start = tl.maximum(tl.min(tl.where(some, low, keys)), 0)
    stop = tl.minimum(tl.max(tl.where(some, high, 0)), keys)
    split = tl.cdiv(tl.minimum(tl.max(front), keys), BLOCK)
    first = tl.maximum(start // BLOCK, split)
    return split, first, split + tl.maximum(tl.cdiv(stop, BLOCK) - first, 0)


@triton.jit
def rows_seeing(begin, end, prefix, first_row, rows, key, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """[first, last): from the first row to past the last one that sees one of the keys [key, key + BLOCK)."""
    first, last = rows, rows * 0
    for at in range(0, rows, SCAN):
        row = at + tl.arange(0, SCAN)
        low, high, front = intervals(begin, end, prefix, first_row + row, row < rows)
        sees = ((low < key + BLOCK) & (high > key) & (low < high)) | (front > key)
        first = tl.minimum(first, tl.min(tl.where(sees, row, rows)))
        last = tl.maximum(last, tl.max(tl.where(sees, row + 1, 0)))
    return first, last
