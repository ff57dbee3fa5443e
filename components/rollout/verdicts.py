"""Verdicts over an observation: passed, failed, inconclusive or void. Missing data is always inconclusive."""

from __future__ import annotations

import math
from collections.abc import Collection
from statistics import NormalDist
from typing import Literal, NamedTuple

from components.rollout.assignment import BUCKETS
from components.rollout.evidence import Arm, Observation, Serving
from components.rollout.policy import Limit, Policy, parse_limits

Outcome = Literal["passed", "failed", "inconclusive", "void"]
MIN_EXPECTED_USERS = 5.0
"""The chi-square test of the arms' user counts is valid only from about this expected count on."""


class Verdict(NamedTuple):
    """An outcome and the sentence that explains it."""

    outcome: Outcome
    reason: str


def worst(verdicts: list[Verdict]) -> Verdict:
    """Failed beats void beats inconclusive beats passed; an empty list is inconclusive, as no data is no success."""
    for outcome in ("failed", "void", "inconclusive"):
        reasons = [v.reason for v in verdicts if v.outcome == outcome]
        if reasons:
            return Verdict(outcome, "; ".join(reasons))
    if not verdicts:
        return Verdict("inconclusive", "nothing was checked")
    return Verdict("passed", "; ".join(v.reason for v in verdicts))


def gate(observation: Observation, policy: Policy, has_champion: bool) -> Verdict:
    """Absolute limits on the candidate and, when there is a champion, limits on the change against it."""
    new, old = observation.offline_challenger, observation.offline_champion
    verdicts = [_limit(limit, new.get(limit.name), "", new) for limit in parse_limits(policy.gate_limits)]
    if has_champion:
        both = new.keys() & old.keys()
        for limit in parse_limits(policy.gate_changes):
            change = new[limit.name] - old[limit.name] if limit.name in both else None
            verdicts.append(_limit(limit, change, "change of ", both))
    return worst(verdicts) if verdicts else Verdict("passed", "no gate limits are set")


def _limit(limit: Limit, value: float | None, kind: str, known: Collection[str]) -> Verdict:
    """known: the metrics that could be checked."""
    wanted = f"{kind}{limit.name} {limit.sign} {limit.bound:g}"
    if value is None or math.isnan(value):
        remedy = "pretrain again on a dataset with an eval part, beside the champion of now"
        if names := sorted(name for name in known if name.startswith(f"{limit.model}.")):
            remedy = f"there are {', '.join(names)}; abort, and start with limits on these"
        return Verdict("inconclusive", f"{wanted} cannot be checked: no value; {remedy}")
    return Verdict("passed" if limit.holds(value) else "failed", f"{wanted}: {value:.4g}")


def guardrails(serving: Serving, policy: Policy, what: str) -> Verdict:
    """Hard guardrails over the requests that were counted. None of them tolerates a single breach."""
    if serving.requests < policy.guardrail_requests:
        return Verdict("inconclusive", f"{what}: {serving.requests} of {policy.guardrail_requests} requests")
    checks = [
        ("error rate", serving.errors / serving.requests, policy.max_error_rate),
        ("empty result rate", serving.empty / serving.requests, policy.max_empty_rate),
    ]
    if serving.p99_ms is not None:
        checks.append(("p99 latency in ms", serving.p99_ms, policy.max_p99_ms))
    broken = [f"{name} {value:.4g} > {bound:g}" for name, value, bound in checks if not value <= bound]
    if broken:
        return Verdict("failed", f"{what}: {', '.join(broken)}")
    return Verdict("passed", f"{what}: {', '.join(f'{name} {value:.4g}' for name, value, _ in checks)}")


def sample_ratio(observation: Observation, share: int, policy: Policy) -> Verdict:
    """Whether users arrived in the arms as the assignment says; if not, no comparison of them means anything.

    Chi-square with one degree of freedom on the arms' user counts; its tail is erfc(sqrt(x / 2)).
    """
    champion, challenger = observation.champion.users, observation.challenger.users
    total = champion + challenger
    if observation.misassigned > 0.01 * max(total, 1) and observation.misassigned > 1:
        return Verdict("void", f"{observation.misassigned} of {total} users saw a track that is not their own")
    expected = total * share / BUCKETS
    if min(expected, total - expected) < MIN_EXPECTED_USERS:
        return Verdict("inconclusive", f"too few users for the sample ratio test ({champion} + {challenger})")
    chi2 = (challenger - expected) ** 2 / expected + (challenger - expected) ** 2 / (total - expected)
    p = math.erfc(math.sqrt(chi2 / 2))
    text = f"{challenger} of {total} users in the challenger's arm, {expected:.1f} expected, p = {p:.2g}"
    return Verdict("void", f"sample ratio mismatch: {text}") if p < policy.srm_p else Verdict("passed", text)


def quality_z(champion: Arm, challenger: Arm, policy: Policy) -> float | None:
    """z of d = challenger's rate - (1 - tolerated drop) * champion's rate, clustered by user; None = not testable."""
    keep = 1 - policy.max_quality_drop
    variance = challenger.rate_variance + keep**2 * champion.rate_variance
    if not champion.hits or not variance > 0:
        return None
    return (challenger.rate - keep * champion.rate) / math.sqrt(variance)


def quality(champion: Arm, challenger: Arm, policy: Policy, look: int, proof: bool) -> Verdict:
    """One-sided z-tests of the rate of the quality action per impression.

    Failed: it has significantly fallen by more than is tolerated. Passed: significantly not (non-inferiority), or
    `proof` is not asked for. Inconclusive: neither, or the arms vary too little for a test. Look number k (from 0) may
    spend alpha / 2**(k + 1), so that all looks of a step together stay below alpha.
    """
    z = quality_z(champion, challenger, policy)
    text = f"{policy.quality_action} rate {challenger.rate:.4f} against {champion.rate:.4f}"
    if z is None:
        return Verdict("inconclusive", f"{text}: too little variation for a test")
    critical = NormalDist().inv_cdf(1 - policy.alpha / 2 ** (look + 1))
    text += f", z = {z:.2f} against {critical:.2f} at look {look + 1}"
    if z < -critical:
        return Verdict("failed", f"{text}: fell by more than {policy.max_quality_drop:.0%}")
    if z > critical or not proof:
        return Verdict("passed", text if z > critical else f"{text}: no evidence of harm")
    return Verdict("inconclusive", f"{text}: not yet proven to be within {policy.max_quality_drop:.0%}")
