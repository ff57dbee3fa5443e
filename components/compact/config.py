"""The interface of compaction."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.config import TrackedConfig


class CompactConfig(TrackedConfig):
    """Which log to fold, and how far back it stays restorable."""

    model: Literal["ranker", "retriever"] = Field(default="ranker", description="which model")
    version: int | None = Field(default=None, ge=1, description="version; empty: the champion")
    min_deltas: int = Field(
        default=24, ge=1, le=100_000, description="fold when so many deltas follow the newest snapshot"
    )
    keep_deltas: int = Field(
        default=168,
        ge=0,
        le=1_000_000,
        description="sync points before the newest that stay restorable; older ones are deleted",
    )
