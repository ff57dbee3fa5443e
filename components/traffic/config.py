"""Settings of the live synthetic users."""

from __future__ import annotations

from pydantic import Field

from components.config import StepConfig, TimeText


class TrafficConfig(StepConfig):
    """How many users ask what server how often; who they are and what they like is the world recorded in the root."""

    server: str = Field(default="http://127.0.0.1:8000", description="base URL of the server")
    requests: int = Field(default=0, ge=0, description="stop after so many requests (0: no such limit)")
    duration_s: float = Field(default=60.0, ge=0, description="stop after so many seconds (0: run until stopped)")
    rate: float = Field(default=6.0, gt=0, le=1000, description="requests per second, at random moments")
    concurrency: int = Field(default=8, ge=1, le=256, description="most requests in flight")
    slate: int = Field(default=10, ge=1, le=200, description="items asked for in a request")
    seed: int = Field(default=1, ge=0, le=2**31 - 1, description="seed of users, pages and feedback")
    shift_at: TimeText = Field(
        default="", description="ISO time of the preference shift (empty: as recorded in the world)"
    )
    day_s: float = Field(
        default=0.0, ge=0, le=86_400, description="seconds of a world day, for new items (0: as recorded in the world)"
    )
    delay_scale: float = Field(
        default=0.05, gt=0, le=1, description="factor on the world's feedback delays, so that minutes show a loop"
    )
    max_delay_s: float = Field(default=5.0, ge=0.05, le=3600, description="longest feedback delay after scaling")
    duplicate_share: float = Field(default=0.01, ge=0, le=0.5, description="share of events sent twice")
    publish_every_s: float = Field(
        default=5.0, gt=0, le=3600, description="how often items that have appeared are written to the catalogue"
    )
    flush_every_s: float = Field(default=0.2, gt=0, le=60, description="how often collected events are sent")
    give_up_s: float = Field(
        default=60.0, gt=0, le=3600, description="fail when the server has not answered a call for so long"
    )
