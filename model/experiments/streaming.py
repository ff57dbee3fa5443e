"""A growing vocabulary in one pass: Transformer, HSTU with softmax, and HSTU, on the paper's synthetic stream.

    python -m model.experiments.streaming [--only hstu] [--records 10000,3000] [--items 4000] [--seeds 3] [--threads 2]

The recipe is the paper's (streaming_data), scaled down: 4,000 items in 20 categories (200 items each, as there) and
10,000 records of 128, learned in the order of time in one pass, softmax over the items available by then; the last
tenth is the test. A second stream ends after 3,000 records, before any model has learned all. Each file of
configs/streaming is one model; all three have 2 layers, 2 heads of 32, width 64, no relative bias, no dropout and
batches of 16 records. HR over the available items, at every place of the second half of a record: of the test, and on
the way there of every fourth batch before it is learned from, as a share of what is possible (`best_hit_rates`). The
paper does not say its sizes; its order is .0442 / .0617 / .0893 HR@10. Prints a Markdown table of each stream; the last
line is `RESULT {json}`. A run with the default settings puts its table into docs/experiments.md and its plot into
docs/images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import track
from torch import Tensor

from model.experiments import command
from model.experiments.last_run import Benchmark
from model.experiments.run_configs import ALL_CONFIGS, read_config
from model.experiments.streaming_data import Int64s, Reading, StreamShape, best_hit_rates, make_stream
from model.metrics import hit_rate, ranks_of
from model.sequential import ItemHistories, NextItem, SequentialConfig
from model.softmax import catalogue_cross_entropy

CONFIGS = ALL_CONFIGS / "streaming"
ORDER = ("transformer", "hstu-softmax", "hstu")
PAPER = {"Transformer": (0.0442, 0.2025), "HSTU, softmax": (0.0617, 0.2496), "HSTU": (0.0893, 0.3170)}
"""HR@10 and HR@50, by title."""
BENCHMARK = Benchmark(
    "bench-streaming",
    "model.experiments.streaming",
    "streaming.png",
    ("configs", "only", "records", "items", "categories", "length", "reading", "seeds"),
)
CUTS = (10, 50)
RECORDS = [10_000, 3_000]
"""Of each stream."""
MEASURED_EVERY = 4
"""Batches; each measured one is ranked before it is learned from."""
WINDOW = 8
"""Measured batches in a running mean: 512 records of batches of 16."""


class StreamRun(BaseModel):
    """How one model is trained; `model` holds fields of SequentialConfig, those aside that the stream decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, str | bool | int | float] = Field(default_factory=dict, description="Settings of the network")
    batch_records: int = Field(default=16, ge=1, description="Records per step")
    lr: float = Field(default=1e-3, gt=0, description="AdamW learning rate, betas .9 and .98")

    def network(self, shape: StreamShape, seed: int) -> SequentialConfig:
        """The network for a stream: its items, its records' length, which HSTU divides the attention sum by, too."""
        stream = {"items": shape.items, "max_length": shape.length, "normaliser": float(shape.length), "seed": seed}
        return SequentialConfig.model_validate(self.model | stream)


class Entry(BaseModel):
    """One file of configs/streaming."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(description="Row in the table")
    run: StreamRun


def running_mean(shares: Sequence[float]) -> NDArray[np.float64]:
    """Of each WINDOW neighbours; empty if there are fewer."""
    return np.convolve(shares, np.ones(WINDOW) / WINDOW, "valid") if len(shares) >= WINDOW else np.zeros(0)


def half_after(shares: Sequence[float], batch: int) -> int | None:
    """Records, so many per batch, until the running mean first is half of what is possible; None: not in this pass."""
    reached = np.flatnonzero(running_mean(shares) >= 0.5)
    return int(reached[0] + WINDOW) * MEASURED_EVERY * batch if len(reached) else None


def batches(stream: Int64s, start: int, stop: int, batch: int) -> Iterator[tuple[int, ItemHistories, Tensor]]:
    """Number of the last record, histories without their last item, and the items that follow (B, length - 1)."""
    for first in range(start, stop, batch):
        rows = stream[first : min(first + batch, stop)]
        zeros = [np.zeros(rows.shape[1] - 1, np.int64)] * len(rows)  # the stream has no clock
        yield first + len(rows) - 1, ItemHistories.of(list(rows[:, :-1]), zeros, zeros), torch.from_numpy(rows[:, 1:])


def train(
    model: NextItem, stream: Int64s, shape: StreamShape, config: StreamRun, best: Sequence[float], label: str
) -> list[float]:
    """One pass over the training records in the order of time; HR@10 of each measured batch as a share of its best."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    shares: list[float] = []
    plan = list(batches(stream, 0, shape.first_test, config.batch_records))
    for number, (record, histories, wanted) in enumerate(track(plan, description=label, console=Console(stderr=True))):
        vectors, items = model(histories), model.item_vectors()[: shape.available(record)]
        if number % MEASURED_EVERY == 0:
            found = hit_rate(ranks(vectors.detach(), items.detach(), histories, wanted, shape), CUTS[0])
            shares.append(found / best[len(shares)])
        loss = catalogue_cross_entropy(vectors, items, wanted.flatten(), model.config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return shares


def best_on_the_way(stream: Int64s, shape: StreamShape, seed: int, batch: int) -> list[float]:
    """HR@10 that is possible in each measured batch."""
    found = []
    for first in range(0, shape.first_test, MEASURED_EVERY * batch):
        records = range(first, min(first + batch, shape.first_test))
        found.append(best_hit_rates(stream, shape, seed, CUTS[:1], records)[f"hr@{CUTS[0]}"])
    return found


@torch.no_grad()
def test(model: NextItem, stream: Int64s, shape: StreamShape, batch: int) -> dict[str, float]:
    """hr@10 and hr@50 of the last tenth."""
    model.eval()
    found = []
    for record, histories, wanted in batches(stream, shape.first_test, shape.records, batch):
        items = model.item_vectors()[: shape.available(record)]
        found.append(ranks(model(histories), items, histories, wanted, shape))
    return {f"hr@{k}": hit_rate(np.concatenate(found), k) for k in CUTS}


def ranks(
    vectors: Tensor, items: Tensor, histories: ItemHistories, wanted: Tensor, shape: StreamShape
) -> NDArray[np.int64]:
    """Ranks from 1 of what is wanted in the second half of each record; equal scores count against it.

    vectors (B * places, dim), items (available, dim), wanted (B, places).
    """
    late = shape.length // 2
    scores = vectors.unflatten(0, wanted.shape)[:, late:].flatten(0, 1) @ items.T
    own = scores.gather(1, wanted[:, late:].reshape(-1, 1))
    if shape.reading == "distinct":
        scores.masked_fill_(_had(histories, wanted.shape, late, len(items)), float("-inf"))
        scores.scatter_(1, wanted[:, late:].reshape(-1, 1), own)  # of a category that has run out
    return ranks_of(scores, own.squeeze(1))


def _had(histories: ItemHistories, shape: torch.Size, late: int, items: int) -> Tensor:
    """(B * places, items) bool: what a record has had up to each place from `late` on."""
    item = histories.item.unflatten(0, shape)
    had = torch.zeros(len(item), shape[1] - late, items, dtype=torch.bool)
    for place in range(shape[1]):
        had[torch.arange(len(item)), max(place - late, 0), item[:, place]] = True
    return (had.cumsum(1) > 0).flatten(0, 1)


def run(entries: Sequence[Entry], shape: StreamShape, seed: int) -> tuple[pd.DataFrame, dict[str, list[float]]]:
    """The models on the stream of that seed: a row each (hr@10, hr@50, best.., half_after), and shares by title."""
    stream = make_stream(shape, seed)
    on_the_way = {b: best_on_the_way(stream, shape, seed, b) for b in {e.run.batch_records for e in entries}}
    possible = {f"best {cut}": rate for cut, rate in best_hit_rates(stream, shape, seed, CUTS).items()}
    rows, shares = [], {}
    for title, config in ((entry.title, entry.run) for entry in entries):
        batch = config.batch_records
        model = NextItem(config.network(shape, seed))
        shares[title] = train(model, stream, shape, config, on_the_way[batch], f"{title}, seed {seed}")
        rows.append(
            {"model": title, "seed": seed, "half_after": half_after(shares[title], batch)}
            | test(model, stream, shape, batch)
            | possible
        )
    return pd.DataFrame(rows), shares


def table(found: pd.DataFrame) -> str:
    """Markdown, means over the seeds: each model, its ratio to the first, and the paper's where it has the model."""
    lines = [
        "| model | HR@10 | HR@50 | ratio of HR@10 | half of the best after, records | paper HR@10 | HR@50 | ratio |",
        "|---" * 8 + "|",
    ]
    first = found["model"].iloc[0]
    base = found["hr@10"][found["model"] == first].mean()
    for name, own in found.groupby("model", sort=False):
        after = ", ".join("never" if np.isnan(v) else f"{v:,.0f}" for v in own["half_after"].astype(float))
        paper = [f"{rate:.4f}" for rate in PAPER.get(name, ())] or ["", ""]
        paper.append(f"{PAPER[name][0] / PAPER[first][0]:.2f}" if name in PAPER and first in PAPER else "")
        lines.append(
            f"| {name} | {spread(own['hr@10'])} | {spread(own['hr@50'])} | {own['hr@10'].mean() / base:.2f} | {after} "
            f"| {' | '.join(paper)} |"
        )
    return "\n".join(lines)


def spread(values: pd.Series) -> str:
    """Mean and, of several, the standard deviation."""
    return f"{values.mean():.4f}" + (f" ± {values.std():.4f}" if len(values) > 1 else "")


def plot(entries: Sequence[Entry], shares: dict[str, list[float]], path: Path) -> None:
    """HR@10 along the stream as a share of what is possible, in running means. shares: by title."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for entry in entries:
        means = running_mean(shares[entry.title])
        records = (np.arange(len(means)) + WINDOW) * MEASURED_EVERY * entry.run.batch_records
        axes.plot(records, means, label=entry.title)
    axes.set(xlabel="record", ylabel="HR@10 / best possible", title="A growing vocabulary, one pass", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def lengths(text: str) -> list[int]:
    """How many records the streams have; argparse.ArgumentTypeError for anything but a list of numbers above 0."""
    found = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if not all(found):
        usual = ",".join(map(str, RECORDS))
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of records; write {usual}")
    return found


def report(found: pd.DataFrame, shape: StreamShape) -> str:
    """The table of one stream, headed by its length and followed by what is possible."""
    best = ", ".join(f"hr@{k} {found[f'best hr@{k}'].mean():.4f}" for k in CUTS)
    return f"{shape.records:,} records:\n\n{table(found)}\n\nBest possible: {best}"


def ratios(found: pd.DataFrame) -> dict[str, float]:
    """HR@10 by title over that of the first model, of means over the seeds."""
    means = found.groupby("model", sort=False)["hr@10"].mean()
    return {str(title): round(float(ratio), 3) for title, ratio in (means / means.iloc[0]).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = StreamShape()
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of TOML files, one per model")
    parser.add_argument("--only", default=",".join(ORDER), help="names of the models to run")
    parser.add_argument("--records", type=lengths, default=RECORDS, help="of each stream; the first one is plotted")
    parser.add_argument("--items", type=int, default=shape.items)
    parser.add_argument("--categories", type=int, default=shape.categories)
    parser.add_argument("--length", type=int, default=shape.length)
    parser.add_argument("--reading", choices=get_args(Reading), default=shape.reading, help="see streaming_data")
    parser.add_argument("--seeds", type=int, default=3, help="streams and initial weights of the seeds 0, 1, ...")
    parser.add_argument("--threads", type=int, default=2, help="threads of the tensor library")
    BENCHMARK.add_options(parser)
    options = parser.parse_args(argv)
    record = BENCHMARK.record(parser, options, argv)
    torch.set_num_threads(options.threads)
    entries = [read_config(options.configs / f"{name}.toml", Entry) for name in options.only.split(",")]
    shapes = [
        StreamShape(options.items, options.categories, records, options.length, reading=options.reading)
        for records in options.records
    ]
    streams, reports = [], []
    for shape in shapes:
        runs = [run(entries, shape, seed) for seed in range(options.seeds)]
        streams.append(pd.concat([rows for rows, _ in runs]).assign(records=shape.records))
        reports.append(report(streams[-1], shape))
        print(reports[-1] + "\n")
        if record.plot and shape is shapes[0]:
            plot(entries, runs[0][1], record.plot)
    if record.notice:
        print(record.notice)
    result = {
        "ratios": {str(shape.records): ratios(found) for shape, found in zip(shapes, streams, strict=True)},
        "runs": json.loads(pd.concat(streams).to_json(orient="records")),
        "shapes": [vars(shape) for shape in shapes],
    }
    print("RESULT " + json.dumps(result))
    record.write("\n\n".join(reports), f"--seeds {options.seeds}, --threads {options.threads}")


if __name__ == "__main__":
    command.run(main)
