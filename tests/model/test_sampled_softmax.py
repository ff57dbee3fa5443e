"""The sampled softmax and its gradients: the kernels against torch's operators, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.errors import BadInput
from model.sampled_softmax import per_position_cross_entropy, per_position_reference, sampled_softmax
from tests.model.softmax_cases import assert_near

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(positions: int, items: int, dim: int, samples: int, seed: int) -> Problem:
    random = torch.Generator().manual_seed(seed)
    vectors, table = (F.normalize(torch.randn(n, dim, generator=random)) for n in (positions, items))
    wanted = torch.randint(items, (positions,), generator=random)
    return vectors, table, wanted, torch.randint(items, (positions, samples), generator=random)


def loss_and_gradients(
    loss_of: Callable[..., Tensor], inputs: Problem, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss times three, so that the gradient from above counts."""
    v, e = (x.to(dtype).clone().requires_grad_() for x in inputs[:2])
    loss = loss_of(v, e, inputs[2], inputs[3], temperature)
    (3 * loss).backward()
    assert v.grad is not None
    assert e.grad is not None
    return loss.detach(), v.grad, e.grad


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positions=st.integers(1, 150),
    items=st.integers(1, 100),
    dim=st.integers(1, 150),
    samples=st.integers(0, 70),
    temperature=st.sampled_from([0.05, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
@example(positions=148, items=2, dim=125, samples=58, temperature=1.0, seed=66)
def test_the_kernels_are_the_published_formula(
    isa: str, positions: int, items: int, dim: int, samples: int, temperature: float, seed: int
) -> None:
    inputs = problem(positions, items, dim, samples, seed)
    got = loss_and_gradients(per_position_cross_entropy, inputs, temperature, torch.float32)
    want = loss_and_gradients(per_position_reference, inputs, temperature, torch.float64)
    assert_near(got, want, temperature)


@pytest.mark.usefixtures("threads")
def test_a_position_depends_on_no_other_and_no_number_of_threads(isa: str) -> None:
    vectors, table, wanted, drawn = problem(700, 333, 50, 40, 3)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(sampled_softmax(vectors, table, wanted, drawn, 2.0, True))
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            assert torch.equal(one, more)
    half = sampled_softmax(vectors[:350], table, wanted[:350], drawn[:350], 2.0, True)[1]
    assert torch.equal(half, results[0][1][:350] * 2), "the mean is over half as many"


def test_a_drawn_item_that_is_the_wanted_one_is_out_and_others_count_as_often_as_they_were_drawn(isa: str) -> None:
    table, vector = torch.eye(3), torch.tensor([[1.0, 0.0, 0.0]])
    wanted = torch.tensor([0])
    alone = per_position_cross_entropy(vector, table, wanted, torch.tensor([[0, 0, 0]]), 1.0)
    assert alone.item() == 0.0
    twice = per_position_cross_entropy(vector, table, wanted, torch.tensor([[1, 0, 1]]), 1.0)
    assert twice.item() == pytest.approx(math.log((math.e + 2) / math.e), rel=1e-6)
    *_, of_items = sampled_softmax(vector, table, wanted, torch.tensor([[0, 0, 0]]), 1.0, True)
    assert not of_items.any(), "an item that nobody drew, or that was out, learns nothing"


def test_large_logits_and_no_positions_are_fine() -> None:
    v, table = torch.full((2, 3), 100.0), torch.eye(3) * 50
    drawn = torch.tensor([[1, 2], [0, 2]])
    loss = per_position_cross_entropy(v.requires_grad_(), table, torch.tensor([0, 1]), drawn, 0.01)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert per_position_cross_entropy(v[:0], table, nothing, nothing.view(0, 2), 1.0).item() == 0.0


def test_a_nan_is_not_lost(isa: str) -> None:
    for item in range(4):
        table = torch.randn(4, 5)
        table[item, 1] = float("nan")
        wanted, drawn = torch.zeros(3, dtype=torch.int64), torch.tensor([[1, 2, 3]] * 3)
        loss, of_vectors, _ = sampled_softmax(torch.randn(3, 5), table, wanted, drawn, 1.0, True)
        assert loss.isnan()
        assert of_vectors.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("item", [-1, 9])
def test_an_item_beyond_the_catalogue_is_an_error(dtype: torch.dtype, item: int) -> None:
    vectors, table = torch.randn(2, 3, dtype=dtype), torch.randn(9, 3, dtype=dtype)
    fine, wrong = torch.tensor([0, 1]), torch.tensor([0, item])
    for wanted, drawn in ((wrong, fine[:, None]), (fine, wrong[:, None])):
        with pytest.raises((ValueError, IndexError), match=r"item -?\d of row 1 is none of the 9|out of range"):
            per_position_cross_entropy(vectors, table, wanted, drawn, 1.0)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    vectors, table, wanted, drawn = problem(4, 9, 3, 2, 0)
    for inputs in (
        (vectors, table[:, :2], wanted, drawn),
        (vectors, table, wanted[:3], drawn),
        (vectors, table, wanted, drawn[:3]),
        (vectors, table, wanted, drawn[:, 0]),
        (vectors, table, wanted, drawn.float()),
        (vectors, table, wanted.int(), drawn),
    ):
        with pytest.raises(BadInput, match=r"wanted \(N,\) and drawn \(N, S\) int64, got \(4, 3\)"):
            per_position_cross_entropy(*inputs, 1.0)


def test_what_is_frozen_gets_no_gradient_and_a_second_derivative_is_refused() -> None:
    vectors, table, wanted, drawn = problem(5, 9, 3, 4, 1)
    vectors.requires_grad_()
    loss = per_position_cross_entropy(vectors, table, wanted, drawn, 1.0)
    loss.backward(retain_graph=True)
    assert vectors.grad is not None
    assert table.grad is None
    with pytest.raises(RuntimeError, match="no second derivative; leave out create_graph"):
        torch.autograd.grad(loss, vectors, create_graph=True)
    with torch.no_grad():
        assert per_position_cross_entropy(vectors, table, wanted, drawn, 1.0) == loss


def test_the_operator_keeps_torchs_rules() -> None:
    for gradients in (True, False):
        torch.library.opcheck(sampled_softmax, (*problem(20, 30, 6, 5, 2), 2.0, gradients))
