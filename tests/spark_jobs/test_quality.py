from __future__ import annotations

from components.schemas import ACTIONS
from spark_jobs.join import REASONS
from spark_jobs.quality import Limits, check, label_rates

LIMITS = Limits(max_quarantine_share=0.2, max_duplicate_share=0.5, max_label_ratio=20)


def counts(**some: int) -> dict[str, int]:
    base = dict.fromkeys([f"positive_{a}" for a in ACTIONS] + [f"quarantined_{r}" for r in REASONS], 0)
    base |= {"impressions": 1000, "actions": 500, "interactions": 1000, "duplicates": 0, "quarantined": 0}
    return base | some


def test_clean_counts_pass_with_their_shares_and_rates() -> None:
    report = check("w", counts(positive_click=250, duplicates=15, quarantined=30, quarantined_late_action=30), LIMITS)
    assert report.failures == []
    assert (report.quarantine_share, report.duplicate_share) == (0.02, 0.01)
    assert report.label_rates["click"] == 0.25


def test_a_quarantine_share_above_its_limit_names_the_reasons_by_frequency() -> None:
    bad = counts(quarantined=310, quarantined_late_action=10, quarantined_no_impression=300)
    (failure,) = check("w", bad, LIMITS).failures
    assert "20.7% of the events are quarantined (300 no_impression, 10 late_action)" in failure


def test_a_duplicate_share_above_its_limit_fails() -> None:
    (failure,) = check("w", counts(duplicates=900), LIMITS).failures
    assert failure.startswith("60.0% of the events are duplicates")


def test_shares_of_a_handful_of_events_are_not_judged() -> None:
    few = counts(impressions=2, interactions=2, actions=2, quarantined=2, quarantined_no_impression=2)
    assert check("w", few, LIMITS).failures == []


def test_a_label_that_vanished_fails_and_one_that_fell_a_little_passes() -> None:
    before = ("v", counts(positive_click=300, positive_like=300))
    (failure,) = check("w", counts(positive_like=60), LIMITS, before).failures
    assert failure.startswith("click is on 0.00% of the interactions, after 30.00% in v")


def test_a_rare_label_may_come_and_go() -> None:
    before = ("v", counts(positive_share=30))
    assert check("w", counts(), LIMITS, before).failures == []


def test_a_label_that_appears_from_nothing_fails() -> None:
    (failure,) = check("w", counts(positive_share=300), LIMITS, ("v", counts())).failures
    assert failure.startswith("share is on 30.00% of the interactions, after 0.00% in v")


def test_one_positive_less_than_the_limit_expects_is_chance() -> None:
    """102 likes and a factor of 100: one or none are what a rate just inside the limit gives."""
    before, lenient = ("v", counts(positive_like=102)), LIMITS.model_copy(update={"max_label_ratio": 100})
    assert check("w", counts(positive_like=1), lenient, before).failures == []
    assert check("w", counts(positive_like=0), lenient, before).failures == []
    (failure,) = check("w", counts(positive_like=0), LIMITS, before).failures
    assert failure.startswith("like is on 0.00% of the interactions")


def test_windows_of_different_length_are_compared_by_their_rates() -> None:
    day, hour = counts(interactions=24_000, positive_click=6_000), counts(interactions=1_000, positive_click=250)
    assert check("w", hour, LIMITS, ("v", day)).failures == []
    assert check("w", day, LIMITS, ("v", hour)).failures == []
    assert check("w", hour | {"positive_click": 2}, LIMITS, ("v", day)).failures != []


def test_a_window_without_interactions_has_rates_of_zero() -> None:
    assert set(label_rates(counts(interactions=0)).values()) == {0.0}


def test_a_window_without_interactions_is_no_measure_for_the_next() -> None:
    assert check("w", counts(positive_click=250), LIMITS, ("v", counts(interactions=0))).failures == []
