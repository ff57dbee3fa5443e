"""Gradients that wait between a table's forwards and its step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.table_arrays import Float32Array, Int64Array, UInt32Array, as_floats


@dataclass
class Forward:
    """The rows, or pooled bags, that one training forward handed out; autograd leaves the gradients in `out.grad`."""

    ids: Int64Array  # [n]
    out: torch.Tensor  # [n, dim], or [bags, dim] with offsets; leaf
    offsets: Int64Array | None = None  # [bags + 1]
    mean: bool = False

    def bags(self) -> tuple[UInt32Array, Float32Array]:
        """For each id, the row of `out` that it went into, and its share of it."""
        if self.offsets is None:
            return np.arange(len(self.ids), dtype=np.uint32), np.ones(len(self.ids), np.float32)
        sizes = np.diff(self.offsets)
        share = 1 / np.maximum(sizes, 1) if self.mean else np.ones(len(sizes))
        return np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes), np.repeat(share, sizes).astype(np.float32)


@dataclass(frozen=True)
class Gradients:
    """One batch: id i has gradient scale[i] * grads[row[i]]; row and scale None: grads[i]."""

    ids: Int64Array  # [n]
    grads: Float32Array  # [m, dim]
    row: UInt32Array | None = None  # [n]
    scale: Float32Array | None = None  # [n]

    @classmethod
    def of(cls, forwards: list[Forward]) -> Gradients | None:
        """Of all forwards with a gradient, in order; None if there is none."""
        done = [f for f in forwards if f.out.grad is not None]
        if not done:
            return None
        ids = np.concatenate([f.ids for f in done])
        grads = np.concatenate([as_floats(f.out.grad, "gradient") for f in done])  # type: ignore[arg-type]
        if all(f.offsets is None for f in done):
            return cls(ids, grads)
        rows, scales, before = [], [], 0
        for f in done:
            row, scale = f.bags()
            rows.append(row + np.uint32(before))
            scales.append(scale)
            before += len(f.out)
        return cls(ids, grads, np.concatenate(rows), np.concatenate(scales))

    def squared_norm(self) -> float:
        """Sum of squares, first summed per id as in a dense table's gradient."""
        ids, inverse = np.unique(self.ids, return_inverse=True)
        grads = torch.from_numpy(self.grads).double()
        if self.row is not None and self.scale is not None:
            grads = grads[torch.from_numpy(self.row.astype(np.int64))] * torch.from_numpy(self.scale)[:, None]
        summed = torch.zeros(len(ids), grads.shape[1], dtype=torch.float64)
        summed.index_add_(0, torch.from_numpy(inverse.reshape(-1)), grads)
        return float(summed.square().sum())
