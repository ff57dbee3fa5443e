"""The interface of the step join."""

from __future__ import annotations

from pydantic import Field

from components.config import StepConfig


class JoinConfig(StepConfig):
    """Join the impressions and actions of one window to interactions."""

    window: str = Field(description="window to join, START-END like 20220501T000000Z-20220502T000000Z")
    attribution_window_s: int = Field(
        3600, ge=1, le=30 * 86400, description="an action counts for its impression for this long (seconds)"
    )
    early: bool = Field(
        False,
        description="join although actions for the window's impressions may still come; those will be quarantined",
    )
    allow_empty: bool = Field(
        False, description="join a window without impressions, too, as one in which nothing happened"
    )
    max_lateness_s: int = Field(
        3600, ge=0, le=30 * 86400, description="impressions may arrive this long after their window (seconds)"
    )
    memory_s: int = Field(
        7 * 86400,
        ge=0,
        le=365 * 86400,
        description="how long before the lateness bound earlier joins are remembered and late files found (seconds); "
        "what comes even later stays in the log, unread, until a join for which this is raised",
    )
    max_quarantine_share: float = Field(
        0.2, ge=0, le=1, description="the join fails with a report when a larger share of its events is quarantined"
    )
    max_duplicate_share: float = Field(
        0.5, ge=0, le=1, description="the join fails with a report when a larger share of its events are duplicates"
    )
    max_label_ratio: float = Field(
        20.0,
        ge=1,
        description="the join fails when a label's rate changed by more than this factor, beyond chance (5 %)",
    )
    spark: str = Field(
        "", description="local[2], sc://host:port or a Spark master (empty: $FRESHET_SPARK, else local[2])"
    )
