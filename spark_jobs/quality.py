"""Data quality of a join, as a pure function of its counts: blocking checks and a report that says why.

A share or rate is only judged when there are enough events to judge it by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, Field
from scipy.special import betainc

from components.schemas import ACTIONS

ENOUGH_EVENTS: Final = 100
CHANCE: Final = 0.05
"""Below this probability chance does not explain that a rate has changed by more than its limit."""


class Limits(BaseModel):
    """Above these a join is not published."""

    max_quarantine_share: float
    max_duplicate_share: float
    max_label_ratio: float


class Report(BaseModel):
    """What the checks saw; `failures` is empty when the data may be used."""

    window: str
    previous_window: str = Field(default="", description="window whose label rates were compared, empty if none")
    counts: dict[str, int]
    quarantine_share: float = Field(description="quarantined / (impressions + actions)")
    duplicate_share: float = Field(description="duplicates / (impressions + actions)")
    label_rates: dict[str, float] = Field(description="action -> share of interactions that have it")
    previous_label_rates: dict[str, float] = {}
    failures: list[str] = []

    @property
    def reasons(self) -> dict[str, int]:
        """Quarantined events by reason, the most frequent first."""
        found = {
            k.removeprefix("quarantined_"): v for k, v in self.counts.items() if k.startswith("quarantined_") and v
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def check(
    window: str, counts: Mapping[str, int], limits: Limits, previous: tuple[str, Mapping[str, int]] | None = None
) -> Report:
    """Judge the counts of `spark_jobs.join.counts`; `previous` = (window key, counts) of the window before."""
    events = counts["impressions"] + counts["actions"]
    report = Report(
        window=window,
        counts=dict(counts),
        quarantine_share=_share(counts["quarantined"], events),
        duplicate_share=_share(counts["duplicates"], events),
        label_rates=label_rates(counts),
    )
    failures = _too_much(report, limits) if events >= ENOUGH_EVENTS else []
    if previous is not None:
        report = report.model_copy(
            update={"previous_window": previous[0], "previous_label_rates": label_rates(previous[1])}
        )
        failures += _jumps(report, previous[1], limits.max_label_ratio)
    return report.model_copy(update={"failures": failures})


def label_rates(counts: Mapping[str, int]) -> dict[str, float]:
    """Share of interactions with each action."""
    return {action: _share(counts[f"positive_{action}"], counts["interactions"]) for action in ACTIONS}


def _too_much(report: Report, limits: Limits) -> list[str]:
    failures = []
    if report.quarantine_share > limits.max_quarantine_share:
        named = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
        failures.append(
            f"{report.quarantine_share:.1%} of the events are quarantined ({named}), "
            f"above the limit of {limits.max_quarantine_share:.1%}"
        )
    if report.duplicate_share > limits.max_duplicate_share:
        failures.append(
            f"{report.duplicate_share:.1%} of the events are duplicates, "
            f"above the limit of {limits.max_duplicate_share:.1%}"
        )
    return failures


def _jumps(report: Report, before: Mapping[str, int], max_ratio: float) -> list[str]:
    """Labels whose rate surely left [previous / max_ratio, previous * max_ratio]."""
    failures = []
    shown, shown_before = report.counts["interactions"], before["interactions"]
    for action, rate in report.label_rates.items():
        now, old = report.counts[f"positive_{action}"], before[f"positive_{action}"]
        fell = _surely_more(old, shown_before, now, shown, max_ratio)
        if fell or _surely_more(now, shown, old, shown_before, max_ratio):
            failures.append(
                f"{action} is on {rate:.2%} of the interactions, after {report.previous_label_rates[action]:.2%} in "
                f"{report.previous_window}: more than a factor of {max_ratio:g}"
            )
    return failures


def _surely_more(many: int, of_many: int, few: int, of_few: int, factor: float) -> bool:
    """Whether the rate many / of_many is above factor * few / of_few, beyond what chance explains.

    Of two Poisson counts with the rates just at the limit, `many` is a binomial share of both (the exact conditional
    test), so that zero positives are judged as well.
    """
    share = factor * of_many / (factor * of_many + of_few) if of_many and of_few else 1.0
    # the chance of so many or more; scipy.stats has it by name, and takes a second to load in each step
    return many > 0 and bool(betainc(many, few + 1, share) < CHANCE)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
