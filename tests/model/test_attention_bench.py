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
