"""What a rollout demands before it goes on: the numbers, all with bounds, in one flat model."""

from __future__ import annotations

import re
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.errors import BadInput
from components.rollout.assignment import BUCKETS

_LIMIT = re.compile(r"(?P<model>ranker|retriever)\.(?P<metric>\w+)\s*(?P<sign>>=|<=)\s*(?P<bound>[-+]?\d*\.?\d+)")


class Limit(NamedTuple):
    """`model.metric >= bound` or `model.metric <= bound`."""

    model: str
    metric: str
    sign: str
    bound: float

    @property
    def name(self) -> str:
        return f"{self.model}.{self.metric}"

    def holds(self, value: float) -> bool:
        """Whether the value keeps the limit; NaN keeps none."""
        return value >= self.bound if self.sign == ">=" else value <= self.bound


class Policy(BaseModel):
    """The rollout's rules. They are recorded when a rollout starts and stand until it ends."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gate_limits: str = Field(
        "ranker.auc_click>=0.5, ranker.ne_click<=1.1",
        description="absolute limits on the candidate's offline metrics, e.g. 'ranker.auc_click>=0.5'; may be empty",
    )
    gate_changes: str = Field(
        "ranker.auc_click>=-0.02, ranker.ne_click<=0.05",
        description="limits on candidate minus champion; without a champion they do not apply; may be empty",
    )
    approval: bool = Field(False, description="wait for a person (action approve) after the gate")
    shadow_share: float = Field(1.0, gt=0, le=1, description="share of requests that the shadow stage scores as well")
    shadow_samples: int = Field(100, ge=1, le=10**9, description="shadow requests needed before shadow can pass")
    shares: str = Field(
        "100,1000,2500,5000", description=f"canary steps: buckets of {BUCKETS} that the challenger serves, rising"
    )
    min_samples: int = Field(
        1000, ge=10, le=10**9, description="impressions of each arm needed before a canary step can be judged"
    )
    min_bake_s: float = Field(300.0, ge=0, le=2_592_000, description="a stage lasts at least this many seconds")
    max_bake_s: float = Field(
        86_400.0, gt=0, le=2_592_000, description="after so many seconds without a verdict the rollout pauses"
    )
    settle_s: float = Field(
        30.0, ge=0, le=3600, description="seconds after a change of share that are not measured: servers follow it"
    )
    max_error_rate: float = Field(0.01, ge=0, le=1, description="above this share of failed requests: rolled back")
    max_empty_rate: float = Field(0.01, ge=0, le=1, description="above this share of empty results: rolled back")
    max_p99_ms: float = Field(1000.0, gt=0, le=600_000, description="above this 99th percentile latency: rolled back")
    guardrail_requests: int = Field(
        50, ge=1, le=10**9, description="requests needed before the rates and the latency above are judged"
    )
    quality_action: str = Field("click", description="the action whose rate per impression must not fall")
    max_quality_drop: float = Field(
        0.05, ge=0, lt=1, description="relative fall of that rate, challenger against champion, that is tolerated"
    )
    alpha: float = Field(
        0.05, gt=0, lt=0.5, description="error level of the one-sided quality test, shared by all looks of a step"
    )
    require_proof: bool = Field(
        True, description="the last step passes only when the test proves that the fall is within the tolerance"
    )
    srm_p: float = Field(
        0.001, gt=0, lt=0.5, description="below this p-value of the arms' user counts every metric is void: paused"
    )

    @field_validator("shares")
    @classmethod
    def _rising(cls, value: str) -> str:
        steps = parse_shares(value)
        if not steps or list(steps) != sorted(set(steps)) or not steps[0] > 0 or steps[-1] >= BUCKETS:
            raise ValueError(f"must be rising bucket counts between 1 and {BUCKETS - 1}, e.g. 100,1000,2500,5000")
        return value

    @field_validator("gate_limits", "gate_changes")
    @classmethod
    def _parsable(cls, value: str) -> str:
        parse_limits(value)
        return value

    @field_validator("quality_action")
    @classmethod
    def _known_action(cls, value: str) -> str:
        from components.schemas import action_bit  # not at the top: trigger forms are made without pyarrow

        try:
            action_bit(value)
        except BadInput as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def steps(self) -> tuple[int, ...]:
        """The canary's shares in buckets, rising."""
        return parse_shares(self.shares)


def parse_shares(text: str) -> tuple[int, ...]:
    """'100,1000' -> (100, 1000); ValueError says what was expected."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not a list of bucket counts like 100,1000,2500,5000") from None


def parse_limits(text: str) -> tuple[Limit, ...]:
    """'ranker.auc_click>=0.5, ...' -> limits; ValueError says what was expected."""
    limits = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _LIMIT.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a limit; write it like ranker.auc_click>=0.5 or retriever.loss<=9")
        limits.append(Limit(match["model"], match["metric"], match["sign"], float(match["bound"])))
    return tuple(limits)
