"""Losses against their plain formulas, and what the corrections are for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model.losses import (
    log_seconds_error,
    sampled_binary_cross_entropy,
    sampled_cross_entropy,
)


def test_the_sampled_softmax_over_everything_is_the_full_one() -> None:
    vectors, items = torch.randn(6, 4), torch.randn(9, 4)
    wanted = torch.randint(9, (6,))
    hits = torch.arange(9)[None, :] == wanted[:, None]
    got = sampled_cross_entropy(vectors, items[wanted], items, hits, 0.0, 0.5)
    torch.testing.assert_close(got, F.cross_entropy(vectors @ items.T / 0.5, wanted))


def test_the_sampled_denominator_is_unbiased_with_log_q() -> None:
    torch.manual_seed(0)
    vector, items = torch.randn(1, 4), torch.randn(50, 4)
    own = (vector * items[:1]).sum()
    full = (vector @ items.T).exp().sum()
    estimates = []
    for _ in range(3000):
        drawn = torch.randperm(50)[:10]
        loss = sampled_cross_entropy(vector, items[:1], items[drawn], drawn[None] == 0, math.log(10 / 50), 1.0)
        estimates.append((loss + own).exp())
    error = torch.stack(estimates).std() / 3000**0.5
    assert abs(torch.stack(estimates).mean() - full) < 5 * error
    assert error < 0.03 * full


def test_log_odds_correction_learns_the_true_rate_from_sampled_negatives() -> None:
    """The best constant logit on a sample must be the log-odds of everything, not of the sample."""
    random = torch.Generator().manual_seed(1)
    labels = (torch.rand(40_000, 1, generator=random) < 0.1).float()
    kept = (labels > 0) | (torch.rand(40_000, 1, generator=random) < 0.2)
    logit = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=50)

    def closure() -> float:
        optimizer.zero_grad()
        loss = sampled_binary_cross_entropy(logit.expand(len(labels), 1), labels, kept, 0.2) / len(labels)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    assert torch.sigmoid(logit).item() == pytest.approx(float(labels.mean()), rel=0.03)
    assert float(labels[kept].mean()) > 0.3, "the sample itself promises three times as much"


def test_watch_time_that_is_not_a_number_is_left_out() -> None:
    seconds = torch.tensor([0.0, 9.0, float("nan"), float("inf"), -1.0])
    predicted = torch.ones(5, requires_grad=True)
    loss = log_seconds_error(predicted, seconds)
    loss.backward()
    assert loss.item() == pytest.approx(1 + (1 - math.log(10)) ** 2, rel=1e-5)
    assert predicted.grad is not None and predicted.grad[2:].tolist() == [0.0, 0.0, 0.0]
