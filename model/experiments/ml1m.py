"""MovieLens-1M, next item: SASRec, HSTU base and large, and HSTU without parts of its bias; leave-one-out.

    python -m model.experiments.ml1m --data path/to/ml-1m [--only hstu,sasrec] [--seeds 3] [--threads 2] [--rectools]

Order: by timestamp, then by the file. Last item of a user = test, the one before = validation, the rest = training.
Early stopping on validation NDCG@10; the best epoch's weights are tested once. In the test the history has the
validation item, and the target's timestamp is known to HSTU. Candidates: the whole catalogue minus the user's training
and validation items (in validation: minus the training items).

Each file of configs/ml1m is one model. Runs leave a log each under --logs, and finished ones of the same settings, data
and threads are read from there: an interrupted command goes on where it was. With --rectools the library RecTools is
installed into an environment of its own there, and its models of the same sizes are trained, stopped and tested in the
same way (one seed each; they go on after their last epoch where they were interrupted). Prints Markdown tables; the
last line is `RESULT {json}`. A run of all models and seeds puts its tables into docs/experiments.md and validation
NDCG@10 by epoch into docs/images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from model.experiments import command
from model.experiments import ml1m_report as report
from model.experiments.last_run import Benchmark
from model.experiments.ml1m_data import Histories, read_histories
from model.experiments.ml1m_rectools import measure
from model.experiments.ml1m_train import RunConfig, RunResult, logged_run
from model.experiments.run_configs import ALL_CONFIGS, read_config

CONFIGS = ALL_CONFIGS / "ml1m"
ORDER = ("hstu", "hstu-large", "sasrec", "hstu-time", "hstu-position", "hstu-none", "hstu-sampled")
BENCHMARK = Benchmark("bench-ml1m", "model.experiments.ml1m", "ml1m.png", ("configs", "only", "seeds"))


class Entry(BaseModel):
    """One file of configs/ml1m."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(description="Row in the table")
    seeds: int = Field(default=1, ge=1, description="Runs of it, where the command line allows as many")
    run: RunConfig


def read_entry(path: Path) -> Entry:
    """Raises BadInput for a file that is absent or no entry."""
    return read_config(path, Entry)


def run_all(
    data: Histories, entries: dict[str, Entry], seeds: int, logs: Path, console: Console
) -> dict[str, list[RunResult]]:
    """Results by name, one per seed. The first seed of every model comes before the second of any."""
    found: dict[str, list[RunResult]] = {name: [] for name in entries}
    for seed in range(seeds):
        for name, entry in entries.items():
            if seed >= entry.seeds:
                continue
            config = entry.run.model_copy(update={"seed": seed})
            result = logged_run(data, config, logs / f"{name}-seed{seed}.jsonl")
            found[name].append(result)
            console.print(f"{name} seed {seed}: NDCG@10 {result.test['ndcg@10']:.4f}, best epoch {result.best_epoch}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-1m"), help="folder of MovieLens-1M")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of TOML files, one per model")
    parser.add_argument("--only", default=",".join(ORDER), help="names of the models to run")
    parser.add_argument("--seeds", type=int, default=3, help="runs per model, no more than its config says")
    parser.add_argument("--threads", type=int, default=2, help="threads of the tensor library")
    parser.add_argument("--logs", type=Path, default=Path(".freshet/bench-ml1m"), help="folder of the logs")
    parser.add_argument("--rectools", action="store_true", help="train and test RecTools too (installs it)")
    BENCHMARK.add_options(parser)
    options = parser.parse_args(argv)
    record = BENCHMARK.record(parser, options, argv)
    torch.set_num_threads(options.threads)
    data = read_histories(options.data)
    entries = {name: read_entry(options.configs / f"{name}.toml") for name in options.only.split(",")}
    found = run_all(data, entries, options.seeds, options.logs, Console(stderr=True))
    configs = {name: entry.run for name, entry in entries.items()} if options.rectools else {}
    theirs = measure(data, configs, options.logs, options.threads)
    tables = report.table({entries[name].title: results for name, results in found.items()}, theirs)
    tables += "\n\n" + report.speed(found, theirs)
    print(tables)
    if record.plot:
        report.plot({entries[name].title: options.logs / f"{name}-seed0.jsonl" for name in found}, record.plot)
    if record.notice:
        print(record.notice)
    print("RESULT " + json.dumps(report.figures(found, theirs) | {"users": len(data), "threads": options.threads}))
    record.write(tables, f"{len(data):,} users, --threads {options.threads}")


if __name__ == "__main__":
    command.run(main)
