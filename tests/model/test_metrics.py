"""Metrics against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from model.metrics import (
    auc,
    calibration,
    calibration_curve,
    hit_rate,
    log_loss,
    ndcg,
    normalised_entropy,
    ranks_of,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.integers(0, 10_000), st.integers(1, 50))
def test_auc_and_log_loss_equal_scikit_learn_with_ties(count: int, seed: int, levels: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    scores = (random.integers(0, levels, count) + 1) / (levels + 1)
    if len(np.unique(labels)) == 2:
        assert auc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-12)
    assert log_loss(labels, scores) == pytest.approx(reference.log_loss(labels, scores, labels=[0, 1]), abs=1e-12)


def test_one_class_has_neither_auc_nor_normalised_entropy() -> None:
    for labels in ([0, 0], [1, 1], []):
        assert math.isnan(auc(labels, [0.5] * len(labels)))
        assert math.isnan(normalised_entropy(labels, [0.5] * len(labels)))


def test_normalised_entropy_of_the_mean_is_one_and_of_knowledge_is_less() -> None:
    labels = np.array([0, 0, 0, 1])
    assert normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1.0)
    assert normalised_entropy(labels, [0.1, 0.1, 0.1, 0.9]) < 0.3 < 1.0 < normalised_entropy(labels, np.full(4, 0.9))


def test_a_certain_and_wrong_prediction_costs_a_finite_loss() -> None:
    assert log_loss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(1e-7))


def test_calibration_compares_promises_with_outcomes() -> None:
    assert calibration([1, 0, 1, 0], [0.5] * 4) == pytest.approx(1.0)
    assert calibration([1, 0, 0, 0], [0.5] * 4) == pytest.approx(2.0)
    assert math.isnan(calibration([0, 0], [0.5, 0.5]))


def test_the_calibration_curve_has_bins_of_equal_count_in_order() -> None:
    random = np.random.default_rng(0)
    probability = random.random(10_000)
    labels = random.random(10_000) < probability
    predicted, observed, count = calibration_curve(labels, probability, bins=5)
    assert count.tolist() == [2000] * 5 and (np.diff(predicted) > 0).all()
    assert np.abs(predicted - observed).max() < 0.04
    assert len(calibration_curve([1, 0], [0.2, 0.7], bins=10)[0]) == 2


def test_hit_rate_and_ndcg_by_hand() -> None:
    ranks = [1, 3, 10, 11]
    assert hit_rate(ranks, 10) == pytest.approx(3 / 4)
    assert ndcg(ranks, 10) == pytest.approx((1 + 0.5 + 1 / math.log2(11)) / 4)
    assert math.isnan(hit_rate([], 10))


def test_equal_scores_and_scores_that_are_no_number_count_against_a_rank() -> None:
    scores = np.array([[3.0, 2, 1], [1, 1, 1], [3, math.nan, 1], [math.nan] * 3])
    assert ranks_of(scores, scores[:, 0]).tolist() == [1, 3, 2, 3]


def test_scores_that_are_no_number_have_no_auc() -> None:
    assert math.isnan(auc([0, 1, 1], [0.1, math.nan, math.nan]))
