"""The state of a rollout, as it is recorded and as the server follows it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from components.rollout.assignment import BUCKETS
from components.rollout.policy import Policy

Stage = Literal["empty", "gate", "approval", "shadow", "canary", "promoted", "paused", "rolled_back", "rejected"]
Command = Literal["advance", "start", "approve", "promote", "pause", "resume", "abort"]
ACTIVE: frozenset[str] = frozenset({"gate", "approval", "shadow", "canary", "paused"})
"""Stages of a rollout that is under way; in all others there is no challenger."""

_FROZEN = ConfigDict(frozen=True)


class Release(BaseModel):
    """A pair of MLflow versions that were trained together and are rolled out together."""

    model_config = _FROZEN

    ranker: int = Field(ge=1)
    retriever: int = Field(ge=1)

    def __str__(self) -> str:
        return f"ranker {self.ranker} + retriever {self.retriever}"


class RolloutState(BaseModel):
    """One entry of the record: what serves whom, and why."""

    model_config = _FROZEN

    seq: int = Field(-1, description="place in the record; -1 = nothing recorded yet")
    stage: Stage = "empty"
    champion: Release | None = Field(None, description="serves everybody outside the challenger's buckets")
    challenger: Release | None = Field(None, description="being rolled out; None unless a rollout is under way")
    share: int = Field(0, ge=0, le=BUCKETS, description="buckets that the challenger serves")
    shadow_share: float = Field(0.0, ge=0, le=1, description="share of requests that the challenger scores unseen")
    salt: str = Field("", description="of the assignment of users to buckets")
    stage_since: datetime = Field(datetime(1970, 1, 1, tzinfo=UTC), description="when this stage or step began")
    step: int = Field(0, ge=0, description="index of the canary step")
    looks: int = Field(0, ge=0, description="how often the quality test was read in this step")
    resume_to: Stage | None = Field(None, description="stage that a paused rollout returns to")
    passed: tuple[str, ...] = Field((), description="gates that this rollout has passed, in order")
    subject: Release | None = Field(None, description="the release that the latest rollout is or was about")
    previous: Release | None = Field(None, description="champion before the latest promotion: abort returns to it")
    policy: Policy | None = Field(None, description="the rules of the latest rollout, fixed at its start")
    at: datetime = Field(datetime(1970, 1, 1, tzinfo=UTC), description="when this was decided")
    by: str = Field("", description="who gave the command")
    reason: str = Field("", description="why")
    evidence: dict[str, Any] = Field({}, description="the observation that the decision rests on")


class Alias(BaseModel):
    """An action for the registry: let the alias of a model point to a version, or remove it (version None)."""

    model_config = _FROZEN

    model: Literal["ranker", "retriever"]
    alias: Literal["champion", "challenger"]
    version: int | None
