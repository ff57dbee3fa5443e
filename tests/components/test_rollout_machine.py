"""The rollout machine: its way to a promotion, to a rollback, and what must hold on every way."""

from __future__ import annotations

from datetime import timedelta
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from components.rollout.evidence import Arm, Observation, Serving
from components.rollout.machine import BY_HAND, Order, aliases, required_gates, step
from components.rollout.policy import Policy
from components.rollout.state import ACTIVE, Alias, Release, RolloutState
from components.rollout.verdicts import quality, quality_z
from tests.components.rollout_cases import (
    GOOD_OFFLINE,
    GOOD_SERVING,
    GOOD_SHADOW,
    NEW,
    OLD,
    POLICY,
    START,
    arm,
    canary_observation,
    champion_state,
    good,
    reach,
    started,
)

LATER = timedelta(seconds=61)


def test_good_evidence_leads_through_every_stage_to_champion() -> None:
    state, now, seen = started(champion_state()), START, []
    while state.stage in ACTIVE:
        seen.append((state.stage, state.share, state.shadow_share))
        now += LATER
        state, actions = step(state, good(state), now, POLICY)
    assert seen == [("gate", 0, 0.0), ("shadow", 0, 1.0), ("canary", 1000, 0.0), ("canary", 5000, 0.0)]
    assert (state.stage, state.champion, state.previous, state.challenger) == ("promoted", NEW, OLD, None)
    assert state.passed == ("gate", "shadow", "canary:1000", "canary:5000")
    assert Alias(model="ranker", alias="champion", version=2) in actions
    assert Alias(model="retriever", alias="challenger", version=None) in actions


def test_a_falling_click_rate_rolls_back_to_the_champion() -> None:
    state = reach("canary")
    after, actions = step(state, canary_observation(1000, rate=0.3), state.at + LATER, POLICY)
    assert (after.stage, after.champion, after.challenger, after.share) == ("rolled_back", OLD, None, 0)
    assert "fell by more than 10%" in after.reason
    assert Alias(model="ranker", alias="champion", version=1) in actions


@pytest.mark.parametrize(
    "serving",
    [
        Serving(requests=1000, errors=50, p99_ms=50),
        Serving(requests=1000, empty=50, p99_ms=50),
        Serving(requests=1000, p99_ms=5000),
    ],
    ids=["errors", "empty results", "latency"],
)
def test_a_broken_hard_guardrail_rolls_back_at_once(serving: Serving) -> None:
    for stage in ("shadow", "canary"):
        state = reach(stage)
        bad = good(state).model_copy(update={"serving": serving})
        assert step(state, bad, state.at, POLICY)[0].stage == "rolled_back"


def test_the_first_release_needs_its_gate_only() -> None:
    state, _ = step(started(RolloutState(), OLD), GOOD_OFFLINE, START, POLICY)
    assert (state.stage, state.champion, state.passed) == ("promoted", OLD, ("gate",))


def test_the_gate_rejects_what_is_worse_than_the_champion() -> None:
    worse = Observation(offline_champion={"ranker.auc_click": 0.8}, offline_challenger={"ranker.auc_click": 0.7})
    state, _ = step(started(champion_state()), worse, START, POLICY)
    assert (state.stage, state.champion, state.challenger) == ("rejected", OLD, None)
    assert "change of ranker.auc_click >= -0.01: -0.1" in state.reason


def test_a_gate_without_metrics_pauses_and_names_what_is_missing() -> None:
    state, _ = step(started(champion_state()), Observation(), START, POLICY)
    assert (state.stage, state.resume_to) == ("paused", "gate")
    assert "ranker.auc_click" in state.reason and "pretrain again" in state.reason


def test_a_limit_on_a_metric_that_the_candidate_lacks_pauses_and_names_those_it_has() -> None:
    """As a log without clicks leads to, whatever is pretrained again."""
    likes = Observation(offline_challenger={"ranker.auc_like": 0.7, "retriever.hr_10": 0.2})
    state, _ = step(started(RolloutState(), OLD), likes, START, POLICY)
    assert state.stage == "paused" and "pretrain again" not in state.reason
    assert "there are ranker.auc_like; abort, and start with limits on these" in state.reason


def test_approval_waits_for_a_person() -> None:
    policy = POLICY.model_copy(update={"approval": True})
    state = reach("approval", policy)
    waited, _ = step(state, GOOD_OFFLINE, state.at + timedelta(days=30), policy)
    assert waited is state
    approved, _ = step(state, Observation(), state.at, policy, Order(command="approve", by="ana"))
    assert (approved.stage, approved.by, approved.passed) == ("shadow", "ana", ("gate", "approval"))


def test_missing_data_pauses_after_the_longest_bake_time() -> None:
    state = reach("canary")
    assert step(state, Observation(), state.at + LATER, POLICY)[0] is state
    paused, _ = step(state, Observation(), state.at + timedelta(seconds=600), POLICY)
    assert (paused.stage, paused.share, paused.resume_to) == ("paused", 1000, "canary")


def test_each_stage_begins_at_a_time_of_its_own_though_clocks_differ() -> None:
    """Servers count the requests of a stage under the time at which it began."""
    state = reach("canary")
    slow = state.at - timedelta(minutes=1)  # the clock of the machine of whoever gives the orders
    paused, _ = step(state, Observation(), slow, POLICY, Order(command="pause"))
    resumed, _ = step(paused, Observation(), slow, POLICY, Order(command="resume"))
    assert state.stage_since < paused.stage_since < resumed.stage_since


def test_a_sample_ratio_mismatch_voids_even_the_best_numbers() -> None:
    state = reach("canary")
    skewed = Observation(champion=arm(1000, 0.3), challenger=arm(1000, 0.9), serving=GOOD_SERVING)
    paused, _ = step(state, skewed, state.at + LATER, POLICY)
    assert (paused.stage, paused.share) == ("paused", 1000)
    assert "sample ratio mismatch" in paused.reason


def test_users_on_a_track_that_is_not_theirs_void_the_numbers() -> None:
    state = reach("canary")
    mixed = canary_observation(1000).model_copy(update={"misassigned": 200})
    assert step(state, mixed, state.at + LATER, POLICY)[0].stage == "paused"


def test_the_last_step_demands_proof_and_looks_at_doubling_samples() -> None:
    state = reach("canary")
    state, _ = step(state, canary_observation(1000), state.at + LATER, POLICY)
    assert state.share == 5000
    unproven = canary_observation(5000, rate=0.5, champion_rate=0.5, users=120)
    tight = POLICY.model_copy(update={"max_quality_drop": 0.001})
    state = state.model_copy(update={"policy": tight})
    looked, _ = step(state, unproven, state.at + LATER, tight)
    assert (looked.stage, looked.looks, looked.stage_since) == ("canary", 1, state.stage_since)
    again, _ = step(looked, unproven, looked.at + LATER, tight)
    assert again is looked, "the same sample must not be tested twice"
    paused, _ = step(looked, unproven, looked.at + timedelta(seconds=600), tight)
    assert paused.stage == "paused"


def test_resume_returns_to_the_same_share_with_a_fresh_period() -> None:
    state = reach("canary")
    paused, _ = step(state, Observation(), state.at + LATER, POLICY, Order(command="pause"))
    resumed, _ = step(paused, Observation(), paused.at + LATER, POLICY, Order(command="resume"))
    assert (resumed.stage, resumed.share, resumed.stage_since) == ("canary", 1000, paused.at + LATER)


def test_a_resumed_step_begins_to_look_anew() -> None:
    policy = POLICY.model_copy(update={"shares": "5000"})
    looked, _ = step(reach("canary", policy), canary_observation(5000, rate=0.45), START + 3 * LATER, policy)
    assert (looked.stage, looked.looks) == ("canary", 1), "neither proven to be within the tolerance nor beyond it"
    paused, _ = step(looked, Observation(), looked.at, policy, Order(command="pause"))
    assert step(paused, Observation(), paused.at, policy, Order(command="resume"))[0].looks == 0


def test_all_looks_of_a_step_together_err_at_most_at_the_level_of_the_policy() -> None:
    reasons = [quality(arm(900, 0.5), arm(900, 0.45), POLICY, look, True).reason for look in range(12)]
    bounds = [float(reason.split(" against ")[2].split()[0]) for reason in reasons]
    levels = [1 - NormalDist().cdf(bound) for bound in bounds]
    assert sum(levels) == pytest.approx(POLICY.alpha, rel=0.02) and levels == sorted(levels, reverse=True)


def test_z_is_a_standard_normal_where_the_rate_fell_by_just_what_is_tolerated() -> None:
    random, policy = np.random.default_rng(0), POLICY.model_copy(update={"max_quality_drop": 0.5})

    def drawn(rate: float) -> Arm:
        hits = random.binomial(20, rate, 200)
        squares, products = int((hits**2).sum()), int(20 * hits.sum())
        return Arm(users=200, impressions=4000, hits=hits.sum(), sum_nn=80_000, sum_xx=squares, sum_nx=products)

    z = np.array([quality_z(drawn(0.6), drawn(0.3), policy) for _ in range(1000)], float)
    assert abs(z.mean()) < 0.1 and z.std() == pytest.approx(1, abs=0.08)


def test_promote_by_hand_skips_canary_steps_but_no_guardrail() -> None:
    state = reach("canary")
    order = Order(command="promote", by="ana")
    promoted, _ = step(state, Observation(serving=GOOD_SERVING), state.at, POLICY, order)
    assert (promoted.stage, promoted.champion, promoted.passed[-1]) == ("promoted", NEW, BY_HAND)
    broken = Observation(serving=Serving(requests=100, errors=100))
    assert step(state, broken, state.at, POLICY, order)[0].stage == "rolled_back"
    void, _ = step(state, canary_observation(5000), state.at, POLICY, order)
    assert (void.stage, void.champion) == ("paused", OLD) and "sample ratio mismatch" in void.reason
    for stage in ("gate", "shadow", "paused"):
        before = reach("canary") if stage == "paused" else reach(stage)
        if stage == "paused":
            before, _ = step(before, Observation(), before.at, POLICY, Order(command="pause"))
        with pytest.raises(BadInput, match="cannot promote"):
            step(before, GOOD_SHADOW, before.at, POLICY, order)


def test_abort_after_a_promotion_returns_to_the_champion_before() -> None:
    promoted = reach("promoted")
    state, actions = step(promoted, Observation(), promoted.at, POLICY, Order(command="abort", reason="bad feed"))
    assert (state.stage, state.champion, state.reason) == ("rolled_back", OLD, "bad feed")
    assert Alias(model="ranker", alias="champion", version=1) in actions


def test_a_newer_candidate_replaces_a_waiting_one_but_none_that_sees_traffic() -> None:
    newer = Release(ranker=3, retriever=3)
    assert started(started(champion_state()), newer).challenger == newer
    with pytest.raises(BadInput, match="abort it before"):
        started(reach("shadow"), newer)


def test_starting_the_same_release_again_changes_nothing() -> None:
    state = reach("canary")
    assert started(state) is state
    promoted = reach("promoted")
    assert started(promoted) is promoted


def test_a_rollout_keeps_the_policy_it_started_with() -> None:
    state = reach("canary")
    lax = POLICY.model_copy(update={"max_quality_drop": 0.9})
    assert step(state, canary_observation(1000, rate=0.3), state.at + LATER, lax)[0].stage == "rolled_back"


ARMS = st.builds(arm, users=st.integers(0, 3000), rate=st.sampled_from([0.0, 0.3, 0.5, 0.6]))
SERVINGS = st.builds(
    Serving,
    requests=st.sampled_from([0, 10, 1000]),
    errors=st.sampled_from([0, 0, 0, 9]),
    empty=st.sampled_from([0, 0, 0, 9]),
    p99_ms=st.sampled_from([None, 50.0, 50.0, 9000.0]),
)
METRICS = st.sampled_from(
    [{}, {"ranker.auc_click": 0.7}, {"ranker.auc_click": 0.5}, {"ranker.auc_click": float("nan")}]
)
ANYTHING = st.builds(
    Observation,
    champion=ARMS,
    challenger=ARMS,
    misassigned=st.sampled_from([0, 0, 0, 500]),
    shadow=SERVINGS,
    serving=st.one_of(st.none(), SERVINGS),
    serving_required=st.booleans(),
    offline_champion=METRICS,
    offline_challenger=METRICS,
)
COMMANDS = st.sampled_from(["advance"] * 10 + ["start", "approve", "promote", "pause", "resume", "abort"])
EVENT = st.tuples(COMMANDS, st.one_of(st.just(None), ANYTHING), st.sampled_from([0, 1, 61, 700]))
POLICIES = st.builds(
    lambda approval, shares, proof: POLICY.model_copy(
        update={"approval": approval, "shares": shares, "require_proof": proof}
    ),
    st.booleans(),
    st.sampled_from(["100", "1000,5000", "100,1000,9999"]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(policy=POLICIES, events=st.lists(EVENT, max_size=30))
def test_the_invariants_hold_on_every_way(policy: Policy, events: list[tuple]) -> None:
    """None as an observation stands for evidence with which the stage passes, so that the ways get far."""
    state, now, releases = RolloutState(), START, 0
    for command, observation, seconds in events:
        now += timedelta(seconds=seconds)
        evidence = good(state) if observation is None else observation
        release = Release(ranker=releases + 1, retriever=releases + 1) if command == "start" else None
        order = Order(command=command, release=release)
        try:
            after, actions = step(state, evidence, now, policy, order)
        except BadInput:
            assert command not in ("advance",), "letting the evidence decide is always allowed"
            assert not (command == "abort" and state.stage in ACTIVE), "abort always wins"
            continue
        assert (after, actions) == step(state, evidence, now, policy, order), "a step is a pure function"
        assert command != "abort" or state.stage not in ACTIVE or after.stage == "rolled_back", "abort always wins"
        releases += command == "start"
        _check_step(state, after, command)
        assert actions == aliases(after)
        state = after


def _check_step(before: RolloutState, after: RolloutState, command: str) -> None:
    if after is before:
        return
    assert after.seq == before.seq + 1 and after.at >= before.at
    assert (after.challenger is not None) == (after.stage in ACTIVE)
    assert after.stage in ACTIVE or (after.share, after.shadow_share) == (0, 0.0)
    if "paused" in (before.stage, after.stage):
        assert after.share <= before.share and after.shadow_share <= before.shadow_share, "traffic rose while paused"
    if command == "abort":
        assert after.stage == "rolled_back"
    if before.stage in ("rolled_back", "rejected", "promoted", "empty"):
        assert command in ("start", "abort"), "an ended rollout goes on only by an order"
    if after.share > before.share:
        assert command in ("advance",) and after.policy is not None
        steps = (0, *after.policy.steps)
        assert steps.index(after.share) == steps.index(before.share) + 1, "one step at a time"
    if after.stage == "promoted":
        assert after.policy is not None and after.champion == before.challenger
        needed = required_gates(after.policy, first=before.champion is None)
        by_hand = after.passed[-1] == BY_HAND
        assert [g for g in needed if g not in after.passed and not (by_hand and g.startswith("canary"))] == []
    elif not (command == "abort" and before.stage == "promoted"):
        assert after.champion == before.champion, "only a promotion or its abort changes the champion"


@settings(max_examples=100, deadline=None)
@given(policy=POLICIES, seconds=st.lists(st.integers(0, 1000), max_size=20), required=st.booleans())
def test_no_data_never_moves_a_rollout_forward(policy: Policy, seconds: list[int], required: bool) -> None:
    for stage in ("gate", "shadow", "canary"):
        state = reach(stage, policy)
        now = state.at
        for pause in seconds:
            now += timedelta(seconds=pause)
            after, _ = step(state, Observation(serving_required=required), now, policy)
            assert after.stage in (stage, "paused") and after.share == state.share and after.passed == state.passed
            state = after


@settings(max_examples=100, deadline=None)
@given(later=st.lists(st.tuples(COMMANDS.filter(lambda c: c != "start"), ANYTHING), max_size=10))
def test_an_abort_is_final_for_its_rollout(later: list[tuple]) -> None:
    state = reach("canary")
    aborted, _ = step(state, canary_observation(1000), state.at, POLICY, Order(command="abort"))
    for command, observation in later:
        try:
            after, _ = step(aborted, observation, aborted.at + LATER, POLICY, Order(command=command))
        except BadInput:
            continue
        assert after is aborted
