"""What was seen of a stage: plain counts, from which the machine draws its verdicts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

_FROZEN = ConfigDict(frozen=True)


class Serving(BaseModel):
    """What the server itself counted for one loaded release in the stage."""

    model_config = _FROZEN

    requests: int = Field(0, ge=0)
    errors: int = Field(0, ge=0, description="failed requests")
    empty: int = Field(0, ge=0, description="requests answered without any item")
    p99_ms: float | None = Field(None, description="99th percentile of the latency")


class Arm(BaseModel):
    """What the event log says of one arm in the stage's period.

    Users are the unit of assignment, so the sums over users of impressions (n), of hits (x: impressions with the
    quality action) and of their squares and product are what the variance of the arm's rate needs.
    """

    model_config = _FROZEN

    users: int = Field(0, ge=0)
    impressions: int = Field(0, ge=0, description="sum of n over users")
    hits: int = Field(0, ge=0, description="sum of x over users")
    sum_nn: int = Field(0, ge=0)
    sum_xx: int = Field(0, ge=0)
    sum_nx: int = Field(0, ge=0)

    @property
    def rate(self) -> float:
        return self.hits / self.impressions if self.impressions else float("nan")

    @property
    def rate_variance(self) -> float:
        """Variance of `rate` by the delta method, clustered by user; NaN with fewer than two users."""
        if self.users < 2 or not self.impressions:
            return float("nan")
        residual = self.sum_xx - 2 * self.rate * self.sum_nx + self.rate**2 * self.sum_nn
        return max(residual, 0.0) / self.impressions**2 * self.users / (self.users - 1)


class Observation(BaseModel):
    """Everything a step may know besides the state. An empty one is no data: never a success."""

    model_config = _FROZEN

    champion: Arm = Arm()
    challenger: Arm = Arm()
    misassigned: int = Field(0, ge=0, description="users whose logged track contradicts the assignment")
    shadow: Serving = Serving()
    serving: Serving | None = Field(None, description="the challenger's counts by the server; None = not reachable")
    serving_required: bool = Field(True, description="False when the rollout runs without a server to ask")
    offline_champion: dict[str, float] = Field({}, description="'model.metric' -> value")
    offline_challenger: dict[str, float] = Field({}, description="'model.metric' -> value")
    notes: tuple[str, ...] = Field((), description="what could not be observed, and why")
