"""What the evidence says about the stage that a rollout is in: one verdict, and no decision."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from components.errors import BadInput
from components.rollout import verdicts
from components.rollout.evidence import Observation
from components.rollout.policy import Policy
from components.rollout.state import RolloutState
from components.rollout.verdicts import Verdict


class Finding(NamedTuple):
    """The verdict on the gate that a stage stands before; `look`: the quality test was read for it."""

    gate: str
    verdict: Verdict
    look: bool = False


def assess(state: RolloutState, observation: Observation, now: datetime) -> Finding | None:
    """What the evidence says about the present stage; None for stages that wait for no evidence."""
    match state.stage:
        case "gate":
            return Finding("gate", verdicts.gate(observation, policy_of(state), state.champion is not None))
        case "shadow":
            return Finding("shadow", _baked(state, now, _shadow(observation, policy_of(state))))
        case "canary":
            return _canary(state, observation, now)
    return None


def _shadow(observation: Observation, policy: Policy) -> Verdict:
    shadow = observation.shadow
    checks = [verdicts.guardrails(shadow, policy, "shadow")]
    if shadow.requests < policy.shadow_samples:
        checks.append(Verdict("inconclusive", f"{shadow.requests} of {policy.shadow_samples} shadow requests"))
    if observation.serving is not None:
        served = verdicts.guardrails(observation.serving, policy, "server")
        if served.outcome == "failed":  # the shadow log is the evidence; the server's counts can only add a fault
            checks.append(served)
    return verdicts.worst(checks)


def _canary(state: RolloutState, observation: Observation, now: datetime) -> Finding:
    """Hard guardrails always; the comparison of the arms at a fixed schedule of looks, once the stage has baked.

    A look happens when the smaller arm has min_samples * 2**looks impressions, and finally at the longest bake time.
    """
    policy = policy_of(state)
    gate = canary_gate(policy.steps[state.step])
    facts = _baked(state, now, hard(observation, policy))
    if facts.outcome != "passed":
        return Finding(gate, facts)
    samples = min(observation.champion.impressions, observation.challenger.impressions)
    final = now - state.stage_since >= longest(policy)
    wanted = policy.min_samples * (1 if final else 2**state.looks)
    if samples < wanted:
        return Finding(gate, Verdict("inconclusive", f"{samples} of {wanted} impressions in the smaller arm"))
    ratio = verdicts.sample_ratio(observation, state.share, policy)
    if ratio.outcome != "passed":
        return Finding(gate, ratio)
    proof = policy.require_proof and state.step == len(policy.steps) - 1
    comparison = verdicts.quality(observation.champion, observation.challenger, policy, state.looks, proof)
    looked = verdicts.quality_z(observation.champion, observation.challenger, policy) is not None
    return Finding(gate, comparison, look=looked)


def _baked(state: RolloutState, now: datetime, verdict: Verdict) -> Verdict:
    """No stage passes before its shortest bake time; a failure need not wait for it."""
    age, shortest = (now - state.stage_since).total_seconds(), policy_of(state).min_bake_s
    if verdict.outcome == "passed" and age < shortest:
        return Verdict("inconclusive", f"{age:.0f} of {shortest:g} s bake time; so far {verdict.reason}")
    return verdict


def longest(policy: Policy) -> timedelta:
    return timedelta(seconds=max(policy.max_bake_s, policy.min_bake_s))


def hard(observation: Observation, policy: Policy) -> Verdict:
    """The server's own counts: absolute facts, judged even when the comparison of the arms is void."""
    if observation.serving is not None:
        return verdicts.guardrails(observation.serving, policy, "server")
    if observation.serving_required:
        return Verdict("inconclusive", "; ".join(observation.notes) or "the server's counts are not known")
    return Verdict("passed", "no server to ask")


def canary_gate(share: int) -> str:
    return f"canary:{share}"


def policy_of(state: RolloutState) -> Policy:
    if state.policy is None:
        raise BadInput(f"record {state.seq} is in stage {state.stage} without a policy; abort it and start again")
    return state.policy
