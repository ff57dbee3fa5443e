"""Observations and states that the rollout tests share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from components.rollout.evidence import Arm, Observation, Serving
from components.rollout.machine import Order, step
from components.rollout.policy import Policy
from components.rollout.state import Release, RolloutState

START = datetime(2026, 5, 1, tzinfo=UTC)
OLD, NEW = Release(ranker=1, retriever=1), Release(ranker=2, retriever=2)
POLICY = Policy(
    gate_limits="ranker.auc_click>=0.6",
    gate_changes="ranker.auc_click>=-0.01",
    shares="1000,5000",
    shadow_samples=100,
    min_samples=1000,
    min_bake_s=60,
    max_bake_s=600,
    max_quality_drop=0.1,
)
GOOD_SERVING = Serving(requests=1000, errors=0, empty=0, p99_ms=50)
GOOD_OFFLINE = Observation(offline_champion={"ranker.auc_click": 0.70}, offline_challenger={"ranker.auc_click": 0.71})
GOOD_SHADOW = Observation(shadow=GOOD_SERVING)


def arm(users: int, rate: float, per_user: int = 20) -> Arm:
    """An arm whose users see `per_user` impressions each; half of them hit a bit more often than the others."""
    low, high = round(per_user * rate * 0.8), round(per_user * rate * 1.2)
    hits = [low if number % 2 else high for number in range(users)]
    return Arm(
        users=users,
        impressions=users * per_user,
        hits=sum(hits),
        sum_nn=users * per_user**2,
        sum_xx=sum(x * x for x in hits),
        sum_nx=sum(per_user * x for x in hits),
    )


def canary_observation(share: int, rate: float = 0.5, champion_rate: float = 0.5, users: int = 2000) -> Observation:
    """Both arms filled as the share says, and a healthy server."""
    challenger = users * share // 10_000
    return Observation(
        champion=arm(users - challenger, champion_rate), challenger=arm(challenger, rate), serving=GOOD_SERVING
    )


def good(state: RolloutState) -> Observation:
    """Evidence with which the present stage passes."""
    if state.stage == "gate":
        return GOOD_OFFLINE
    return GOOD_SHADOW if state.stage == "shadow" else canary_observation(state.share or 1000)


def champion_state() -> RolloutState:
    """OLD serves everybody, after a rollout of its own."""
    state = started(RolloutState(), OLD)
    state, _ = step(state, GOOD_OFFLINE, START, POLICY)
    assert state.stage == "promoted"
    return state


def started(state: RolloutState, release: Release = NEW, policy: Policy = POLICY) -> RolloutState:
    return step(state, Observation(), START, policy, Order(command="start", release=release))[0]


def reach(stage: str, policy: Policy = POLICY) -> RolloutState:
    """A rollout of NEW against OLD that good evidence has brought to `stage`."""
    state, now = started(champion_state(), policy=policy), START
    while state.stage != stage:
        now += timedelta(seconds=61)
        order = Order(command="approve") if state.stage == "approval" else Order()
        after, _ = step(state, good(state), now, policy, order)
        assert after is not state, f"stuck in {state.stage}"
        state = after
    return state
