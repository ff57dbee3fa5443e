"""The embedding table beside its peers: Monolith's structure, absl, torch and a bare gather, in one run.

    python -m model.experiments.bench_table [--quick] [--rows 2000000] [--sections lookup,update,...]

Builds csrc/table/bench (libcuckoo-dev and libabsl-dev are needed), runs it, and measures torch's index_select and
index_add_ on the same batches in the pauses between its repetitions. All times are wall time; nothing is pinned.
A repetition's rate of lookups and updates is that of its median batch (`_mean`: of all its batches). A ratio is the
median over the repetitions of the ratio within each, so that noise of the machine meets both sides.
Prints a table and, as the last line, `RESULT {json}`; a figure that was not measured is null there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
BATCH, DIM, LEARNING_RATE = 8192, 64, 0.05
OURS, MONOLITH, TORCH = "freshet", "monolith", "torch"
SECTIONS = ("lookup", "update", "insert", "writer", "step", "growth", "load", "files", "delta")


@dataclass(frozen=True)
class Series:
    """Samples of one variant, in order of repetition (for `growth`: in order of batch)."""

    measure: str
    variant: str
    keys: str
    threads: int
    unit: str
    values: tuple[float, ...]


class Samples:
    """All series of a run."""

    def __init__(self, series: Iterable[Series]) -> None:
        self.series = list(series)

    def runs(self, measure: str, variant: str = OURS, keys: str | None = None, threads: int = 1) -> list[Series]:
        """The series that fit; `growth` has one for each run."""
        wanted = (measure, variant, threads)
        return [s for s in self.series if (s.measure, s.variant, s.threads) == wanted and keys in (None, s.keys)]

    def values(self, measure: str, variant: str = OURS, keys: str = "uniform", threads: int = 1) -> list[float]:
        """The samples, empty where nothing was measured."""
        runs = self.runs(measure, variant, keys, threads)
        return list(runs[0].values) if runs else []


def parse(line: str) -> Series:
    """A line of the benchmark. ValueError if it is something else."""
    fields = json.loads(line)
    return Series(**{**fields, "values": tuple(fields["values"])})


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float | None:
    """Median over repetitions of numerator / denominator; None if one was not measured.

    ValueError if the two have different numbers of repetitions.
    """
    if not numerator or not denominator:
        return None
    return float(np.median([a / b for a, b in zip(numerator, denominator, strict=True)]))


def worst_over_median(runs: Sequence[Sequence[float]]) -> float | None:
    """Worst batch over the median one, of the least time that each batch number took in any run [runs, batches].

    A stall of the machine hits another batch in each run; one of the table's own returns at the same batch.
    """
    if not runs:
        return None
    times = np.min(np.asarray(runs, dtype=np.float64), axis=0)
    return float(times.max() / np.median(times))


def result(samples: Samples) -> dict[str, Any]:
    """The figures of the RESULT line; None where a section was left out."""
    get = samples.values
    misses = get("misses_with_writer")
    return {
        "lookup_vs_monolith": median_ratio(get("lookup"), get("lookup", MONOLITH)),
        "lookup_vs_gather": median_ratio(get("lookup"), get("lookup", "gather")),
        "update_vs_monolith": median_ratio(get("update"), get("update", MONOLITH)),
        "update_vs_index_add": median_ratio(get("update"), get("update", TORCH)),
        "insert_vs_monolith": median_ratio(get("insert", keys="new"), get("insert", MONOLITH, "new")),
        "lookup_two_threads": median_ratio(get("lookup", threads=2), get("lookup")),
        "lookup_with_writer": median_ratio(get("lookup_with_writer"), get("lookup_without_writer")),
        "misses_with_writer": int(sum(misses + get("torn_with_writer"))) if misses else None,
        "step_with_snapshot": median_ratio(get("step_without_snapshot"), get("step_with_snapshot")),
        "worst_batch_over_median": worst_over_median(growth(samples)),
        "medians": medians(samples),
    }


def further_ratios(samples: Samples) -> dict[str, float | None]:
    """What helps to judge the figures of `result`: the same for the peer, the noise, other batches."""
    get = samples.values
    copy = get("file_copy", "read and write", "all")
    raw = [worst_over_median([times]) for times in growth(samples)]
    return {
        "lookup_vs_monolith, all batches": median_ratio(get("lookup_mean"), get("lookup_mean", MONOLITH)),
        "update_vs_monolith, all batches": median_ratio(get("update_mean"), get("update_mean", MONOLITH)),
        "insert_vs_monolith, least times": median_ratio(
            get("insert_least", keys="new"), get("insert_least", MONOLITH, "new")
        ),
        "insert_vs_new_rows": median_ratio(get("insert", keys="new"), get("insert", "new rows", "new")),
        "new rows' insert_vs_monolith": median_ratio(get("insert", "new rows", "new"), get("insert", MONOLITH, "new")),
        "update_vs_known_rows": median_ratio(get("update"), get("update", "known rows")),
        "gather's lookup_vs_monolith": median_ratio(get("lookup", "gather"), get("lookup", MONOLITH)),
        "known rows' update_vs_monolith": median_ratio(get("update", "known rows"), get("update", MONOLITH)),
        "known rows' update_vs_index_add": median_ratio(get("update", "known rows"), get("update", TORCH)),
        "known places' update_vs_monolith": median_ratio(get("update", "known places"), get("update", MONOLITH)),
        "known places' update_vs_index_add": median_ratio(get("update", "known places"), get("update", TORCH)),
        "lookup_vs_absl": median_ratio(get("lookup"), get("lookup", "absl")),
        "lookup_vs_index_select": median_ratio(get("lookup"), get("lookup", TORCH)),
        "lookup_vs_monolith, zipf": median_ratio(get("lookup", keys="zipf"), get("lookup", MONOLITH, "zipf")),
        "lookup_vs_monolith, 2 threads": median_ratio(get("lookup", threads=2), get("lookup", MONOLITH, threads=2)),
        "update_vs_monolith, zipf": median_ratio(get("update", keys="zipf"), get("update", MONOLITH, "zipf")),
        "update_vs_monolith, 2 threads": median_ratio(get("update", threads=2), get("update", MONOLITH, threads=2)),
        "gather_two_threads": median_ratio(get("lookup", "gather", threads=2), get("lookup", "gather")),
        "monolith's lookup_with_writer": median_ratio(
            get("lookup_with_writer", MONOLITH), get("lookup_without_writer", MONOLITH)
        ),
        "worst_batch_over_median of the noisiest run": max((r for r in raw if r is not None), default=None),
        "monolith's worst_batch_over_median": worst_over_median(growth(samples, MONOLITH)),
        "snapshot_vs_file_copy": median_ratio(get("snapshot", keys="all"), copy),
        "restore_vs_file_copy": median_ratio(get("restore", keys="all"), copy),
    }


def growth(samples: Samples, variant: str = OURS) -> list[tuple[float, ...]]:
    """Times of all batches, of each run."""
    return [s.values for s in samples.runs("growth", variant, "new")]


def medians(samples: Samples) -> dict[str, float]:
    """Median of each series, named measure/variant/keys/threads; runs of the same name are pooled."""
    pooled: dict[str, list[float]] = {}
    for s in samples.series:
        pooled.setdefault(f"{s.measure}/{s.variant}/{s.keys}/{s.threads}", []).extend(s.values)
    return {name: float(np.median(values)) for name, values in pooled.items()}


def table(samples: Samples) -> Table:
    """One line per series, with the spread of its samples."""
    out = Table(title="Embedding table and peers (wall time)")
    for name in ("measure", "variant", "keys", "threads"):
        out.add_column(name, justify="right" if name == "threads" else "left")
    for name in ("median", "least", "most"):
        out.add_column(name, justify="right")
    out.add_column("unit")
    for s in samples.series:
        figures = [f"{f:.4g}" for f in (float(np.median(s.values)), min(s.values), max(s.values))]
        out.add_row(s.measure, s.variant, s.keys, str(s.threads), *figures, s.unit)
    return out


def ratio_table(samples: Samples) -> Table:
    """The ratios, those of the RESULT line first."""
    out = Table("ratio", title="Ratios: median over repetitions")
    out.add_column("", justify="right")
    for name, ratio in (result(samples) | further_ratios(samples)).items():
        if name != "medians":
            out.add_row(name, "-" if ratio is None else f"{ratio:.3g}")
    return out


class TorchPeers:
    """torch's own gather and row update, on rows whose number is known; no table, so no lookup."""

    def __init__(self, rows: int) -> None:
        self.weights = torch.rand(rows, DIM)
        self.gradients = torch.rand(BATCH, DIM)
        self.out = torch.empty(BATCH, DIM)
        self.batches: dict[str, torch.Tensor] = {}
        self.rates: dict[tuple[str, str, int], list[float]] = {}

    def measure(self, measure: str, keys: str, file: str) -> None:
        """One repetition of `lookup` or `update` with 1 and 2 threads, over the batches in `file` (uint32 rows)."""
        if file not in self.batches:
            rows: npt.NDArray[np.int64] = np.fromfile(file, dtype="<u4").astype(np.int64)
            self.batches[file] = torch.from_numpy(rows).view(-1, BATCH)
            self._times(measure, self.batches[file], 1)  # to warm up
        for threads in (1, 2):
            times = self._times(measure, self.batches[file], threads)
            for name, seconds in ((measure, np.median(times)), (f"{measure}_mean", np.mean(times))):
                self.rates.setdefault((name, keys, threads), []).append(float(BATCH / seconds * 1e-6))

    def series(self) -> list[Series]:
        """What was measured so far."""
        return [Series(m, TORCH, k, t, "Mops/s", tuple(rates)) for (m, k, t), rates in self.rates.items()]

    def _times(self, measure: str, batches: torch.Tensor, threads: int) -> list[float]:
        """Seconds of each batch."""
        run: Callable[[torch.Tensor], torch.Tensor] = self._update if measure == "update" else self._lookup
        before, times = torch.get_num_threads(), []
        torch.set_num_threads(threads)
        try:
            for batch in batches:
                start = time.perf_counter()
                run(batch)
                times.append(time.perf_counter() - start)
            return times
        finally:
            torch.set_num_threads(before)

    def _lookup(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.weights, 0, rows, out=self.out)

    def _update(self, rows: torch.Tensor) -> torch.Tensor:
        return self.weights.index_add_(0, rows, self.gradients, alpha=-LEARNING_RATE)


def build() -> Path:
    """The benchmark program, made by csrc/Makefile."""
    subprocess.run(["make", "--no-print-directory", "-C", str(ROOT / "csrc"), "bench-table"], check=True, stdout=2)
    return ROOT / "csrc" / "build" / "bench_table"


def run(program: Sequence[str], peers: Callable[[], TorchPeers]) -> Samples:
    """Runs the benchmark to its end and answers its turns. CalledProcessError if it fails.

    peers is called at the first turn: where torch has no part, its rows need no memory.
    """
    torch_peers: TorchPeers | None = None
    series: list[Series] = []
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            fields = json.loads(line)
            if "turn" not in fields:
                series.append(parse(line))
                print(f"  {series[-1].measure} {series[-1].variant} {series[-1].keys}", file=sys.stderr)
                continue
            torch_peers = torch_peers or peers()
            torch_peers.measure(fields["turn"], fields["keys"], fields["batches"])
            time.sleep(0.02)  # torch's idle threads spin for a moment
            process.stdin.write("\n")
            process.stdin.flush()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, program)
    return Samples([*series, *(torch_peers.series() if torch_peers else [])])


def sections(text: str) -> str:
    """A list of sections; argparse.ArgumentTypeError for another name, before anything is compiled."""
    unknown = [name for name in text.split(",") if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; use some of {','.join(SECTIONS)}")
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 k rows and short phases: does it run, not how fast")
    parser.add_argument("--rows", type=int, help="rows of the tables (default 2 M, quick 100 k)")
    parser.add_argument("--repetitions", type=int, help="of every measurement (default 7, quick 5)")
    parser.add_argument("--sections", type=sections, help=f"some of {','.join(SECTIONS)}; default all")
    parser.add_argument("--directory", type=Path, default=ROOT / "csrc" / "build", help="for files of the run (4 GB)")
    options = parser.parse_args()
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages for torch too

    rows = options.rows or (100_000 if options.quick else 2_000_000)
    program = [str(build()), *(["--quick"] if options.quick else []), "--turns", "--rows", str(rows)]
    program += ["--directory", str(options.directory)]
    for name in ("repetitions", "sections"):
        if getattr(options, name):
            program += [f"--{name}", str(getattr(options, name))]
    samples = run(program, lambda: TorchPeers(rows))
    console = Console(width=120)
    console.print(table(samples))
    console.print(ratio_table(samples))
    print("RESULT " + json.dumps(result(samples)))


if __name__ == "__main__":
    main()
