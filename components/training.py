"""Fitting with everything a person wants to see of it: progress, loss and speed by step, the learning curve."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from components.figures import learning_curve
from components.progress import progress

if TYPE_CHECKING:
    from components.tracking import Run
    from model.dataset import SequenceDataset
    from model.trainer import Step, Trainer


POLICY_COUNTS = ("refused_admission", "refused_full", "expired", "expired_candidates", "evicted")


def policy_counts(trainer: Trainer, before: Mapping[str, float] | None = None) -> dict[str, float]:
    """What the tables' policies refused and removed, as '<count>_<slot>'; zeros are left out.

    before: counts of the processes before this one, to be added.
    """
    stats = {slot: table.stats() for slot, table in trainer.model.tables().items()}
    counts = {f"{name}_{slot}": float(of[name]) for slot, of in stats.items() for name in POLICY_COUNTS}
    totals = {name: counts.get(name, 0.0) + (before or {}).get(name, 0.0) for name in counts}
    return {name: count for name, count in totals.items() if count}


def fit(
    trainer: Trainer,
    users: SequenceDataset,
    tracked: Run,
    title: str,
    *,
    continual: bool = False,
    prefix: str = "",
    losses: list[float] | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Train on `users` (continual: one pass in event order) and report to the run.

    prefix: of the names of metrics and picture, so that a second fit of a run keeps apart from the first.
    losses: of the batches that are done already; the fit goes on after them and adds its own, each before `after_step`.
    """
    losses = [] if losses is None else losses
    log_losses(tracked, losses, prefix)
    tokens, started = 0, time.monotonic()
    with progress(title) as advance:

        def on_step(step: Step) -> None:
            nonlocal tokens
            losses.append(step.loss)
            tokens += step.tokens
            speed = step.tokens_per_second
            # MLflow shows the value of a metric's last step: the speed of a step and of the whole fit need two names
            values = {"loss": step.loss, "step_tokens_per_s": speed, "gradient_norm": step.gradient_norm}
            tracked.step(step.done, {prefix + name: value for name, value in values.items()})
            advance(step.done, step.total, f"loss {step.loss:.4f}, {speed:,.0f} tokens/s")
            if after_step is not None:
                after_step()

        trainer.fit(users, continual=continual, on_step=on_step, start=len(losses))
    if tokens:
        tracked.metrics({f"{prefix}tokens_per_s": tokens / max(time.monotonic() - started, 1e-9)})
    draw_losses(tracked, losses, title, prefix)


def log_losses(tracked: Run, losses: Sequence[float], prefix: str = "") -> None:
    """Losses of earlier steps, for a run that goes on where another one died: each run has every step once."""
    for step, loss in enumerate(losses, 1):
        tracked.step(step, {f"{prefix}loss": loss})


def draw_losses(tracked: Run, losses: Sequence[float], title: str, prefix: str = "") -> None:
    """The learning curve, if there was a step."""
    if losses:
        tracked.figure(learning_curve(losses, title), f"{prefix}learning_curve.png")
