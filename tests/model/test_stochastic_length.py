"""Stochastic length: equation 4 of the paper, its table of sparsity, and what must not depend on chance."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from model.settings import ModelConfig
from model.stochastic_length import StochasticLength, age_weights
from tests.model.make import user

ALPHAS = (1.6, 1.7, 1.8, 1.9, 2.0)
SPARSITY = {
    1024: (71.5, 56.1, 40.2, 17.2, 3.1),
    2048: (76.1, 63.6, 45.3, 21.0, 6.6),
    4096: (80.5, 69.8, 54.1, 36.3, 29.1),
    8192: (84.4, 75.6, 66.4, 64.1, 64.1),
}
"""The paper's table: % of max length N that training does not read, by N and alpha (30 days)."""
LENGTHS = {0: 0.020, 391: 0.033, 1009: 0.060, 2070: 0.376, 3978: 0.252, 4110: 0.251, 8431: 0.008}
"""Lengths of users and their shares. The paper does not give them; these explain all 20 cells best by equation 4."""


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return np.repeat(list(LENGTHS), [round(20_000 * share) for share in LENGTHS.values()])


@pytest.mark.parametrize("limit", SPARSITY)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_sparsity_is_that_of_the_papers_table(limit: int, alpha: float, counts: np.ndarray) -> None:
    """Within 4 points: one set of lengths for all cells, and a table that the paper rounds from real users."""
    kept = StochasticLength(limit, alpha).lengths(counts, np.arange(len(counts)), 0)
    published = SPARSITY[limit][ALPHAS.index(alpha)]
    assert 100 * (1 - kept.mean() / limit) == pytest.approx(published, abs=4.0)


def test_without_the_chance_of_the_full_sequence_the_table_cannot_be_met(counts: np.ndarray) -> None:
    short = np.minimum(counts, StochasticLength(1024, 1.9).short)
    assert 100 * (1 - short.mean() / 1024) - SPARSITY[1024][3] > 10


@pytest.mark.parametrize(
    ("limit", "alpha", "short"), [(100, 2.0, 100), (1000, 1.5, 177), (32, 1.2, 8), (1024, 1.4, 128), (2, 1.1, 1)]
)
def test_the_short_length_is_the_whole_part_of_its_power(limit: int, alpha: float, short: int) -> None:
    """Also where the power is a whole number that a float misses by its last bits."""
    assert StochasticLength(limit, alpha).short == short


def test_only_what_is_longer_than_the_short_length_is_chance() -> None:
    counts = np.array([15, 16, 100, 500])
    assert StochasticLength(100, 1.2).shortens(counts).tolist() == [False, True, True, True]
    assert not StochasticLength(100, 2.0).shortens(counts).any(), "the newest 100, in each epoch"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9000), st.sampled_from([64, 1024, 8192]), st.sampled_from(ALPHAS), st.integers(0, 9))
def test_a_length_is_the_full_one_or_the_short_one_of_equation_4(
    count: int, limit: int, alpha: float, epoch: int
) -> None:
    rule = StochasticLength(limit, alpha)
    kept = int(rule.lengths(np.array([count]), np.array([7]), epoch)[0])
    full = min(count, limit)
    assert kept in (full, rule.short) if full > rule.short else kept == full


def test_the_full_sequence_is_kept_with_the_probability_of_equation_4() -> None:
    rule, users = StochasticLength(1000, 1.7), np.arange(20_000)
    kept = rule.lengths(np.full(20_000, 800), users, 3)
    assert (kept == 800).mean() == pytest.approx(1000**1.7 / 800**2, abs=0.012)
    others = rule.lengths(np.full(20_000, 800), users, 4)
    assert (kept != others).mean() > 0.1, "another epoch, another draw"


@pytest.mark.parametrize("selection", ["weighted", "greedy", "uniform"])
def test_a_subsequence_is_ordered_and_keeps_its_actions(selection: str) -> None:
    rule, events = StochasticLength(100, 1.2, selection), user(3, 90, 1)
    assert rule.short == 15
    cut = next(c for epoch in range(20) if len(c := rule.cut(events, epoch, keep_new=False)) < 90)
    assert len(cut) == 15 and (np.diff(cut.timestamp) >= 0).all()
    keys = [list(zip(u.request_id, u.position, u.item_id, u.actions, strict=True)) for u in (events, cut)]
    assert set(keys[1]) <= set(keys[0])
    mask = np.zeros(len(cut), dtype=np.int64)
    np.bitwise_or.at(mask, cut.action_of, cut.action_mask)
    assert (mask == cut.actions).all(), "the made-up users have an action event for each action"
    if selection == "greedy":
        np.testing.assert_array_equal(cut.item_id, events.item_id[-15:])


def test_age_decides_which_interactions_are_kept() -> None:
    events = user(3, 3, 1)
    events.timestamp = np.array([0, 90, 100])
    np.testing.assert_allclose(age_weights(events.timestamp), [1 - 100 / 110, 1 - 10 / 110, 1.0])
    rule, kept = StochasticLength(3, 1e-9 + 1.0, "weighted"), np.zeros(3)
    for epoch in range(4000):
        cut = rule.cut(events, epoch, keep_new=False)
        if len(cut) == 1:
            kept[np.flatnonzero(events.timestamp == cut.timestamp[0])[0]] += 1
    np.testing.assert_allclose(kept / kept.sum(), np.array([1 / 11, 10 / 11, 1]) / 2, atol=0.03)
    assert age_weights(np.array([5, 5, 5])).tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_what_is_to_be_learned_is_never_dropped_when_it_must_be_kept(count: int, new_from: int, epoch: int) -> None:
    events = user(5, count, 2, new_from=min(new_from, count))
    cut = StochasticLength(20, 1.5).cut(events, epoch, keep_new=True)
    new = len(events) - events.new_from
    np.testing.assert_array_equal(cut.item_id[cut.new_from :], events.item_id[events.new_from :])
    assert len(cut) <= max(20, new)


def test_context_is_chosen_from_what_the_limit_leaves_beside_the_new_interactions() -> None:
    events, rule = user(5, 60, 2, new_from=50), StochasticLength(20, 1.5, "uniform")
    events.item_id = np.arange(60)
    kept = [rule.cut(events, epoch, keep_new=True).item_id.tolist() for epoch in range(20)]
    assert {len(ids) for ids in kept} == {10, 20}
    assert all(ids == list(range(60 - len(ids), 60)) for ids in kept)


def test_the_draw_depends_on_the_user_and_the_epoch_and_on_nothing_else() -> None:
    rule = StochasticLength(40, 1.3, "uniform", seed=3)
    picks = [rule.cut(user(i, 60, 1), e, keep_new=False).item_id.tolist() for i in (1, 2) for e in (0, 1)]
    again = [rule.cut(user(i, 60, 1), e, keep_new=False).item_id.tolist() for i in (1, 2) for e in (0, 1)]
    assert picks == again and len({tuple(p) for p in picks}) == 4


def test_whole_histories_are_the_default() -> None:
    assert StochasticLength.of(ModelConfig()) is None
    rule = StochasticLength.of(ModelConfig(max_interactions=10))
    assert rule is not None and len(rule.cut(user(1, 30), 0, keep_new=False)) == 10


def test_interactions_out_of_order_are_refused_since_the_newest_could_not_be_told() -> None:
    events = user(1, 12)
    swapped = dataclasses.replace(events, timestamp=events.timestamp[::-1].copy())
    with pytest.raises(BadInput, match="order of time; sort"):
        StochasticLength(4, 1.5, "greedy").cut(swapped, 0, keep_new=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"limit": 0}, "limit of at least 1 .* got 0 and"),
        ({"alpha": 1.0}, "alpha above 1 .* and 1"),
        ({"alpha": 2.5}, "at most 2, got 8 and 2.5"),
        ({"selection": "newest"}, "unknown selection 'newest'; use one of weighted, greedy"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        StochasticLength(**{"limit": 8, **setting})
