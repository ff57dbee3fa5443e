"""A growing vocabulary in one pass: Transformer, HSTU with softmax, and HSTU, on the paper's synthetic stream.

    python -m model.experiments.streaming [--records 20000] [--items 4000] [--seed 0] [--threads 2]

The recipe is the paper's (streaming_data), scaled down: 4,000 items in 20 categories (200 items each, as there) and
20,000 records of 128, learned in the order of time in one pass of batches of 16 records, softmax over the items
available by then; the last tenth is the test. All three have 2 layers, 2 heads of 32, width 64, no relative bias and no
dropout. HR over the available items, at every place of the second half of a test record. The paper does not say its
sizes; its order is .0442 / .0617 / .0893 HR@10. The last line is `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from model.experiments.streaming_data import Int64s, Reading, StreamShape, best_hit_rates, make_stream
from model.losses import catalogue_cross_entropy
from model.metrics import hit_rate
from model.sequential import ItemHistories, NextItem, SequentialConfig

MODELS: dict[str, dict[str, str | bool]] = {
    "Transformer": {"encoder": "sasrec"},
    "HSTU, softmax": {"encoder": "hstu", "softmax": True},
    "HSTU": {"encoder": "hstu"},
}
PAPER = {"Transformer": (0.0442, 0.2025), "HSTU, softmax": (0.0617, 0.2496), "HSTU": (0.0893, 0.3170)}
BATCH = 16
CUTS = (10, 50)


def make_model(name: str, shape: StreamShape, seed: int) -> NextItem:
    """One of MODELS."""
    config: dict[str, str | bool | float] = {
        "items": shape.items, "max_length": shape.length, "dim": 64, "layers": 2, "heads": 2, "head_dim": 32,
        "normaliser": float(shape.length), "bias": "none", "dropout": 0.0, "input_dropout": 0.0, "seed": seed,
    }  # fmt: skip
    return NextItem(SequentialConfig.model_validate(config | MODELS[name]))


def batches(stream: Int64s, start: int, stop: int) -> Iterator[tuple[int, ItemHistories, Tensor]]:
    """Number of the last record, histories without their last item, and the items that follow (B, length - 1)."""
    for first in range(start, stop, BATCH):
        rows = stream[first : min(first + BATCH, stop)]
        zeros = [np.zeros(rows.shape[1] - 1, np.int64)] * len(rows)  # the stream has no clock
        yield first + len(rows) - 1, ItemHistories.of(list(rows[:, :-1]), zeros, zeros), torch.from_numpy(rows[:, 1:])


def train(model: NextItem, stream: Int64s, shape: StreamShape, label: str) -> list[float]:
    """One pass over the training records in the order of time; the loss of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    losses = []
    plan = list(batches(stream, 0, shape.first_test))
    for record, histories, wanted in track(plan, description=label, console=Console(stderr=True)):
        items = model.item_vectors()[: shape.available(record)]
        loss = catalogue_cross_entropy(model(histories), items, wanted.flatten(), model.config.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def test(model: NextItem, stream: Int64s, shape: StreamShape) -> dict[str, float]:
    """hr@10 and hr@50; equal scores count against the target."""
    model.eval()
    ranks: list[NDArray[np.int64]] = []
    for record, histories, wanted in batches(stream, shape.first_test, shape.records):
        late = shape.length // 2
        vectors = model(histories).unflatten(0, wanted.shape)[:, late:].flatten(0, 1)
        scores = vectors @ model.item_vectors()[: shape.available(record)].T
        own = scores.gather(1, wanted[:, late:].reshape(-1, 1))
        if shape.reading == "distinct":
            scores.masked_fill_(_had(histories, wanted.shape, late, scores.shape[1]), float("-inf"))
            scores.scatter_(1, wanted[:, late:].reshape(-1, 1), own)  # of a category that has run out
        ranks.append((scores >= own).sum(1).numpy())
    found = np.concatenate(ranks)
    return {f"hr@{k}": hit_rate(found, k) for k in CUTS}


def _had(histories: ItemHistories, shape: torch.Size, late: int, items: int) -> Tensor:
    """(B * places, items) bool: what a record has had up to each place from `late` on."""
    item = histories.item.unflatten(0, shape)
    had = torch.zeros(len(item), shape[1] - late, items, dtype=torch.bool)
    for place in range(shape[1]):
        had[torch.arange(len(item)), max(place - late, 0), item[:, place]] = True
    return (had.cumsum(1) > 0).flatten(0, 1)


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: each model, its ratio to the first, and the paper's."""
    lines = ["| model | HR@10 | HR@50 | ratio of HR@10 | paper HR@10 | HR@50 | ratio |", "|---" * 7 + "|"]
    base, paper = next(iter(found.values()))["hr@10"], PAPER["Transformer"][0]
    for name, metrics in found.items():
        ours = f"{metrics['hr@10']:.4f} | {metrics['hr@50']:.4f} | {metrics['hr@10'] / base:.2f}"
        theirs = f"{PAPER[name][0]:.4f} | {PAPER[name][1]:.4f} | {PAPER[name][0] / paper:.2f}"
        lines.append(f"| {name} | {ours} | {theirs} |")
    return "\n".join(lines)


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Training loss along the stream, in means of 50 batches."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in losses.items():
        means = [float(np.mean(values[i : i + 50])) for i in range(0, len(values), 50)]
        axes.plot(np.arange(len(means)) * 50 * BATCH, means, label=name)
    axes.set(xlabel="record", ylabel="loss of the next item (nats)", title="A growing vocabulary, one pass")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = StreamShape()
    parser.add_argument("--records", type=int, default=shape.records)
    parser.add_argument("--items", type=int, default=shape.items)
    parser.add_argument("--categories", type=int, default=shape.categories)
    parser.add_argument("--length", type=int, default=shape.length)
    parser.add_argument("--reading", choices=get_args(Reading), default=shape.reading, help="see streaming_data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of the tensor library")
    parser.add_argument("--plot", type=Path, help="picture of the losses to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    shape = StreamShape(options.items, options.categories, options.records, options.length, reading=options.reading)
    stream = make_stream(shape, options.seed)
    losses, found = {}, {}
    for name in MODELS:
        model = make_model(name, shape, options.seed)
        losses[name] = train(model, stream, shape, name)
        found[name] = test(model, stream, shape)
    best = best_hit_rates(stream, shape, options.seed, CUTS)
    print(table(found))
    print("\nBest possible: " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))
    if options.plot:
        plot(losses, options.plot)
    ratios = {name: round(m["hr@10"] / found["Transformer"]["hr@10"], 3) for name, m in found.items()}
    print(
        "RESULT " + json.dumps({"hr": found, "best": best, "ratio": ratios, "shape": vars(shape), "seed": options.seed})
    )


if __name__ == "__main__":
    main()
