"""Attention forward and backward: the CPU kernel beside a padded PyTorch reference, in one run.

    python -m model.experiments.bench_hstu_attention [--threads 1] [--sizes 256,1024,4096]

The reference is the published research code's computation (arXiv 2402.17152's repository): sequences padded to N, the
relative position and time bias as a (B, N, N) tensor, SiLU, a constant 1/N, a causal mask, all by dense PyTorch
operations in float32. Its result is compared with ours before anything is timed. One head of width 50; lengths
uniform in [N/10, 0.95 N] (as 20..200 of 211), and once all N, so that the share of padding is seen.
Ratios are reference over ours: the median over the repetitions of the ratio within each. Prints a table and, as the
last line, `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from components.errors import FreshetError
from model.attention import TIME_BUCKETS, Bias, attention, causal
from model.experiments import command

WIDTH = 50
BATCH = {256: 64, 1024: 8, 4096: 2}
"""Sequences per size: what lets the reference's (B, N, N) tensors fit into some GiB."""
REPETITIONS = {256: 7, 1024: 7, 4096: 3}


@dataclass
class Problem:
    """q, k, v jagged (T, 1, WIDTH); lengths (B,); times (B, N) int64 seconds; bias weights. All leaves."""

    size: int
    lengths: Tensor
    times: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    position: Tensor  # (2N - 1,), at j - i + N - 1
    time: Tensor  # (129,)
    y_gradient: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.position, self.time]


def make_problem(size: int, batch: int, *, full: bool, seed: int = 0) -> Problem:
    """A random batch with sorted times; sessions of about an hour over months, as rating logs have."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(size // 10, size * 95 // 100 + 1, (batch,), generator=g)
    if full:
        lengths = torch.full_like(lengths, size)
    gaps = torch.exp(torch.rand(batch, size, generator=g) * 11).long()  # 1 second to 17 hours
    total = int(lengths.sum())
    q, k, v = (torch.randn(total, 1, WIDTH, generator=g) * 0.3 for _ in range(3))
    position, bucket = (torch.randn(n, generator=g) * 0.02 for n in (2 * size - 1, TIME_BUCKETS))
    y_gradient = torch.randn(total, 1, WIDTH, generator=g)
    problem = Problem(size, lengths, 1_000_000_000 + gaps.cumsum(1), q, k, v, position, bucket, y_gradient)
    for leaf in problem.leaves:
        leaf.requires_grad_()
    return problem


def reference(p: Problem, log_dtype: torch.dtype = torch.float32) -> Tensor:
    """(T, 1, WIDTH), by dense tensors. The published code takes the logarithm of a gap in float32."""
    n = p.size
    inside = torch.arange(n) < p.lengths[:, None]
    q, k, v = (_pad(x.flatten(1), inside) for x in (p.q, p.k, p.v))
    score = torch.einsum("bnd,bmd->bnm", q, k) + _dense_bias(p, log_dtype)
    weight = F.silu(score) / n * torch.tril(torch.ones(n, n))
    return torch.einsum("bnm,bmd->bnd", weight, v)[inside].unsqueeze(1)


def _pad(jagged: Tensor, inside: Tensor) -> Tensor:
    return torch.zeros(*inside.shape, jagged.shape[1]).index_put((inside,), jagged)


def _dense_bias(p: Problem, log_dtype: torch.dtype) -> Tensor:
    """(B, N, N): w_pos[j - i + N - 1] + w_ts[bucket(ts[i + 1] - ts[j])]."""
    n = p.size
    rows = F.pad(p.position, [0, n]).repeat(n)[:-n].reshape(n, 3 * n - 2)[:, n - 1 : 2 * n - 1]
    following = torch.cat([p.times[:, 1:], p.times[:, -1:]], dim=1)
    gap = following[:, :, None] - p.times[:, None]
    bucket = (torch.log(gap.abs().clamp(min=1).to(log_dtype)) / 0.301).long().clamp(0, TIME_BUCKETS - 1)
    return rows + torch.index_select(p.time, 0, bucket.view(-1)).view(bucket.shape)


def ours(p: Problem) -> Tensor:
    """(T, 1, WIDTH), by the CPU kernel; the layout of the batch is made anew, as in a training step."""
    inside = torch.arange(p.size) < p.lengths[:, None]
    query = torch.cat([p.times[:, 1:], p.times[:, -1:]], dim=1)[inside]
    key = p.times[inside]
    distances = p.position[: p.size].flip(0)  # index i - j
    bias = Bias(distances, p.time, query, key, query - key)
    return attention(p.q, p.k, p.v, causal(p.lengths), alpha=1.0, normaliser=p.size, bias=bias, kernel="cpu")


def run(step: Callable[[Problem], Tensor], p: Problem) -> list[Tensor]:
    """One forward and backward pass: y and the gradients."""
    for leaf in p.leaves:
        leaf.grad = None
    y = step(p)
    y.backward(p.y_gradient)
    return [y.detach(), *(leaf.grad for leaf in p.leaves if leaf.grad is not None)]


def check_equal(p: Problem) -> None:
    """Raise FreshetError when the two do not compute the same (float32 logarithms miss the edge of a bucket)."""

    def exact(problem: Problem) -> Tensor:
        return reference(problem, torch.float64)

    names = ("y", "q", "k", "v", "position", "time")
    for name, got, want in zip(names, run(ours, p), run(exact, p), strict=True):
        error = float((got - want).abs().max() / want.abs().max())
        if not error < 1e-4:  # float32 sums of up to B N N terms, in different orders
            raise FreshetError(f"the two attentions disagree at N={p.size}: {name} is off by {error:.1e}")


def measure_time(size: int, *, full: bool = False) -> dict[str, float]:
    """Milliseconds of each and their ratio at one N, with torch's present number of threads."""
    p = make_problem(size, BATCH[size], full=full)
    check_equal(p)
    samples = []
    for _ in range(REPETITIONS[size]):
        pair = []
        for step in (reference, ours):
            start = time.perf_counter()
            run(step, p)
            pair.append(time.perf_counter() - start)
        samples.append(pair)
    return {
        "reference_ms": 1000 * median(a for a, _ in samples),
        "ours_ms": 1000 * median(b for _, b in samples),
        "ratio": median(a / b for a, b in samples),
    }


def measure_memory(size: int, threads: int) -> dict[str, float]:
    """Growth of the peak resident memory in MiB over one forward and backward pass, each in a process of its own."""
    found = {}
    for name in ("reference", "ours"):
        command = [sys.executable, "-m", __spec__.name, "--child", name, "--sizes", str(size), f"--threads={threads}"]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        found[f"{name}_mib"] = float(done.stdout.split()[-1])
    return found | {"ratio": found["reference_mib"] / found["ours_mib"]}


def peak_growth(step: Callable[[Problem], Tensor], size: int) -> float:
    """MiB by which the process's peak (VmHWM, reset before) exceeds what it holds before the pass."""
    run(step, make_problem(64, 2, full=False))  # what is loaded and started once is not counted
    p = make_problem(size, BATCH[size], full=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run(step, p)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise FreshetError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def figures(sizes: list[int], threads: int, console: Console) -> dict[str, float]:
    """attention_<N>, attention_<N>_full and, where 4096 is asked for, memory_4096: reference over ours."""
    torch.set_num_threads(threads)
    table = Table("attention, forward + backward", "sequences", "reference", "ours", "ratio")
    out = {}
    for size in sizes:
        for full in (False, True):
            found = measure_time(size, full=full)
            out[f"attention_{size}{'_full' if full else ''}"] = round(found["ratio"], 2)
            row = [f"{found['reference_ms']:.1f} ms", f"{found['ours_ms']:.1f} ms", f"{found['ratio']:.1f} x"]
            table.add_row(f"N={size}{', all of length N' if full else ''}", str(BATCH[size]), *row)
    if 4096 in sizes:
        found = measure_memory(4096, threads)
        out["memory_4096"] = round(found["ratio"], 2)
        row = [f"{found['reference_mib']:.0f} MiB", f"{found['ours_mib']:.1f} MiB", f"{found['ratio']:.1f} x"]
        table.add_row("peak memory, N=4096", str(BATCH[4096]), *row)
    console.print(table)
    return out


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", default="256,1024,4096", help=f"of {sorted(BATCH)}, separated by commas")
    parser.add_argument("--child", choices=["reference", "ours"], help="print the memory of one pass; used by itself")
    options = parser.parse_args(arguments)
    sizes = [int(size) for size in options.sizes.split(",")]
    if not set(sizes) <= set(BATCH):
        parser.error(f"--sizes are of {sorted(BATCH)}")
    if options.child:
        torch.set_num_threads(options.threads)
        print(peak_growth(reference if options.child == "reference" else ours, sizes[0]))
        return
    print("RESULT " + json.dumps(figures(sizes, options.threads, Console(stderr=True))))


if __name__ == "__main__":
    command.run(main)
