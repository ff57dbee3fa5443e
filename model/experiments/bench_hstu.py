"""HSTU beside a faithful padded PyTorch reference: training steps, attention, memory, ranking, full softmax.

    python -m model.experiments.bench_hstu [--threads 1] [--sections step,attention,ranking,softmax] [--repetitions 7]

Shapes of MovieLens-1M: 128 users, padded length 211, lengths uniform in 20..200, 3,952 items; all in float32 and with
the same threads, in one run. A step is forward, loss, backward and AdamW, with dropout. The reference is
bench_hstu_reference; its loss and gradients are compared with ours before anything is timed.

step_base, step_large: both sides with the softmax over the whole catalogue; the reference makes all logits at once, as
torch's cross_entropy takes them. step_*_sampled: both sides with the published 128 negatives per position, of which the
reference gathers the vectors, as published. full_vs_sampled: our step with the published sampled loss over our step
with the full softmax; full_vs_sampled_kernel: the same for the sampled loss by our kernel. The NDCG@10 on MovieLens-1M
(--data) of both after as many epochs, and of the full one after as much time as the published one takes, stand beside
them (bench-ml1m has both after early stopping). Ratios are reference over ours: the median over the repetitions of the
ratio within each, `medians` their milliseconds. The last line is `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from components.errors import FreshetError
from model.experiments import bench_hstu_attention, bench_hstu_ranking, command
from model.experiments.bench_hstu_reference import gathered_loss, our_loss, reference_loss
from model.experiments.bench_hstu_timing import Figure, paired
from model.experiments.ml1m_data import Histories, read_histories
from model.experiments.ml1m_train import RunConfig, evaluate, make_optimizer, train_epoch
from model.sequential import ItemHistories, NextItem, SequentialConfig

USERS, PADDED, SHORTEST, LONGEST, ITEMS, NEGATIVES = 128, 211, 20, 200, 3952, 128
SIZES: dict[str, dict[str, int]] = {
    "base": {"layers": 2, "heads": 1, "head_dim": 50},
    "large": {"layers": 8, "heads": 2, "head_dim": 25},
}
Loss = Callable[[NextItem, ItemHistories, Tensor, Tensor | None], Tensor]
SECTIONS = ("step", "attention", "ranking", "softmax")
TARGETS = {
    "step_base": 4, "step_large": 4, "attention_256": 4, "attention_1024": 6, "attention_4096": 8, "memory_4096": 20,
    "rank_vs_chunks": 2, "rank_vs_single": 50, "full_vs_sampled": 1,
}  # fmt: skip
TOLERANCE = 1e-3
"""Of a gradient, relative to its largest entry: the shared norms divide by the small spread of early attention."""


@dataclass(frozen=True)
class StepProblem:
    """A batch: wanted (T,) the next items, drawn (T, S) the negatives of each position."""

    batch: ItemHistories
    wanted: Tensor
    drawn: Tensor


def make_step(users: int = USERS, seed: int = 0) -> StepProblem:
    """Random users with sessions of about an hour over months, as rating logs have."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (users,), generator=g)
    gaps = torch.exp(torch.rand(int(lengths.sum()) + users, generator=g) * 11).long()  # 1 second to 17 hours
    times = [1_000_000_000 + own.cumsum(0) for own in gaps.split((lengths + 1).tolist())]
    item, wanted = torch.randint(ITEMS, (2, int(lengths.sum())), generator=g)
    batch = ItemHistories(item, torch.cat([t[:-1] for t in times]), torch.cat([t[1:] for t in times]), lengths)
    return StepProblem(batch, wanted, torch.randint(ITEMS, (len(item), NEGATIVES), generator=g))


def make_model(size: str) -> NextItem:
    """The published network of this size."""
    return NextItem(SequentialConfig(items=ITEMS, max_length=PADDED, normaliser=PADDED, **SIZES[size]))


def check_equal(size: str, problem: StepProblem) -> None:
    """Raise FreshetError unless both sides have the same loss and gradients, with either softmax and no dropout."""
    model = make_model(size).eval()
    for drawn in (None, problem.drawn):
        model.zero_grad()
        want = reference_loss(model, problem.batch, problem.wanted, drawn, torch.float64)
        want.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        got = our_loss(model, problem.batch, problem.wanted, drawn)
        got.backward()
        errors = {"loss": abs(got.item() / want.item() - 1)}
        for name, p in model.named_parameters():
            assert p.grad is not None
            errors[name] = float((p.grad - gradients[name]).abs().max() / gradients[name].abs().max())
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] < TOLERANCE:
            raise FreshetError(f"the two {size} steps disagree: {worst} is off by {errors[worst]:.1e}")


def steps(repetitions: int) -> list[Figure]:
    """step_base, step_large, and both with sampled softmax."""
    problem, found = make_step(), []
    for size in SIZES:
        check_equal(size, problem)
        model = make_model(size).train()
        optimizer = make_optimizer(model, RunConfig())
        for suffix, drawn in (("", None), ("_sampled", problem.drawn)):
            turns = [partial(_step, loss, model, optimizer, problem, drawn) for loss in (reference_loss, our_loss)]
            found.append(paired(f"step_{size}{suffix}", turns[0], turns[1], repetitions))
    return found


def _step(
    loss: Loss, model: NextItem, optimizer: torch.optim.Optimizer, problem: StepProblem, drawn: Tensor | None
) -> None:
    optimizer.zero_grad()
    loss(model, problem.batch, problem.wanted, drawn).backward()
    optimizer.step()


def full_softmax(repetitions: int) -> list[Figure]:
    """Base steps of ours, the sampled loss over the full one; drawing the negatives is part of the sampled step."""
    problem, model = make_step(), make_model("base").train()
    optimizer = make_optimizer(model, RunConfig())

    def sampled(loss: Loss) -> None:
        _step(loss, model, optimizer, problem, torch.randint(ITEMS, problem.drawn.shape))

    full = partial(_step, our_loss, model, optimizer, problem, None)
    return [
        paired("full_vs_sampled", partial(sampled, gathered_loss), full, repetitions),
        paired("full_vs_sampled_kernel", partial(sampled, our_loss), full, repetitions),
    ]


def softmax_quality(data: Histories, epochs: int, ratio: float) -> dict[str, float]:
    """Validation NDCG@10 of HSTU base on MovieLens-1M, 32 users a step, one seed: with each softmax after `epochs`
    passes, and with the full one after `ratio` times as many, which take as long as the published sampled ones."""
    found: dict[str, float] = {}
    for names, negatives in ((("full", "full_same_time"), 0), (("sampled",), NEGATIVES)):
        config = RunConfig(model={"negatives": negatives}, batch_users=32)
        torch.manual_seed(config.seed)
        model = NextItem(config.network(len(data.catalogue)))
        optimizer = make_optimizer(model, config)
        done = 0
        for name in names:
            last = max(round(epochs * ratio), epochs) if name == "full_same_time" else epochs
            for epoch in range(done, last):
                train_epoch(model, optimizer, data, config, epoch)
            done = last
            found[f"ndcg_{name}"] = round(evaluate(model, data, held_out=2)["ndcg@10"], 4)
    return found


def table(ratios: dict[str, float], medians: dict[str, list[float]]) -> Table:
    """What was measured, beside what is wanted."""
    out = Table("figure", "reference", "ours", "ratio", "at least", title="HSTU on the CPU")
    for name, ratio in ratios.items():
        times = [f"{value:.0f} ms" for value in medians[name]] if name in medians else ["", ""]
        wanted = TARGETS.get(name)
        met = "" if wanted is None else f"{wanted} {'met' if ratio >= wanted else 'MISSED'}"
        out.add_row(name, *times, f"{ratio:.2f}", met)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which parts to run")
    parser.add_argument("--repetitions", type=int, default=7, help="of each measurement")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ml-1m"), help="folder of MovieLens-1M")
    parser.add_argument(
        "--epochs", type=int, default=5, help="passes before the NDCG of both softmaxes; 0 = none, needs no data"
    )
    options = parser.parse_args(argv)
    wanted = options.sections.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"unknown sections {', '.join(unknown)}; known are {', '.join(SECTIONS)}")
    # Read before minutes of timing, which would be lost.
    data = read_histories(options.data) if "softmax" in wanted and options.epochs else None
    torch.set_num_threads(options.threads)
    figures: list[Figure] = []
    others: dict[str, float] = {}
    if "step" in wanted:
        figures += steps(options.repetitions)
    if "attention" in wanted:
        others |= bench_hstu_attention.figures([256, 1024, 4096], options.threads, Console(stderr=True))
    if "ranking" in wanted:
        figures += bench_hstu_ranking.measure(options.repetitions)
    quality: dict[str, float] = {}
    if "softmax" in wanted:
        published, kernel = full_softmax(options.repetitions)
        figures += [published, kernel]
        quality = softmax_quality(data, options.epochs, published.ratio) if data else {}
    ratios = {f.name: round(f.ratio, 2) for f in figures} | others
    medians = {f.name: [round(f.reference_ms, 1), round(f.ours_ms, 1)] for f in figures}
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table(ratios, medians))
    if quality:
        console.print(f"NDCG@10, sampled for {options.epochs} epochs: {quality}")
    print("RESULT " + json.dumps(ratios | quality | {"medians": medians, "threads": options.threads}))


if __name__ == "__main__":
    command.run(main)
