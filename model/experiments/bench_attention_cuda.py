"""Attention on a CUDA device: the Triton kernels beside a dense PyTorch reference, eager and torch.compile'd.

    python -m model.experiments.bench_attention_cuda [--sizes 512,1024,2048,4096,8192] [--widths 64,128]

Batches of sequences of one length N, as many as make --tokens events, bfloat16, causal, with the relative position
and time bias and without any. Results and gradients are first compared with the reference in float32. Times are
medians by the device's clock. A pair (row, key it sees) of a head counts 4 d operations forward and 10 d backward,
what is computed again not counted, for every implementation alike. Prints a table and, as the last line,
`RESULT {json}`. Exit code 2 without a CUDA device or without the package triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from components.errors import FreshetError
from model.attention import TIME_BUCKETS, Bias, attention, causal, time_bucket
from model.attention_visibility import Visibility

TOLERANCE = 1e-2
"""Of the norm of the difference over the norm, for bfloat16 against float32."""


@dataclass
class Problem:
    """B sequences of N events: q, k, v (B N, H, d); times (B, N) int64 seconds; bias weights or None. Leaves."""

    batch: int
    size: int
    q: Tensor
    k: Tensor
    v: Tensor
    times: Tensor
    position: Tensor | None  # (N,) by distance
    time: Tensor | None  # (129,)
    y_gradient: Tensor
    seen: Visibility

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.position, self.time) if x is not None]

    def pairs(self) -> int:
        """Pairs of a row and a key it sees, over all heads."""
        return self.batch * self.q.shape[1] * self.size * (self.size + 1) // 2


def make_problem(
    size: int, width: int, *, tokens: int, heads: int, biased: bool, device: str, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    """A random batch with sorted times, gaps from a second to 17 hours."""
    g = torch.Generator().manual_seed(0)
    batch = max(1, tokens // size)

    def numbers(*shape: int, scale: float, kind: torch.dtype) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(device, kind).requires_grad_()

    q, k, v = (numbers(batch * size, heads, width, scale=0.5, kind=dtype) for _ in range(3))
    times = 1_000_000_000 + torch.exp(torch.rand(batch, size, generator=g) * 11).long().cumsum(1)
    position = numbers(size, scale=0.1, kind=torch.float32) if biased else None
    time = numbers(TIME_BUCKETS, scale=0.1, kind=torch.float32) if biased else None
    gradient = numbers(batch * size, heads, width, scale=1.0, kind=dtype).detach()
    seen = causal(torch.full((batch,), size, device=device))
    return Problem(batch, size, q, k, v, times.to(device), position, time, gradient, seen)


def ours(p: Problem, kernel: str = "triton") -> Tensor:
    """(B N, H, d)."""
    clock = p.times.flatten()
    bias = None if p.position is None and p.time is None else Bias(p.position, p.time, clock, clock)
    alpha = p.q.shape[2] ** -0.5
    return attention(p.q, p.k, p.v, p.seen, alpha=alpha, normaliser=p.size, bias=bias, kernel=kernel)


def dense(p: Problem) -> Tensor:
    """The same by dense tensors, every score in memory: (B N, H, d)."""
    q, k, v = (x.unflatten(0, (p.batch, p.size)) for x in (p.q, p.k, p.v))
    score = torch.einsum("bnhd,bmhd->bhnm", q * p.q.shape[2] ** -0.5, k)
    place = torch.arange(p.size, device=p.q.device)
    distance = place[:, None] - place
    if p.position is not None and p.time is not None:
        bucket = time_bucket(p.times[:, :, None] - p.times[:, None])
        by_time = torch.index_select(p.time, 0, bucket.flatten()).view(bucket.shape)
        by_position = torch.index_select(p.position, 0, distance.clamp(min=0).flatten()).view(distance.shape)
        score = score + (by_position + by_time).to(score.dtype)[:, None]
    weight = (F.silu(score) / p.size).masked_fill(distance < 0, 0)
    return torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(0, 1)


def run(step: Callable[[Problem], Tensor], p: Problem) -> list[Tensor]:
    """One forward and backward pass: y and the gradients."""
    for leaf in p.leaves:
        leaf.grad = None
    y = step(p)
    y.backward(p.y_gradient)
    return [y.detach(), *(leaf.grad for leaf in p.leaves if leaf.grad is not None)]


def check_equal(p: Problem, step: Callable[[Problem], Tensor] = ours) -> float:
    """The largest relative error of y and the gradients against the reference in float32; FreshetError if large."""

    def single(x: Tensor) -> Tensor:
        return x.detach().float().requires_grad_(x.requires_grad)

    exact = replace(p, q=single(p.q), k=single(p.k), v=single(p.v), y_gradient=single(p.y_gradient))
    worst = 0.0
    names = ("y", "q", "k", "v", "position", "time")
    for name, got, want in zip(names, run(step, p), run(dense, exact), strict=False):
        error = float((got.float() - want).norm() / want.norm())
        if not error <= TOLERANCE:
            raise FreshetError(f"the two attentions disagree at N={p.size}: {name} is off by {error:.1e}")
        worst = max(worst, error)
    return worst


def measure(step: Callable[[Problem], Tensor], p: Problem, repetitions: int) -> dict[str, float] | None:
    """Milliseconds of the forward pass and of both; None where the device's memory does not suffice."""
    try:
        with torch.no_grad():
            forward = _median_ms(lambda: step(p), repetitions)
        return {"forward": forward, "both": _median_ms(lambda: run(step, p), repetitions)}
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _median_ms(work: Callable[[], object], repetitions: int) -> float:
    for _ in range(3):  # compiles, and brings the clock up
        work()
    samples = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    return median(samples)


def figures(options: argparse.Namespace, console: Console) -> dict[str, float | None]:
    """Per bias, width and size: milliseconds, TFLOP/s, and reference over ours."""
    columns = ("ours fwd", "TFLOP/s", "ours fwd+bwd", "TFLOP/s", "reference", "ratio", "compiled", "ratio", "error")
    table = Table("attention, bf16", "sequences", *columns)
    out: dict[str, float | None] = {}
    for biased in (True, False):
        for width in options.widths:
            for size in options.sizes:
                p = make_problem(size, width, tokens=options.tokens, heads=options.heads, biased=biased, device="cuda")
                error = check_equal(p)
                torch._dynamo.reset()  # a size of its own is compiled, not a general one
                steps = {"ours": ours, "reference": dense, "compiled": torch.compile(dense, dynamic=False)}
                times = {name: measure(step, p, options.repetitions) for name, step in steps.items()}
                label = f"{'bias' if biased else 'plain'}_d{width}_n{size}"
                found = _row(times, width * p.pairs())
                out |= {f"{label}_{name}": value for name, value in found.items()} | {f"{label}_error": error}
                cells = ["-" if value is None else f"{value:.4g}" for value in found.values()]
                table.add_row(label, str(p.batch), *cells, f"{error:.0e}")
    console.print(table)
    return out


def _row(times: dict[str, dict[str, float] | None], work: int) -> dict[str, float | None]:
    """work: pairs times width."""
    mine = times["ours"]
    if mine is None:
        raise FreshetError("the device has no memory for the kernels themselves; take fewer --tokens")
    row: dict[str, float | None] = {
        "forward_ms": mine["forward"], "forward_tflops": 4 * work / mine["forward"] / 1e9,
        "both_ms": mine["both"], "both_tflops": 14 * work / mine["both"] / 1e9,
    }  # fmt: skip
    for name in ("reference", "compiled"):
        theirs = times[name]
        row[f"{name}_ms"] = None if theirs is None else theirs["both"]
        row[f"{name}_ratio"] = None if theirs is None else theirs["both"] / mine["both"]
    return row


def missing() -> str | None:
    """What this machine lacks to run the benchmark."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    if not torch.cuda.is_available():
        return "a CUDA device and a build of PyTorch for CUDA"
    return None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_numbers, default="512,1024,2048,4096,8192", help="lengths N,...")
    parser.add_argument("--widths", type=_numbers, default="64,128", help="of a head, d,...")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16384, help="events of a batch")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args(arguments)
    if lacking := missing():
        print(f"this benchmark measures the Triton kernels and needs {lacking}", file=sys.stderr)
        return 2
    console = Console(stderr=True, width=160)
    console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    print("RESULT " + json.dumps(figures(options, console)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
