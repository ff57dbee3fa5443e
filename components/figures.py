"""Pictures of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]
"""Mean prediction, mean label and count per bin."""


def learning_curve(losses: Sequence[float], title: str) -> Figure:
    """Training loss by step, with its moving average over a twentieth of the run; without the steps that have none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    known = np.flatnonzero(np.isfinite(losses))
    steps, values = known + 1, np.asarray(losses)[known]
    axes.plot(steps, values, color="#9ecae1", linewidth=1, label="each step")
    width = max(1, len(values) // 20)
    if width > 1:
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="#08519c", linewidth=2, label=f"mean of {width} steps")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    return figure


def calibration_plot(curves: Mapping[str, Curve], title: str) -> Figure:
    """Observed rate against predicted probability, one line per head; on the diagonal a prediction keeps its word."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    top = 1e-3
    for head, (predicted, observed, _) in curves.items():
        axes.plot(predicted, observed, marker="o", markersize=4, label=head)
        top = max(top, float(np.max(predicted, initial=0)), float(np.max(observed, initial=0)))
    axes.plot([0, top], [0, top], color="#888888", linestyle="--", linewidth=1, label="calibrated")
    axes.set(xlabel="predicted probability", ylabel="observed rate", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
