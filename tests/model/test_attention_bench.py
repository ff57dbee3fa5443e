"""The attention benchmark compares like with like, and the kernel's memory is what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import FreshetError
from model.experiments import bench_hstu_attention as bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("full", [False, True])
def test_the_padded_reference_computes_what_the_kernel_computes(full: bool) -> None:
    bench.check_equal(bench.make_problem(70, 3, full=full))


def test_a_reference_that_computes_something_else_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ours", lambda p: bench.reference(p) * 1.001)
    with pytest.raises(FreshetError, match="disagree"):
        bench.check_equal(bench.make_problem(70, 3, full=False))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_no_matrix_of_keys_by_keys_is_ever_in_memory() -> None:
    command = [sys.executable, "-m", bench.__name__, "--child", "ours", "--sizes", "4096"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one_matrix = 4096 * 4096 * 4 / 2**20
    assert 0 < float(done.stdout.split()[-1]) < one_matrix / 2


BACKWARD = """
import sys
from pathlib import Path

import torch

from model.attention import attention, causal

def memory(name):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(name))

def backward(length, window):
    q, k, v = (torch.randn(length, 4, 32).requires_grad_() for _ in range(3))
    seen = causal(torch.tensor([length]), max_attn_len=window)
    y = attention(q, k, v, seen, alpha=0.1, normaliser=64, kernel="cpu")
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    y.backward(torch.ones_like(y))
    return memory("VmHWM") - before

backward(64, 0)
print(*(backward(int(length), int(sys.argv[1])) for length in sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
@pytest.mark.parametrize("window", [0, 64])
def test_the_memory_of_the_backward_pass_grows_with_the_length_and_not_with_its_square(window: int) -> None:
    command = [sys.executable, "-c", BACKWARD, str(window), "8192", "16384"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    short, long = (int(kilobytes) for kilobytes in done.stdout.split())
    assert 0 < short < long < 3 * short  # twice the length; the square would be four times
