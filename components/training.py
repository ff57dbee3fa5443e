"""Fitting with everything a person wants to see of it: progress, loss and speed by step, the learning curve."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from components.figures import learning_curve
from components.progress import progress

if TYPE_CHECKING:
    from components.tracking import Run
    from model.dataset import SequenceDataset
    from model.trainer import Step, Trainer


POLICY_COUNTS = ("refused_admission", "refused_full", "expired", "expired_candidates", "evicted")


def policy_counts(trainer: Trainer) -> dict[str, float]:
    """What the tables' policies refused and removed, as '<count>_<slot>'; zeros are left out."""
    stats = {slot: table.stats() for slot, table in trainer.model.tables().items()}
    counts = {f"{name}_{slot}": float(of[name]) for slot, of in stats.items() for name in POLICY_COUNTS}
    return {name: count for name, count in counts.items() if count}


def fit(trainer: Trainer, users: SequenceDataset, tracked: Run, title: str, continual: bool = False) -> None:
    """Train on `users` (continual: one pass in event order) and report to the run."""
    losses: list[float] = []
    started = before = time.monotonic()
    with progress(title) as advance:

        def on_step(step: Step) -> None:
            nonlocal before
            now = time.monotonic()
            losses.append(step.loss)
            speed = step.targets / max(now - before, 1e-9)
            tracked.step(step.done, {"loss": step.loss, "targets_per_s": speed, "gradient_norm": step.gradient_norm})
            advance(step.done, step.total, f"loss {step.loss:.4f}, {speed:,.0f} targets/s")
            before = now

        trainer.fit(users, continual=continual, on_step=on_step)
    passes = 1 if continual else trainer.model.config.epochs
    tokens = int(users.tokens().sum()) * passes
    tracked.metrics({"tokens_per_s": tokens / max(time.monotonic() - started, 1e-9)})
    tracked.metrics(policy_counts(trainer))
    if losses:
        tracked.figure(learning_curve(losses, title), "learning_curve.png")
