"""Settings of the ingest step."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from components.config import StepConfig, TimeText
from components.errors import BadInput
from components.windows import parse_time, to_us
from components.world.config import WorldConfig


class IngestConfig(StepConfig, WorldConfig):
    """Which source to read and how; the `world_*` fields matter for source=synthetic only."""

    source: Literal["synthetic", "kuairand", "movielens", "files"] = Field(
        default="synthetic", description="adapter: synthetic, kuairand, movielens or files"
    )
    path: str = Field(default="", description="folder or file to read (every source but synthetic)")
    from_time: TimeText = Field(
        default="", description="ISO time; only events at or after it (empty: from the first), so a log can be replayed"
    )
    until_time: TimeText = Field(default="", description="ISO time; only events before it (empty: to the last)")
    max_bad_share: float = Field(
        default=0.05, ge=0, le=1, description="largest share of bad rows; above it nothing enters the event log"
    )
    like_stars: float = Field(
        default=4.0, ge=0.5, le=5, description="movielens: a rating of so many stars or more is also a like"
    )
    columns: str = Field(
        default="",
        description="files: our=theirs pairs, e.g. 'user_id=uid,item_id=sku,timestamp=ts,click=clicked'; "
        "a name left out is expected as it is",
    )
    kind: Literal["impressions", "actions", "feedback", "items"] = Field(
        default="feedback",
        description="files: what a row is: impressions, actions (of logged requests), items, "
        "or feedback (an impression and its one action)",
    )
    time_unit: Literal["s", "ms", "us", "iso"] = Field(
        default="s", description="files: unit of numeric timestamps since 1970 in UTC, or iso for text"
    )
    string_ids: bool = Field(
        default=False,
        description="files: hash ids that are text: of users, items, requests, pages, authors, categories",
    )
    action_names: str = Field(
        default="",
        description="files: theirs=our pairs for values of the action column, e.g. 'purchase=like,view=click'",
    )

    @property
    def from_us(self) -> int | None:
        return to_us(parse_time(self.from_time)) if self.from_time else None

    @property
    def until_us(self) -> int | None:
        return to_us(parse_time(self.until_time)) if self.until_time else None

    def with_end_of_world(self, recorded: WorldConfig | None, now: datetime) -> IngestConfig:
        """Fill an empty world_end: from the world that the root records, else `until_time`, else the current minute.

        Raises BadInput when the root records another world: their events would mix.
        """
        end = recorded.world_end if recorded else self.until_time or now.replace(second=0, microsecond=0).isoformat()
        filled = self if self.world_end else self.model_copy(update={"world_end": end})
        if recorded and (wrong := _differences(recorded, filled)):
            raise BadInput(
                f"the root already holds a synthetic world that differs in {', '.join(wrong)}; "
                "use the same world settings or another --root"
            )
        return filled


def _differences(recorded: WorldConfig, asked: WorldConfig) -> list[str]:
    """Settings on which two worlds disagree; live users may have set the shift and the day length afterwards."""
    set_later = {"world_shift_at": "", "world_day_s": WorldConfig.model_fields["world_day_s"].default}
    names = [name for name in WorldConfig.model_fields if getattr(recorded, name) != getattr(asked, name)]
    return [name for name in names if getattr(asked, name) != set_later.get(name)]
