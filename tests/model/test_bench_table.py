"""The benchmark of the embedding table: how its samples become figures. Nothing here depends on speed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.experiments import bench_table as bench
from model.experiments.bench_table import Samples, Series

RESULT = {
    "lookup_vs_monolith",
    "lookup_vs_gather",
    "update_vs_monolith",
    "update_vs_index_add",
    "insert_vs_monolith",
    "lookup_two_threads",
    "lookup_with_writer",
    "misses_with_writer",
    "step_with_snapshot",
    "worst_batch_over_median",
    "medians",
}
times = st.floats(0.1, 1000)


def series(measure: str, variant: str, values: list[float], keys: str = "uniform", threads: int = 1) -> Series:
    return Series(measure, variant, keys, threads, "Mops/s", tuple(values))


def test_only_sections_that_there_are_can_be_chosen() -> None:
    assert bench.sections("update,lookup") == "update,lookup"
    with pytest.raises(argparse.ArgumentTypeError, match="no section 'inserts'; use some of lookup,update,insert"):
        bench.sections("lookup,inserts")
    harness = (bench.ROOT / "csrc/table/bench/harness.h").read_text()
    assert f'sections = "{",".join(bench.SECTIONS)}"' in harness


def test_a_line_is_a_series_and_anything_else_is_refused() -> None:
    fields = {"measure": "lookup", "variant": "gather", "keys": "zipf", "threads": 2, "unit": "Mops/s"}
    assert bench.parse(json.dumps({**fields, "values": [1, 2.5]})) == Series(
        "lookup", "gather", "zipf", 2, "Mops/s", (1, 2.5)
    )
    with pytest.raises(ValueError):
        bench.parse("lookup 2.5")


def test_a_ratio_is_taken_within_each_repetition() -> None:
    slow_machine_later = [10.0, 12.0, 3.0], [2.0, 2.0, 0.5]
    assert bench.median_ratio(*slow_machine_later) == 6.0
    assert bench.median_ratio([], [1.0]) is None and bench.median_ratio([1.0], []) is None
    with pytest.raises(ValueError):
        bench.median_ratio([1.0, 2.0], [1.0])


def test_noise_of_one_run_is_not_taken_for_a_stall_of_the_table() -> None:
    noisy = [[1.0, 90.0, 1.0, 8.0], [1.0, 1.0, 50.0, 8.0], [70.0, 1.0, 1.0, 9.0]]
    assert bench.worst_over_median(noisy) == 8.0
    assert bench.worst_over_median(noisy[:1]) == 90.0 / 4.5
    assert bench.worst_over_median([]) is None


@given(st.lists(st.lists(times, min_size=5, max_size=5), min_size=1, max_size=4), times)
def test_worst_over_median_is_at_least_one_in_any_unit(runs: list[list[float]], unit: float) -> None:
    ratio = bench.worst_over_median(runs)
    assert ratio is not None and ratio >= 1
    assert bench.worst_over_median([[t * unit for t in run] for run in runs]) == pytest.approx(ratio)


def test_the_result_has_exactly_its_keys_and_null_for_what_was_left_out() -> None:
    nothing = bench.result(Samples([]))
    assert nothing.keys() == RESULT and nothing.pop("medians") == {}
    assert set(nothing.values()) == {None}


def test_the_result_compares_one_thread_and_uniform_keys() -> None:
    samples = Samples(
        [
            series("lookup", "freshet", [30.0, 20.0]),
            series("lookup", "freshet", [57.0, 38.0], threads=2),
            series("lookup", "freshet", [99.0, 99.0], "zipf"),
            series("lookup", "monolith", [5.0, 4.0]),
            series("lookup", "gather", [60.0, 50.0]),
            series("update", "freshet", [12.0]),
            series("update", "torch", [1.5]),
            series("insert", "freshet", [9.0], "new"),
            series("insert", "monolith", [1.5], "new"),
            series("step_without_snapshot", "freshet", [1.0]),
            series("step_with_snapshot", "freshet", [1.25]),
            series("growth", "freshet", [1.0, 1.0, 4.0], "new"),
            series("growth", "freshet", [9.0, 1.0, 3.0], "new"),
            series("growth", "monolith", [1.0, 1.0, 400.0], "new"),
            series("misses_with_writer", "freshet", [0.0, 1.0]),
            series("torn_with_writer", "freshet", [0.0, 2.0]),
        ]
    )
    result = bench.result(samples)
    assert result["lookup_vs_monolith"] == 5.5 and result["lookup_vs_gather"] == pytest.approx(0.45)
    assert result["lookup_two_threads"] == pytest.approx(1.9)
    assert result["update_vs_index_add"] == 8.0 and result["update_vs_monolith"] is None
    assert result["insert_vs_monolith"] == 6.0
    assert result["step_with_snapshot"] == 0.8, "a slower step is a smaller figure"
    assert result["worst_batch_over_median"] == 3.0
    assert result["misses_with_writer"] == 3, "half rows count as misses"
    assert result["medians"]["lookup/freshet/zipf/1"] == 99.0
    assert bench.further_ratios(samples)["monolith's worst_batch_over_median"] == 400.0
    assert bench.table(samples).row_count == len(samples.series)


def test_torch_updates_and_reads_the_rows_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "batches.u32"
    rows = np.arange(2 * bench.BATCH, dtype="<u4") % 100
    rows.tofile(file)
    peers = bench.TorchPeers(rows=101)
    before = peers.weights.clone()
    peers.measure("lookup", "uniform", str(file))
    assert peers.weights.equal(before) and peers.out.equal(peers.weights[rows[bench.BATCH :].astype(np.int64)])
    peers.measure("update", "uniform", str(file))
    assert (peers.weights[:100] < before[:100]).all() and peers.weights[100].equal(before[100])
    measures = ("lookup", "lookup_mean", "update", "update_mean")
    assert {(s.measure, s.threads) for s in peers.series()} == {(m, t) for m in measures for t in (1, 2)}
    assert all(len(s.values) == 1 and s.values[0] > 0 for s in peers.series())


PROGRAM = """
import json, sys
print(json.dumps({"turn": "lookup", "keys": "uniform", "batches": sys.argv[1]}), flush=True)
assert sys.stdin.readline() == "\\n"
print(json.dumps({"measure": "lookup", "variant": "freshet", "keys": "uniform", "threads": 1, "unit": "Mops/s",
                  "values": [3]}), flush=True)
sys.exit(int(sys.argv[2]))
"""


def test_a_run_takes_turns_and_reports_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "batches.u32"
    np.zeros(bench.BATCH, dtype="<u4").tofile(file)
    program = [sys.executable, "-c", PROGRAM, str(file)]
    samples = bench.run([*program, "0"], lambda: bench.TorchPeers(rows=1))
    assert samples.values("lookup") == [3] and len(samples.values("lookup", "torch", threads=2)) == 1
    with pytest.raises(subprocess.CalledProcessError):
        bench.run([*program, "3"], lambda: bench.TorchPeers(rows=1))
