"""Tables, plot and figures of the MovieLens-1M experiment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from model.experiments.ml1m_train import CUTS, RunResult

METRICS = tuple(f"{name}@{k}" for k in CUTS for name in ("hr", "ndcg"))
TITLES = {"hstu": "RecTools HSTU 2x1", "hstu-large": "RecTools HSTU-large 8x2", "sasrec": "RecTools SASRec 2x1"}
QUOTED_SECONDS = {"hstu": 24.0, "sasrec": 26.0, "hstu-large": 46.5}
"""RecTools 0.19 on 2,999 users, batches of 32, softmax over the catalogue, 2 threads of a 2-core machine."""
QUOTED_QUALITY = {
    "hstu": {"hr@10": 0.314, "ndcg@10": 0.182, "hr@50": 0.557, "hr@200": 0.758},
    "sasrec": {"hr@10": 0.268, "ndcg@10": 0.156},
}
"""RecTools 0.19 on the same users and split, candidates minus training and validation items, one seed."""


def table(rows: dict[str, list[RunResult]], theirs: dict[str, RunResult]) -> str:
    """Markdown: test metrics per model, the mean over seeds and, where there are several, their standard deviation.

    rows: ours by title; theirs: RecTools' by name of our config, quoted where they were not measured.
    """
    heads = ["model", "seeds", "best epoch", *(name.upper() for name in METRICS), "s / epoch", "events / s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    rows = rows | {TITLES[name]: [result] for name, result in theirs.items()}
    for name, results in rows.items():
        if not results:
            continue
        cells = [name, str(len(results)), ", ".join(str(r.best_epoch) for r in results)]
        cells += [_spread([r.test[metric] for r in results]) for metric in METRICS]
        cells += [f"{_mean([r.seconds_per_epoch for r in results]):.1f}"]
        cells += [f"{_mean([r.events_per_second for r in results]):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for name, metrics in QUOTED_QUALITY.items():
        if name not in theirs:
            quoted = [_short(metrics[metric]) if metric in metrics else "" for metric in METRICS]
            lines.append("| " + " | ".join([f"{TITLES[name]}, quoted", "1", "", *quoted, "", ""]) + " |")
    return "\n".join(lines)


def speed(found: dict[str, list[RunResult]], theirs: dict[str, RunResult]) -> str:
    """Markdown: seconds per epoch beside RecTools', measured here or quoted."""
    lines = ["| model | ours | RecTools | ratio | |", "|---|---|---|---|---|"]
    for name, ratio in ratios(found, theirs).items():
        ours = _mean([r.seconds_per_epoch for r in found[name]])
        source = "same run" if name in theirs else "quoted, 2 threads"
        lines.append(f"| {name} | {ours:.1f} s | {ours * ratio:.1f} s | {ratio:.1f} x | {source} |")
    return "\n".join(lines)


def ratios(found: dict[str, list[RunResult]], theirs: dict[str, RunResult]) -> dict[str, float]:
    """Their seconds per epoch over ours, by name."""
    known = QUOTED_SECONDS | {name: result.seconds_per_epoch for name, result in theirs.items()}
    return {
        name: known[name] / _mean([r.seconds_per_epoch for r in results])
        for name, results in found.items()
        if results and name in known
    }


def figures(found: dict[str, list[RunResult]], theirs: dict[str, RunResult]) -> dict[str, float]:
    """'<model>/<metric>' and 'rectools-<model>/<metric>': the test, mean over seeds; '<model>/epoch_ratio'.

    With RecTools, 'best/ndcg@10_gain' and 'best/ndcg@10_ratio': of our best model over its best one.
    """
    rows = found | {f"rectools-{name}": [result] for name, result in theirs.items()}
    out = {f"{name}/{m}": round(_mean([r.test[m] for r in rs]), 4) for name, rs in rows.items() if rs for m in METRICS}
    out |= {f"{name}/epoch_ratio": round(ratio, 2) for name, ratio in ratios(found, theirs).items()}
    if not theirs:
        return out
    ours = max(_mean([r.test["ndcg@10"] for r in results]) for results in found.values() if results)
    best = max(result.test["ndcg@10"] for result in theirs.values())
    return out | {"best/ndcg@10_gain": round(ours - best, 4), "best/ndcg@10_ratio": round(ours / best, 3)}


def plot(logs: dict[str, Path], path: Path) -> None:
    """Validation NDCG@10 by epoch, one line per model (its first seed)."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for title, log in logs.items():
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [row for row in rows if "epoch" in row]
        axes.plot([row["epoch"] for row in rows], [row["ndcg@10"] for row in rows], label=title)
    axes.set(xlabel="epoch", ylabel="validation NDCG@10", title="MovieLens-1M, whole catalogue minus training items")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _spread(values: list[float]) -> str:
    mean = _short(_mean(values))
    return f"{mean} ± {_short(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean
