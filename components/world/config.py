"""Settings of the synthetic world; other steps inherit them, so one set of names describes one world everywhere."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from components.config import TimeText
from components.windows import parse_time, to_us


class WorldConfig(BaseModel):
    """A world is a pure function of these fields: the same fields give the same users, items and tastes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_seed: int = Field(default=7, ge=0, le=2**31 - 1, description="seed of everything random in the world")
    world_end: TimeText = Field(
        default="",
        description="ISO time at which the world's history ends and its live time begins "
        "(empty: as recorded in the root, else the current minute)",
    )
    world_users: int = Field(default=1200, ge=1, le=1_000_000, description="number of users")
    world_items: int = Field(default=1500, ge=20, le=200_000, description="items alive at any moment, on average")
    world_categories: int = Field(default=20, ge=2, le=1000, description="number of item categories")
    world_authors: int = Field(default=150, ge=2, le=100_000, description="number of authors")
    world_lifetime_days: float = Field(
        default=8.0, gt=0.1, le=1000, description="mean days between an item's appearance and its removal"
    )
    world_history_days: float = Field(default=6.0, gt=0, le=365, description="days of history before world_end")
    world_impressions: int = Field(
        default=60_000, ge=10, le=50_000_000, description="impressions in the history, ten to a request"
    )
    world_day_s: float = Field(
        default=86_400.0, ge=1, le=86_400, description="length of a world day after world_end, in seconds of real time"
    )
    world_shift_at: TimeText = Field(default="", description="ISO time of the preference shift (empty: never)")
    world_shift_correlation: float = Field(
        default=-0.8,
        ge=-1,
        le=1,
        description="correlation of what is in fashion after the shift with before: 1 none, 0 redrawn, -1 reversed",
    )
    world_duplicate_share: float = Field(default=0.01, ge=0, le=0.5, description="share of events logged twice")
    world_late_share: float = Field(default=0.01, ge=0, le=0.5, description="share of events received hours late")
    world_malformed_share: float = Field(
        default=0.003, ge=0, le=0.5, description="malformed rows, as a share of the valid ones"
    )

    def world(self) -> WorldConfig:
        """These settings alone, without those of the step that inherits them."""
        return WorldConfig(**{name: getattr(self, name) for name in WorldConfig.model_fields})

    @property
    def end(self) -> datetime:
        """When history ends and live time begins; BadInput when world_end is empty."""
        return parse_time(self.world_end)

    @property
    def shift_us(self) -> int | None:
        """Time of the shift in UTC microseconds, or None."""
        return to_us(parse_time(self.world_shift_at)) if self.world_shift_at else None
