"""The kernels' host side: tiles of a jagged batch, tables, block sizes, launches.

Nothing here waits for the device: how many tiles a batch has is bounded from its shapes, and a tile too many finds
no rows. Block sizes depend on the dtype and the head widths alone, so that a row's bits do not depend on the batch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from model.attention_bias import TIME_BOUNDARIES, TIME_BUCKETS, time_bucket
from model.triton.backward_keys import backward_keys
from model.triton.backward_rows import backward_rows
from model.triton.forward import forward

BUCKETS = 256
"""TIME_BUCKETS as the power of two that a block needs."""
SCAN = 1024
INTERPRETED = not isinstance(forward, triton.JITFunction)
NO_TILE = 2**30
"""Start of a tile that is not there: past the end of any sequence."""


class Tiling(NamedTuple):
    """block: rows (or keys) that a program holds; other: keys (or rows) of a step of its loop."""

    block: int
    other: int
    warps: int


def tilings(dtype: torch.dtype, dqk: int, dv: int, *, biased: bool) -> dict[str, Tiling]:
    """For each kernel, the largest tiles at which the compiler (compute capability 9.0) spills next to no registers.

    `block` is one for all kernels, bias or not: 64 rows are what a warp group of Hopper multiplies at once.
    """
    width = max(dqk, dv)
    if dtype == torch.bfloat16 and width <= 128:
        narrow, wide, spread = Tiling(64, 32, 4), Tiling(64, 64, 4), Tiling(64, 32, 8)
        forward_tiling = wide if width <= 64 or not biased else narrow
        return {"forward": forward_tiling, "keys": narrow, "rows": spread if biased else wide}
    other = 32 if dtype == torch.bfloat16 or width <= 128 else 16
    return dict.fromkeys(("forward", "keys", "rows"), Tiling(32, other, 4 if dtype == torch.bfloat16 else 8))


def tiles(offsets: Tensor, total: int, block: int, *, later_is_heavier: bool) -> Tensor:
    """(total // block + B, 2) int32: sequence and start of each tile, those with the most work (if causal) first.

    offsets (B+1,) int64 from 0 to total. Work grows with the start for rows, with what follows for keys.
    """
    counts = offsets.diff()
    if not total:
        return torch.zeros(0, 2, dtype=torch.int32, device=offsets.device)
    last = ((counts + block - 1) // block).cumsum(0)
    index = torch.arange(total // block + len(counts), device=offsets.device)
    sequence = torch.searchsorted(last, index, right=True).clamp(max=len(counts) - 1)
    before = torch.cat([last.new_zeros(1), last[:-1]])[sequence]
    start = (index - before) * block
    there = index < last[-1]
    work = torch.where(there, start if later_is_heavier else counts[sequence] - start, -1)
    both = torch.stack([sequence, torch.where(there, start, NO_TILE)], 1)
    return both[work.argsort(descending=True, stable=True)].to(torch.int32)


def block_size(dtype: torch.dtype, dqk: int, dv: int) -> int:
    """Rows, or keys, of the tiles that the programs hold."""
    return tilings(dtype, dqk, dv, biased=True)["forward"].block


@cache
def bucket_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """cells (256,) int32: bucket of the least gap with these highest bits; bounds (129,) int64, closed by the maximum.

    Cell c: float32 exponent c // 4, highest two bits of the fraction c % 4 (see time_bucket in pairs.py).
    """
    cell = torch.arange(256)
    start = torch.ceil(torch.pow(2.0, (cell // 4).double()) * (1 + (cell % 4) / 4))
    least = torch.where(cell < 252, start, 0).to(torch.int64)
    cells = torch.where(cell < 252, time_bucket(least), TIME_BUCKETS - 1)
    bounds = torch.cat([TIME_BOUNDARIES, torch.tensor([torch.iinfo(torch.int64).max])])
    return cells.to(device, torch.int32), bounds.to(device)


def launch_forward(q: Tensor, v: Tensor, row_tiles: Tensor, shared: dict[str, Any]) -> Tensor:
    """y (R, H, dv); `shared` as common() makes it."""
    y = v.new_empty(len(q), *v.shape[1:])
    if programs := len(row_tiles) * v.shape[1]:
        with torch.cuda.device_of(q):
            forward[(programs,)](y=y, tiles=row_tiles, **shared, **_options("forward", shared))
    return y


def launch_backward_keys(k: Tensor, v: Tensor, g: Tensor, key_tiles: Tensor, shared: dict[str, Any]) -> list[Tensor]:
    """Gradients of k and v. g (R, H, dv): gradient of y, as matrix() makes it."""
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]
    if programs := len(key_tiles) * v.shape[1]:
        with torch.cuda.device_of(k):
            backward_keys[(programs,)](
                g=g, g_stride=g.stride(0), g_head=g.stride(1), k_gradient=out[0], v_gradient=out[1],
                tiles=key_tiles, SCAN=SCAN, **shared, **_options("keys", shared),
            )  # fmt: skip
    return out


def launch_backward_rows(q: Tensor, g: Tensor, row_tiles: Tensor, shared: dict[str, Any]) -> list[Tensor]:
    """Gradients of q and of the position and time weights; the weights' of shape (0,) where there are none."""
    tasks = len(row_tiles) * q.shape[1]
    programs = min(tasks, _programs(q.device)) if shared["time"] is not None or shared["positions"] else tasks
    q_gradient = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    position = torch.zeros(programs, shared["positions"], device=q.device)
    time = torch.zeros(programs, BUCKETS if shared["time"] is not None else 0, device=q.device)
    if programs:
        with torch.cuda.device_of(q):
            backward_rows[(programs,)](
                g=g, g_stride=g.stride(0), g_head=g.stride(1), q_gradient=q_gradient, position_partial=position,
                time_partial=time, tiles=row_tiles, tasks=tasks, BUCKETS=BUCKETS, **shared, **_options("rows", shared),
            )  # fmt: skip
    scale = shared["scale"]
    return [q_gradient, position.sum(0) * scale, time.sum(0)[:TIME_BUCKETS] * scale]


def _options(kernel: str, shared: dict[str, Any]) -> dict[str, Any]:
    """Tile sizes and compiler options. Two stages of loads in flight; a third costs registers that are not there."""
    biased = shared["position"] is not None or shared["time"] is not None
    tiling = tilings(shared["q"].dtype, shared["DQK"], shared["DV"], biased=biased)[kernel]
    sizes = {"BLOCK": tiling.block, "OTHER": tiling.other}
    return sizes | {"num_warps": tiling.warps, "num_stages": 2, "enable_fp_fusion": True}


def _programs(device: torch.device) -> int:
    """How many programs share the partial sums of the weights' gradients: some for each multiprocessor."""
    if device.type != "cuda":
        return 3  # the interpreter: few, so that each takes several tiles
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def common(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, row_offsets: Tensor, begin: Tensor, end: Tensor,
    prefix: Tensor | None, alpha: float, normaliser: float, position: Tensor | None, time: Tensor | None,
    query_time: Tensor | None, key_time: Tensor | None, self_gap: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that every kernel has."""
    cells, bounds = bucket_tables(q.device)
    dqk, dv = q.shape[2], v.shape[2]
    widths = {"BLOCK_DQK": max(16, triton.next_power_of_2(dqk)), "BLOCK_DV": max(16, triton.next_power_of_2(dv))}
    arrays = {
        "offsets": offsets, "row_offsets": row_offsets, "begin": begin, "end": end, "prefix": prefix,
        "position": position, "time": time, "query_time": query_time, "key_time": key_time, "self_gap": self_gap,
    }  # fmt: skip
    strides: dict[str, int] = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        strides |= {f"{name}_stride": x.stride(0), f"{name}_head": x.stride(1)}
    return {
        "q": q, "k": k, "v": v, "cells": cells, "bounds": bounds,
        "positions": 0 if position is None else len(position), "alpha": float(alpha), "scale": 1.0 / normaliser,
        "heads": v.shape[1], "DQK": dqk, "DV": dv, "INTERPRETED": INTERPRETED,
        **{name: None if x is None else x.contiguous() for name, x in arrays.items()}, **strides, **widths,
    }  # fmt: skip


def matrix(x: Tensor) -> Tensor:
    """x (N, H, d), or a copy where the values of a head do not lie one after the other."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
