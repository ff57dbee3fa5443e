"""The rollout as a pure function: step(state, observation, now, policy, order) -> (state, actions).

    gate -> approval (optional) -> shadow -> canary steps -> promoted
      |         any of them: paused (no verdict, by order, or void numbers), rolled_back (failed, or aborted)
      +-> rejected

No clock, no storage, no network: what is not among the arguments cannot influence a decision. One call makes at most
one transition. Without a champion there is nothing to compare with: the first release needs its gate (and approval)
only. A paused rollout keeps its share; nothing but an order to resume continues it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict

from components.errors import BadInput
from components.rollout import verdicts
from components.rollout.assess import assess, canary_gate, hard, longest, policy_of
from components.rollout.evidence import Observation
from components.rollout.policy import Policy
from components.rollout.state import ACTIVE, Alias, Command, Release, RolloutState, Stage

BY_HAND = "canary:by-hand"
"""The gate that an order to promote passes in place of the canary steps that were left."""


class Order(BaseModel):
    """What a caller wants; `advance` = let the evidence decide."""

    model_config = ConfigDict(frozen=True)

    command: Command = "advance"
    release: Release | None = None
    by: str = ""
    reason: str = ""


ADVANCE = Order()


def step(
    state: RolloutState, observation: Observation, now: datetime, policy: Policy, order: Order = ADVANCE
) -> tuple[RolloutState, tuple[Alias, ...]]:
    """The next state (the same object when nothing changes) and the aliases that make the registry agree with it.

    `policy` counts for `start`; a rollout under way keeps the policy that it started with. An order that does not fit
    the stage raises BadInput and says which does.
    """
    now = max(now, state.at + timedelta(microseconds=1))  # the record never runs backwards, though clocks differ
    state = _decide(state, observation, now, policy, order)
    return state, aliases(state)


def aliases(state: RolloutState) -> tuple[Alias, ...]:
    """What the registry's aliases must be in this state; setting them again changes nothing."""
    wanted = []
    for alias, release in (("champion", state.champion), ("challenger", state.challenger)):
        for model in ("ranker", "retriever"):
            version = None if release is None else getattr(release, model)
            wanted.append(Alias.model_validate({"model": model, "alias": alias, "version": version}))
    return tuple(wanted)


def required_gates(policy: Policy, first: bool) -> tuple[str, ...]:
    """The gates between a candidate and its promotion, in order; `first`: there is no champion."""
    gates = ("gate", "approval") if policy.approval else ("gate",)
    return gates if first else (*gates, "shadow", *(canary_gate(share) for share in policy.steps))


def _decide(state: RolloutState, observation: Observation, now: datetime, policy: Policy, order: Order) -> RolloutState:
    match order.command:
        case "abort":
            return _abort(state, now, order)
        case "start":
            return _start(state, now, policy, order)
        case "pause" if state.stage in ACTIVE - {"paused"}:
            return _pause(state, now, order.reason or "paused by order", order=order)
        case "resume" if state.stage == "paused":
            return _resume(state, now, order)
        case "approve" if state.stage == "approval":
            return _pass(state, now, "approval", order.reason or "approved", order=order)
        case "promote" if state.stage == "canary":
            return _promote_by_order(state, observation, now, order)
        case "advance":
            return _advance(state, observation, now)
    raise BadInput(f"cannot {order.command} a rollout in stage {state.stage}; {_what_fits(state)}")


def _what_fits(state: RolloutState) -> str:
    orders = {
        "approval": "approve or abort it",
        "canary": "pause, promote or abort it",
        "paused": "resume or abort it",
        "gate": "pause or abort it",
        "shadow": "pause or abort it",
    }
    return orders.get(state.stage, "no rollout is under way: start one")


def _start(state: RolloutState, now: datetime, policy: Policy, order: Order) -> RolloutState:
    release = order.release
    if release is None:
        raise BadInput("a rollout starts with a release; give --ranker and --retriever version numbers")
    if release in (state.champion, state.challenger):
        return state
    waiting = {state.stage, state.resume_to} & {"gate", "approval"}
    if state.stage in ACTIVE and not waiting:
        raise BadInput(f"{state.challenger} is in stage {state.stage}; abort it before {release} can start")
    seq = state.seq + 1
    return _enter(
        state,
        now,
        "gate",
        order.reason or "started",
        order=order,
        challenger=release,
        subject=release,
        share=0,
        shadow_share=0.0,
        salt=f"{seq}-{release.ranker}-{release.retriever}",
        passed=(),
        step=0,
        policy=Policy.model_validate(policy.model_dump()),
    )


def _abort(state: RolloutState, now: datetime, order: Order) -> RolloutState:
    """Wins over everything. After a promotion it returns to the champion before; done already, it changes nothing."""
    reason = order.reason or "aborted by order"
    if state.stage in ACTIVE:
        return _leave(state, now, "rolled_back", reason, order=order)
    if state.stage == "promoted":
        if state.previous is None:
            raise BadInput(f"{state.champion} is the first release, there is none to return to; start another one")
        return _leave(state, now, "rolled_back", reason, order=order, champion=state.previous, previous=None)
    if state.stage == "empty":
        raise BadInput(f"there is nothing to abort; {_what_fits(state)}")
    return state


def _resume(state: RolloutState, now: datetime, order: Order) -> RolloutState:
    """Back to the stage that was left, with a fresh period and the same share."""
    stage = state.resume_to
    if stage is None:
        raise BadInput(f"record {state.seq} is paused but names no stage to resume; abort it and start again")
    return _enter(state, now, stage, order.reason or "resumed", order=order)


def _promote_by_order(state: RolloutState, observation: Observation, now: datetime, order: Order) -> RolloutState:
    """A person stands for the canary steps that are left, but not against a broken guardrail or void numbers."""
    policy = policy_of(state)
    if (faults := hard(observation, policy)).outcome == "failed":
        return _leave(state, now, "rolled_back", faults.reason, observation, order=order)
    if (ratio := verdicts.sample_ratio(observation, state.share, policy)).outcome == "void":
        return _pause(state, now, ratio.reason, observation, order=order)
    return _pass(state, now, BY_HAND, order.reason or "promoted by order", observation, order=order)


def _advance(state: RolloutState, observation: Observation, now: datetime) -> RolloutState:
    finding = assess(state, observation, now)
    if finding is None:
        return state
    policy, verdict = policy_of(state), finding.verdict
    age = now - state.stage_since
    if verdict.outcome == "failed":
        stage: Stage = "rejected" if state.stage == "gate" else "rolled_back"
        return _leave(state, now, stage, verdict.reason, observation)
    if verdict.outcome == "void":
        return _pause(state, now, verdict.reason, observation)
    if verdict.outcome == "passed":
        return _pass(state, now, finding.gate, verdict.reason, observation)
    if state.stage == "gate":  # offline metrics do not come with time
        return _pause(state, now, verdict.reason, observation)
    if age >= longest(policy):
        return _pause(state, now, f"no verdict after {policy.max_bake_s:g} s: {verdict.reason}", observation)
    if finding.look:
        return _enter(state, now, "canary", verdict.reason, observation, fresh=False, looks=state.looks + 1)
    return state


def _pass(
    state: RolloutState,
    now: datetime,
    gate: str,
    reason: str,
    observation: Observation | None = None,
    order: Order = ADVANCE,
) -> RolloutState:
    """Note the gate as passed and enter what comes next: approval, shadow, the next share, or the promotion."""
    policy = policy_of(state)
    passed = (*state.passed, gate)
    left = [g for g in required_gates(policy, first=state.champion is None) if g not in passed]
    if not left or gate == BY_HAND:
        return _leave(
            state,
            now,
            "promoted",
            reason,
            observation,
            order=order,
            champion=state.challenger,
            previous=state.champion,
            passed=passed,
        )
    if left[0] == "approval":
        return _enter(state, now, "approval", reason, observation, order=order, passed=passed)
    if left[0] == "shadow":
        share = policy.shadow_share
        return _enter(state, now, "shadow", reason, observation, order=order, passed=passed, shadow_share=share)
    step = len(policy.steps) - len(left)
    changes: dict[str, Any] = {"step": step, "share": policy.steps[step], "shadow_share": 0.0}
    return _enter(state, now, "canary", reason, observation, order=order, passed=passed, **changes)


def _pause(
    state: RolloutState, now: datetime, reason: str, observation: Observation | None = None, order: Order = ADVANCE
) -> RolloutState:
    return _enter(state, now, "paused", reason, observation, order=order, resume_to=state.stage)


def _leave(
    state: RolloutState,
    now: datetime,
    stage: Stage,
    reason: str,
    observation: Observation | None = None,
    order: Order = ADVANCE,
    **changes: Any,
) -> RolloutState:
    """End the rollout: nobody is served by a challenger any more."""
    gone: dict[str, Any] = {"challenger": None, "share": 0, "shadow_share": 0.0}
    return _enter(state, now, stage, reason, observation, order=order, **(gone | changes))


def _enter(
    state: RolloutState,
    now: datetime,
    stage: Stage,
    reason: str,
    observation: Observation | None = None,
    order: Order = ADVANCE,
    fresh: bool = True,
    **changes: Any,
) -> RolloutState:
    """The next entry of the record; `fresh` starts a new period of measurement."""
    entry: dict[str, Any] = {
        "seq": state.seq + 1,
        "stage": stage,
        "resume_to": None,
        "at": now,
        "by": order.by,
        "reason": reason,
        "evidence": observation.model_dump(mode="json") if observation else {},
    }
    if fresh:
        entry |= {"stage_since": now, "looks": 0}
    return RolloutState.model_validate(dict(state) | entry | changes)
