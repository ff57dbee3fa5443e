"""The interface of the step sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import StepConfig, TimeText


class SequencesConfig(StepConfig):
    """Build a data set of sequences from published interactions."""

    mode: Literal["history", "window"] = Field(
        "history", description="history: everything up to --end, split at --split; window: one window with context"
    )
    window: str = Field(
        "", description="mode window: the joined window, START-END like 20220501T000000Z-20220502T000000Z"
    )
    split: TimeText = Field(
        "", description="mode history: train before, evaluate from this time on (empty: no eval part)"
    )
    end: TimeText = Field("", description="mode history: take the windows that end by this time (empty: all)")
    context_interactions: int = Field(
        256,
        ge=0,
        le=8192,
        description="at most so many earlier interactions before those with loss; with fewer than the model's window *"
        " layers a long history ends earlier in training than in serving",
    )
    spark: str = Field(
        "", description="local[2], sc://host:port or a Spark master (empty: $FRESHET_SPARK, else local[2])"
    )
