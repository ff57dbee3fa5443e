"""Stochastic length on MovieLens-1M: how much training does not read, and what that costs.

    python -m model.experiments.stochastic_length_bench --data path/to/ml-1m [--epochs 30] [--alphas 1.6,1.7,1.8,1.9,2]

HSTU base, trained for the same number of passes with each alpha (arXiv 2402.17152, equation 4, N = 200) and, at the
smallest alpha, with each way to choose the subsequence; measured on whole histories, as in ml1m. Sparsity as in the
paper's table: the share of N that training does not read, and beside it the share of what is there. What all rows share
is in configs/stochastic-length/hstu.toml. Candidates as in ml1m: the catalogue minus the user's training and validation
items. Prints a Markdown table; the last line is `RESULT {json}`. A run with the default settings puts its table into
docs/experiments.md and its plot into docs/images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from model.events import EVENT_DTYPES, UserEvents
from model.experiments import command
from model.experiments.last_run import Benchmark
from model.experiments.ml1m_data import Histories, read_histories
from model.experiments.ml1m_train import Metrics, RunConfig, evaluate, make_optimizer, train_epoch
from model.experiments.run_configs import ALL_CONFIGS, read_config
from model.sequential import NextItem
from model.stochastic_length import SELECTIONS, StochasticLength

CONFIG = ALL_CONFIGS / "stochastic-length" / "hstu.toml"
BENCHMARK = Benchmark(
    "bench-stochastic-length",
    "model.experiments.stochastic_length_bench",
    "stochastic_length.png",
    ("config", "epochs", "alphas"),
)


class Entry(BaseModel):
    """The file of configs/stochastic-length: what all rows of the table share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(description="What is trained")
    limit: int = Field(default=200, ge=1, description="N of the rule: items of a history that training reads at most")
    run: RunConfig = Field(description="How each row is trained; all `epochs` of it, whatever `patience`")


@dataclass(frozen=True)
class Outcome:
    """One row: what was read and what came of it. Seconds: the median of a pass, without evaluation."""

    alpha: float
    selection: str
    sparsity: float
    unread: float
    seconds: float
    test: Metrics


def shortened(data: Histories, rule: StochasticLength, epoch: int) -> Histories:
    """What this pass reads: training items by the rule; the two held-out items stay."""
    users = [_events(u, data.items[u][:-2], data.times[u][:-2]) for u in range(len(data))]
    kept = rule.cut_all(users, epoch, keep_new=False)
    items = [np.r_[cut.item_id, own[-2:]] for cut, own in zip(kept, data.items, strict=True)]
    times = [np.r_[cut.timestamp, own[-2:]] for cut, own in zip(kept, data.times, strict=True)]
    return Histories(items, times, data.catalogue)


def _events(user: int, items: np.ndarray, times: np.ndarray) -> UserEvents:
    arrays = {name: np.zeros(len(items), dtype=dtype) for name, dtype in EVENT_DTYPES.items()}
    none = {name: np.zeros(0, dtype=d) for name, d in EVENT_DTYPES.items() if name.startswith(("action_", "aux_"))}
    return UserEvents(user_id=user, new_from=0, **(arrays | none | {"item_id": items, "timestamp": times}))


def measure(data: Histories, config: RunConfig, rule: StochasticLength) -> Outcome:
    """Train `epochs` passes with one rule, then test."""
    torch.manual_seed(config.seed)
    model = NextItem(config.network(len(data.catalogue)))
    optimizer = make_optimizer(model, config)
    seconds, read = [], 0
    for epoch in range(config.epochs):
        part = shortened(data, rule, epoch)
        start = time.perf_counter()
        train_epoch(model, optimizer, part, config, epoch)
        seconds.append(time.perf_counter() - start)
        read += sum(len(items) - 2 for items in part.items)
    there = sum(min(len(items) - 2, rule.limit) for items in data.items) * config.epochs
    return Outcome(
        rule.alpha,
        rule.selection,
        1 - read / (rule.limit * len(data) * config.epochs),
        1 - read / there,
        float(np.median(seconds)),
        evaluate(model, data, held_out=1),
    )


def table(rows: Sequence[Outcome]) -> str:
    """Markdown; the difference is against the row of alpha 2 (nothing left out), empty where there is none."""
    whole = next((row.test["ndcg@10"] for row in rows if row.alpha == 2), None)
    lines = ["| alpha | selection | sparsity | not read of what is there | HR@10 | NDCG@10 | difference | s / pass |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        change = "" if whole is None else f"{row.test['ndcg@10'] / whole - 1:+.1%}"
        lines.append(
            f"| {row.alpha} | {row.selection if row.alpha < 2 else ''} | {row.sparsity:.1%} | {row.unread:.1%} | "
            f"{row.test['hr@10']:.4f} | {row.test['ndcg@10']:.4f} | {change} | {row.seconds:.1f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Outcome], path: Path) -> None:
    """NDCG@10 by the share that is not read."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for selection in SELECTIONS:
        points = [(r.unread * 100, r.test["ndcg@10"]) for r in rows if r.selection == selection]
        axes.plot(*zip(*points, strict=True), "o-", label=selection) if points else None
    axes.set(xlabel="% of the items not read in a pass", ylabel="test NDCG@10", title="Stochastic length, MovieLens-1M")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-1m"), help="folder of MovieLens-1M")
    parser.add_argument("--config", type=Path, default=CONFIG, help="TOML file of what all rows share")
    parser.add_argument("--epochs", type=int, help="passes over the users (default: what the config says)")
    parser.add_argument("--alphas", default="1.6,1.7,1.8,1.9,2", help="in (1, 2]; 2 reads everything")
    parser.add_argument("--threads", type=int, default=2, help="threads of the tensor library")
    BENCHMARK.add_options(parser)
    entry = read_config(parser.parse_args(argv).config, Entry)
    parser.set_defaults(epochs=entry.run.epochs)
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    record = BENCHMARK.record(parser, options, argv)
    torch.set_num_threads(options.threads)
    data = read_histories(options.data)
    config = entry.run.model_copy(update={"epochs": options.epochs})
    alphas = sorted(float(alpha) for alpha in options.alphas.split(","))
    plan = [(alpha, SELECTIONS[0]) for alpha in alphas]
    plan += [(alphas[0], other) for other in SELECTIONS[1:] if alphas[0] < 2]
    rules = [StochasticLength(entry.limit, alpha, selection, config.seed) for alpha, selection in plan]
    console, rows = Console(stderr=True), []
    for rule in rules:
        rows.append(measure(data, config, rule))
        console.print(f"alpha {rule.alpha}, {rule.selection}: NDCG@10 {rows[-1].test['ndcg@10']:.4f}")
    print(table(rows))
    if record.plot:
        plot(rows, record.plot)
    if record.notice:
        print(record.notice)
    result = {
        f"{r.alpha}/{r.selection}": {"sparsity": round(r.sparsity, 4), "unread": round(r.unread, 4)} | r.test
        for r in rows
    }
    print("RESULT " + json.dumps(result | {"epochs": options.epochs}))
    record.write(table(rows), f"{len(data):,} users, {options.epochs} passes, --threads {options.threads}")


if __name__ == "__main__":
    command.run(main)
