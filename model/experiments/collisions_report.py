"""The experiment's tables (Markdown by rich), its plot and its figures by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich import box
from rich.table import Table

from model.experiments.collisions_runs import Arm, Kept, Table1

ARM_NAMES = {0: "collisionless", 1: "hashed, 1 x the paper's rates", 2: "hashed, 2 x", 4: "hashed, 4 x"}
Row = TypeVar("Row")


@dataclass(frozen=True)
class Rule:
    """What decides which ids keep a row."""

    name: str
    label: Callable[[int], str]


THRESHOLD = Rule("admission threshold (occurrences)", str)
TIME_TO_LIVE = Rule("time to live (days)", lambda days: str(days or "for ever"))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    spread: float  # standard deviation over seeds, n - 1
    error: float  # standard error of the mean

    @classmethod
    def of(cls, values: ArrayLike) -> Estimate:
        """values [seeds], at least two."""
        x = np.asarray(values, dtype=np.float64)
        spread = float(x.std(ddof=1))
        return cls(float(x.mean()), spread, spread / math.sqrt(len(x)))

    def plain(self) -> str:
        """With its spread."""
        return f"{self.mean:.4f} ({self.spread:.4f})"

    def signed(self) -> str:
        """For a difference."""
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def across(seeds: Sequence[dict[int, Row]], key: int, figure: Callable[[Row], float]) -> list[float]:
    """One figure of one arm, by seed."""
    return [figure(seed[key]) for seed in seeds]


def difference(seeds: Sequence[dict[int, Row]], key: int, base: int, figure: Callable[[Row], float]) -> Estimate:
    """Of an arm to the base arm, in pairs of the same seed."""
    return Estimate.of(np.subtract(across(seeds, key, figure), across(seeds, base, figure)))


def first(seeds: Sequence[dict[int, Row]]) -> int:
    """The setting that the others are compared with comes first."""
    return next(iter(seeds[0]))


# Tables


def table_1(columns: dict[str, Table1]) -> Table:
    """The paper's Table 1 with the rows of our table beside it."""
    table = _table("Monolith's Table 1", "", *columns)
    table.add_row("ids", *(f"{c.ids:,}" for c in columns.values()))
    table.add_row("distinct after MD5 % 10^6", *(f"{c.hashed:,}" for c in columns.values()))
    table.add_row("collision rate", *(f"{1 - c.hashed / c.ids:.2%}" for c in columns.values()))
    table.add_row("rows of the collisionless table", *(f"{c.rows:,}" for c in columns.values()))
    return table


def collisions(seeds: Sequence[dict[int, Arm]]) -> Table:
    """Test AUC by arm; affected = test ratings whose user or movie shares its row with another id."""
    table = _table(
        "Collisions (users / movies; ± standard error of the paired difference)", "arm", "collisions", "rows",
        "epochs", "test AUC (sd)", "to collisionless", "affected", "the same on those",
    )  # fmt: skip
    for key in seeds[0]:
        rates = [np.mean(across(seeds, key, f)) for f in (lambda a: a.user_rate, lambda a: a.movie_rate)]
        rows = [np.mean(across(seeds, key, f)) for f in (lambda a: a.user_rows, lambda a: a.movie_rows)]
        against = ["", "", ""]
        if key:
            against = [
                difference(seeds, key, 0, lambda a: a.test_auc).signed(),
                f"{np.mean(across(seeds, key, lambda a: a.affected)):.0%}",
                _affected(seeds, key).signed(),
            ]
        table.add_row(
            ARM_NAMES[key], f"{rates[0]:.2%} / {rates[1]:.2%}", f"{rows[0]:,.0f} / {rows[1]:,.0f}",
            f"{np.mean(across(seeds, key, lambda a: a.best_epoch)):.1f}",
            Estimate.of(across(seeds, key, lambda a: a.test_auc)).plain(), *against,
        )  # fmt: skip
    return table


def kept(seeds: Sequence[dict[int, Kept]], rule: Rule) -> Table:
    """AUC along the stream and memory, by threshold or time to live; the first setting is the base."""
    base = first(seeds)
    against = f"to {rule.label(base)}"
    table = _table(
        f"By {rule.name} (± standard error of the paired difference)", rule.name, "AUC (sd)", against,
        "AUC, last tenth", against, "rows, mean", "rows, peak", "users / movies at the end", "KiB, peak",
    )  # fmt: skip
    for key in seeds[0]:
        cells = [rule.label(key)]
        for figure in (lambda k: k.auc, lambda k: k.tail_auc):
            change = difference(seeds, key, base, figure).signed() if key != base else ""
            cells += [Estimate.of(across(seeds, key, figure)).plain(), change]
        one = seeds[0][key]  # rows depend on the log, not on the seed
        table.add_row(
            *cells, f"{one.mean_rows:,.0f}", f"{one.peak_rows:,}", f"{one.user_rows:,} / {one.movie_rows:,}",
            f"{one.memory_bytes / 1024:,.0f}",
        )  # fmt: skip
    return table


def _affected(seeds: Sequence[dict[int, Arm]], key: int) -> Estimate:
    return Estimate.of([seed[key].affected_auc - seed[key].affected_auc_collisionless for seed in seeds])


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place == 0 else "right")
    return table


# Figures by name


def figures(
    columns: dict[str, Table1],
    hashed: Sequence[dict[int, Arm]],
    admissions: Sequence[dict[int, Kept]],
    expiries: Sequence[dict[int, Kept]],
) -> dict[str, Any]:
    """For the RESULT line. gain = collisionless - hashed, so above 0 collisions cost AUC."""
    result: dict[str, Any] = {f"table_1_{name}": [c.ids, c.hashed, c.rows] for name, c in columns.items()}
    for key in hashed[0]:
        score = Estimate.of(across(hashed, key, lambda a: a.test_auc))
        name = f"hashed_{key}x" if key else "collisionless"
        result |= {f"auc_{name}": score.mean, f"auc_{name}_sd": score.spread}
        if key:
            gain, affected = difference(hashed, key, 0, lambda a: a.test_auc), _affected(hashed, key)
            result |= {f"gain_{key}x": -gain.mean, f"gain_{key}x_se": gain.error}
            result[f"gain_{key}x_by_seed"] = [seed[0].test_auc - seed[key].test_auc for seed in hashed]
            result |= {f"gain_affected_{key}x": -affected.mean, f"gain_affected_{key}x_se": affected.error}
    for name, seeds in (("threshold", admissions), ("ttl_days", expiries)):
        for key in seeds[0]:
            change = difference(seeds, key, first(seeds), lambda k: k.auc)
            result[f"{name}_{key}"] = {
                "auc": float(np.mean(across(seeds, key, lambda k: k.auc))),
                "difference": change.mean,
                "difference_se": change.error,
                "rows_mean": seeds[0][key].mean_rows,
                "rows_end": seeds[0][key].user_rows + seeds[0][key].movie_rows,
                "memory_bytes": seeds[0][key].memory_bytes,
            }
    return result


# Plot


def plot(
    hashed: Sequence[dict[int, Arm]],
    admissions: Sequence[dict[int, Kept]],
    expiries: Sequence[dict[int, Kept]],
    path: Path,
) -> None:
    """Three panels; bars are standard errors over seeds (of paired differences on the left)."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_collisions(left, hashed)
    _plot_kept(middle, admissions, THRESHOLD)
    _plot_kept(right, expiries, TIME_TO_LIVE)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_collisions(axes: Axes, seeds: Sequence[dict[int, Arm]]) -> None:
    keys = [key for key in seeds[0] if key]
    for offset, (label, estimates) in enumerate(
        {
            "all test ratings": [difference(seeds, key, 0, lambda a: a.test_auc) for key in keys],
            "ratings with a shared row": [_affected(seeds, key) for key in keys],
        }.items()
    ):
        axes.errorbar(
            [place + 0.06 * offset for place in range(len(keys))], [e.mean for e in estimates],
            yerr=[e.error for e in estimates], fmt="o-", capsize=4, label=label,
        )  # fmt: skip
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(range(len(keys)), [f"{key} x" for key in keys])
    axes.set_xlabel("collision rates, in multiples of the paper's")
    axes.set_ylabel("test AUC, hashed - collisionless")
    axes.set_title("Cost of collisions")
    axes.legend()


def _plot_kept(axes: Axes, seeds: Sequence[dict[int, Kept]], rule: Rule) -> None:
    keys, base = list(seeds[0]), first(seeds)
    places = range(len(keys))
    changes = [difference(seeds, key, base, lambda k: k.auc) for key in keys]
    axes.errorbar(places, [c.mean for c in changes], yerr=[c.error for c in changes], fmt="o-", capsize=4, color="C0")
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(places, [rule.label(key) for key in keys])
    axes.set_xlabel(rule.name)
    axes.set_ylabel(f"AUC along the stream, difference to {rule.label(base)}", color="C0")
    memory = axes.twinx()
    memory.bar(places, [seeds[0][key].mean_rows for key in keys], alpha=0.25, color="C1", width=0.6)
    memory.set_ylabel("rows, mean over the stream", color="C1")
    memory.set_ylim(bottom=0)
    axes.set_zorder(memory.get_zorder() + 1)  # the line above the bars
    axes.patch.set_visible(False)
    axes.set_title(f"By {rule.name}")
