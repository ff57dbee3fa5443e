"""The interface of the step rollout."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import ConfigDict, Field

from components.config import TrackedConfig
from components.rollout.policy import Policy

DEFAULT_SERVER = "http://127.0.0.1:8000"


class RolloutConfig(TrackedConfig, Policy):
    """One step of the staged rollout, or an order to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["advance", "start", "approve", "promote", "pause", "resume", "abort", "status"] = Field(
        "advance", description="advance = judge the evidence and go on if it allows; status = only look; else an order"
    )
    ranker: int = Field(
        0, ge=0, description="start: version to roll out, 0 = the newest published; else: refuse if it is another one"
    )
    retriever: int = Field(
        0, ge=0, description="start: version to roll out, 0 = the newest published; else: refuse if it is another one"
    )
    until: Literal["decision", "gate", "shadow", "canary", "promoted"] = Field(
        "decision",
        description="decision = decide once; a stage = go on until the rollout has passed it (gate: and approval)",
    )
    poll_s: float = Field(2.0, gt=0, le=3600, description="seconds between decisions while waiting for a stage")
    wait_s: float = Field(604_800.0, gt=0, description="give up waiting for a stage after so many seconds")
    server_url: str = Field(
        "",
        description="server whose request counts the guardrails judge (empty: $FRESHET_SERVER_URL, else "
        f"{DEFAULT_SERVER}; none: roll out without them)",
    )
    by: str = Field("", description="who gives the order, for the record")
    reason: str = Field("", description="why the order is given, for the record")

    def server(self) -> str:
        """The server to ask, or 'none'."""
        return self.server_url or os.environ.get("FRESHET_SERVER_URL") or DEFAULT_SERVER
