"""Losses against their plain formulas, and what the corrections are for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import losses
from model.losses import (
    catalogue_cross_entropy,
    log_seconds_error,
    sampled_binary_cross_entropy,
    sampled_cross_entropy,
)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 9),
    st.sampled_from([0.05, 1.0, 5.0]),
    st.integers(0, 99),
    st.sampled_from([1, 100, 1 << 18]),
)
def test_the_softmax_over_the_catalogue_and_its_gradients_are_cross_entropy(
    positions: int, items: int, dim: int, temperature: float, seed: int, chunk: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    vectors, table = (torch.randn(n, dim, generator=random, dtype=torch.float64) for n in (positions, items))
    wanted = torch.randint(items, (positions,), generator=random)
    results = []
    for fast in (True, False):
        v, e = vectors.clone().requires_grad_(), table.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "CHUNK_ELEMENTS", chunk)
            loss = (
                catalogue_cross_entropy(v, e, wanted, temperature)
                if fast
                else F.cross_entropy(v @ e.T / temperature, wanted)
            )
        (3 * loss).backward()
        results.append((loss.detach(), v.grad, e.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_softmax_survives_large_logits_and_no_positions() -> None:
    v = torch.full((2, 3), 100.0, requires_grad=True)
    loss = catalogue_cross_entropy(v, torch.eye(3) * 50, torch.tensor([0, 1]), 0.01)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
    assert catalogue_cross_entropy(v[:0], torch.eye(3), torch.zeros(0, dtype=torch.int64), 1.0).item() == 0.0


def test_the_chunks_never_hold_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 64)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest = max(biggest, out.numel())
            return out

    vectors = torch.randn(500, 4, requires_grad=True)
    with Watch():
        catalogue_cross_entropy(vectors, torch.randn(40, 4), torch.zeros(500, dtype=torch.int64), 1.0).backward()
    assert biggest <= 500 * 4, "all that is kept is as large as the vectors"


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
