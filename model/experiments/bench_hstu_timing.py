"""Timing of two ways to do one thing, turn by turn, so that what disturbs the machine disturbs both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """A ratio of the table: median over the repetitions of reference over ours within each; medians in milliseconds."""

    name: str
    ratio: float
    reference_ms: float
    ours_ms: float


def paired(name: str, reference: Callable[[], object], ours: Callable[[], object], repetitions: int) -> Figure:
    """Times both after one turn to warm up. A call that returns a float says its seconds itself."""
    samples = [(_seconds(reference), _seconds(ours)) for _ in range(repetitions + 1)][1:]
    return Figure(
        name,
        median(a / b for a, b in samples),
        1000 * median(a for a, _ in samples),
        1000 * median(b for _, b in samples),
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    said = run()
    return said if isinstance(said, float) else time.perf_counter() - start
