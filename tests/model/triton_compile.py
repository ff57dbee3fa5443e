"""Compile the attention kernels for Hopper, without a device: `python -m tests.model.triton_compile`.

The interpreter takes programs that the compiler refuses (a name that changes its shape in a loop, for one). Prints the
instructions by which each kernel multiplies matrices.
"""

from __future__ import annotations

from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.triton.backward_keys import backward_keys
from model.triton.backward_rows import backward_rows
from model.triton.forward import forward
from model.triton.launch import BUCKETS, SCAN, tilings

KERNELS = {"forward": forward, "keys": backward_keys, "rows": backward_rows}
INTEGERS = ("offsets", "row_offsets", "begin", "end", "prefix", "bounds", "query_time", "key_time", "self_gap")
WEIGHTS = ("position", "time", "position_partial", "time_partial")
MATRICES = ("q", "k", "v", "g", "y", "q_gradient", "k_gradient", "v_gradient")
BIAS = ("position", "time", "query_time", "key_time", "self_gap")


def compile_kernel(name: str, dtype: torch.dtype, width: int, *, full: bool) -> str:
    """PTX of a kernel, with prefix and bias (full) or with neither."""
    kernel, tiling = KERNELS[name], tilings(dtype, width, width, biased=full)[name]
    padded = max(16, triton.next_power_of_2(width))
    constants: dict[str, object] = {
        "DQK": width, "DV": width, "BLOCK_DQK": padded, "BLOCK_DV": padded, "BLOCK": tiling.block,
        "OTHER": tiling.other, "BUCKETS": BUCKETS, "SCAN": SCAN, "INTERPRETED": False,
    }  # fmt: skip
    if not full:
        constants |= dict.fromkeys((*BIAS, "prefix"))
    types = dict.fromkeys(INTEGERS, "*i64") | dict.fromkeys(WEIGHTS, "*fp32") | {"tiles": "*i32", "cells": "*i32"}
    types |= dict.fromkeys(MATRICES, "*bf16" if dtype == torch.bfloat16 else "*fp32") | {
        "alpha": "fp32",
        "scale": "fp32",
    }
    names = kernel.arg_names
    signature = {x: "constexpr" if x in constants else types.get(x, "i32") for x in names}
    source = ASTSource(kernel, signature, {(names.index(x),): constants[x] for x in names if x in constants})
    options = {"num_warps": tiling.warps, "num_stages": 2, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    return ptx


def main() -> None:
    """Each kernel in both types, with everything and with nothing."""
    for dtype, width, full in ((torch.bfloat16, 64, True), (torch.bfloat16, 50, False), (torch.float32, 8, True)):
        for name in KERNELS:
            ptx = compile_kernel(name, dtype, width, full=full)
            found = Counter(line.split()[0] for line in ptx.splitlines() if "mma.m" in line or "wgmma.mma" in line)
            print(name, dtype, width, "full" if full else "plain", dict(found))


if __name__ == "__main__":
    main()
