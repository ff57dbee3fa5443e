"""Jagged pointwise attention: one signature over the reference, the CPU kernel and the Triton kernel.

Row i of a sequence sees the half-open interval [begin_i, end_i) of its own sequence's keys, a prefix of them, and,
once, itself:

    y_i = sum_j SiLU(alpha * q_i . k_j + bias_ij) / normaliser * v_j          (HSTU, eq. 2; no softmax)

The normaliser is a declared constant, never a property of the batch, so a row's result is a function of its own
sequence alone.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from components.errors import BadInput
from model.attention_bias import TIME_BUCKETS, Bias, time_bucket
from model.attention_reference import attention_reference
from model.attention_visibility import Visibility, causal
from model.operators import WIDEST_TRITON_HEAD

__all__ = ["TIME_BUCKETS", "Bias", "Visibility", "attention", "causal", "time_bucket"]

KERNELS = ("auto", "reference", "cpu", "triton")
CPU_DTYPES = (torch.float32, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Visibility,
    *,
    alpha: float,
    normaliser: float,
    bias: Bias | None = None,
    softmax: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Pointwise attention over jagged rows.

    q (R, H, dqk), k (T, H, dqk), v (T, H, dv) in one floating dtype -> (R, H, dv). R = T unless `seen` has
    row_offsets. alpha: score scale. normaliser: constant > 0. Gradients flow to q, k, v and the bias weights.
    softmax (ablation): softmax over the seen keys takes the place of SiLU and the normaliser.
    kernel: "auto" takes Triton on CUDA (where it is installed), the CPU kernel for float32 and bfloat16, and the
    reference for the rest (float64, softmax); "reference", "cpu" and "triton" force one.
    Raises BadInput for shapes or intervals that do not fit together, or a forced kernel that cannot do it.
    """
    _check(q, k, v, seen, normaliser, bias)
    name = _kernel(q, max(q.shape[-1], v.shape[-1]), softmax, kernel)
    if name == "reference":
        return attention_reference(q, k, v, seen, alpha=alpha, normaliser=normaliser, bias=bias, softmax=softmax)
    if name == "cpu":
        from model.attention_cpu import attention_cpu

        return attention_cpu(q, k, v, seen, alpha=alpha, normaliser=normaliser, bias=bias)
    from model.attention_triton import attention_triton

    return attention_triton(q, k, v, seen, alpha=alpha, normaliser=normaliser, bias=bias)


def _kernel(q: Tensor, width: int, softmax: bool, kernel: str) -> str:
    if kernel not in KERNELS:
        raise BadInput(f"unknown attention kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    fits_cpu = q.device.type == "cpu" and q.dtype in CPU_DTYPES and not softmax
    fits_triton = q.device.type == "cuda" and q.dtype in CPU_DTYPES and not softmax and _has_triton()
    if kernel == "auto":
        return "triton" if fits_triton and width <= WIDEST_TRITON_HEAD else "cpu" if fits_cpu else "reference"
    if (kernel == "cpu" and not fits_cpu) or (kernel == "triton" and not fits_triton):
        raise BadInput(
            f"the {kernel} attention kernel does not take {q.dtype} on {q.device.type}"
            f"{' with softmax' if softmax else ''}; use float32 or bfloat16 on its device, or kernel='auto'"
        )
    return kernel


@cache
def _has_triton() -> bool:
    return all(importlib.util.find_spec(name) for name in ("triton", "model.attention_triton"))


def _check(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, normaliser: float, bias: Bias | None) -> None:
    rows, keys = q.shape[0], k.shape[0]
    if q.dim() != 3 or q.shape[1:] != k.shape[1:] or v.dim() != 3 or v.shape[:2] != k.shape[:2]:
        raise BadInput(
            f"attention needs q (R, H, dqk), k (T, H, dqk) and v (T, H, dv); got {q.shape}, {k.shape}, {v.shape}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise BadInput(f"attention needs q, k and v in one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not normaliser > 0:
        raise BadInput("the attention normaliser must be positive; use a constant such as the attention window")
    if seen.begin.numel() != rows or (rows and int(seen.offsets[-1]) != keys):
        raise BadInput(f"the visibility is for other rows or keys than {rows} and {keys}; build it from this batch")
    seen.check()
    if bias is None:
        return
    if bias.position_weights is None and bias.time_weights is None:
        raise BadInput("an attention bias without weights; give position or time weights, or no bias at all")
    if bias.time_weights is not None and bias.time_weights.shape != (TIME_BUCKETS,):
        raise BadInput(f"time weights need shape ({TIME_BUCKETS},); got {tuple(bias.time_weights.shape)}")
    if bias.position_weights is not None and (bias.position_weights.dim() != 1 or not len(bias.position_weights)):
        raise BadInput(f"position weights need one dimension (P,), P > 0; got {tuple(bias.position_weights.shape)}")
    self_rows = rows if bias.self_gap is None else len(bias.self_gap)
    if (len(bias.query_time), len(bias.key_time), self_rows) != (rows, keys, rows):
        raise BadInput("bias times need query_time and self_gap for each row and key_time for each key")
    times = (bias.query_time, bias.key_time, bias.query_time if bias.self_gap is None else bias.self_gap)
    if any(time.dtype != torch.int64 for time in times):
        raise BadInput("bias times are int64 seconds; convert query_time, key_time and self_gap with .long()")
