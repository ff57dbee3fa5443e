"""The softmax over the catalogue and its gradients: against torch's cross-entropy, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.errors import BadInput
from model import softmax
from model.softmax import catalogue_cross_entropy, catalogue_softmax
from tests.model.softmax_cases import assert_near


def problem(positions: int, items: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    vectors, table = (torch.randn(n, dim, generator=random, dtype=torch.float64) for n in (positions, items))
    return vectors, table, torch.randint(items, (positions,), generator=random)


def loss_and_gradients(
    vectors: Tensor, table: Tensor, wanted: Tensor, temperature: float, *, ours: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, or torch's; the loss times three, so that the gradient from above counts."""
    v, e = vectors.clone().requires_grad_(), table.clone().requires_grad_()
    loss = (
        catalogue_cross_entropy(v, e, wanted, temperature) if ours else F.cross_entropy(v @ e.T / temperature, wanted)
    )
    (3 * loss).backward()
    assert v.grad is not None
    assert e.grad is not None
    return loss.detach(), v.grad, e.grad


SIZES = (st.integers(1, 200), st.integers(1, 200), st.integers(1, 70), st.sampled_from([0.05, 1.0, 5.0]))


@settings(max_examples=25, deadline=None)
@given(*SIZES, st.integers(0, 99), st.sampled_from([1, 100, 1 << 18]))
def test_the_reference_is_cross_entropy(
    positions: int, items: int, dim: int, temperature: float, seed: int, chunk: int
) -> None:
    inputs = problem(positions, items, dim, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "CHUNK_ELEMENTS", chunk)
        got = loss_and_gradients(*inputs, temperature, ours=True)
    for mine, torchs in zip(got, loss_and_gradients(*inputs, temperature, ours=False), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*SIZES, st.integers(0, 99))
def test_the_kernels_are_cross_entropy(
    isa: str, positions: int, items: int, dim: int, temperature: float, seed: int
) -> None:
    vectors, table, wanted = problem(positions, items, dim, seed)
    vectors, table = F.normalize(vectors).float(), F.normalize(table).float()
    got = loss_and_gradients(vectors, table, wanted, temperature, ours=True)
    want = loss_and_gradients(vectors.double(), table.double(), wanted, temperature, ours=False)
    assert_near(got, want, temperature)


@pytest.mark.usefixtures("threads")
def test_a_position_depends_on_no_other_and_no_number_of_threads(isa: str) -> None:
    vectors, table, wanted = problem(700, 333, 50, 3)
    vectors, table = vectors.float(), table.float()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(catalogue_softmax(vectors, table, wanted, 1.0, True))
    for other in results[1:]:
        for one, more in zip(results[0], other, strict=True):
            assert torch.equal(one, more)
    half = catalogue_softmax(vectors[:350], table, wanted[:350], 1.0, True)[1]
    assert torch.equal(half, results[0][1][:350] * 2), "the mean is over half as many"


def test_large_logits_and_no_positions_are_fine() -> None:
    v = torch.full((2, 3), 100.0, requires_grad=True)
    loss = catalogue_cross_entropy(v, torch.eye(3) * 50, torch.tensor([0, 1]), 0.01)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)
    assert catalogue_cross_entropy(v[:0], torch.eye(3), torch.zeros(0, dtype=torch.int64), 1.0).item() == 0.0


def test_a_nan_is_not_lost(isa: str) -> None:
    for place in range(0, 130, 43):
        vectors, table = torch.randn(50, 4), torch.randn(130, 4)
        table[place, 1] = float("nan")
        assert torch.isnan(catalogue_cross_entropy(vectors, table, torch.zeros(50, dtype=torch.int64), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("item", [-1, 9])
def test_a_wanted_item_beyond_the_catalogue_is_an_error(dtype: torch.dtype, item: int) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"wanted item|out of bounds"):
        catalogue_cross_entropy(
            torch.randn(2, 3, dtype=dtype), torch.randn(9, 3, dtype=dtype), torch.tensor([0, item]), 1
        )


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match=r"vectors \(N, d\), items \(V, d\)"):
        catalogue_cross_entropy(torch.randn(2, 3), torch.randn(9, 4), torch.zeros(2, dtype=torch.int64), 1.0)
    with pytest.raises(BadInput, match=r"wanted \(N,\)"):
        catalogue_cross_entropy(torch.randn(2, 3), torch.randn(9, 3), torch.zeros(3, dtype=torch.int64), 1.0)
    with pytest.raises(BadInput, match=r"int64, got .* torch.float32"):
        catalogue_cross_entropy(torch.randn(2, 3), torch.randn(9, 3), torch.zeros(2), 1.0)


def test_what_is_frozen_gets_no_gradient() -> None:
    vectors, table = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3)
    catalogue_cross_entropy(vectors, table, torch.zeros(5, dtype=torch.int64), 1.0).backward()
    assert vectors.grad is not None
    assert table.grad is None
    with torch.no_grad():
        assert catalogue_cross_entropy(vectors, table, torch.zeros(5, dtype=torch.int64), 1.0) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_is_refused(dtype: torch.dtype) -> None:
    """It would leave out how the gradient depends on the vectors and items, and nobody would notice."""
    vectors = torch.randn(5, 3, requires_grad=True, dtype=dtype)
    loss = catalogue_cross_entropy(vectors, torch.randn(9, 3, dtype=dtype), torch.zeros(5, dtype=torch.int64), 1.0)
    with pytest.raises(RuntimeError, match="no second derivative; leave out create_graph"):
        torch.autograd.grad(loss, vectors, create_graph=True)


def test_the_operator_keeps_torchs_rules() -> None:
    inputs = (torch.randn(20, 6), torch.randn(30, 6), torch.randint(30, (20,)), 2.0)
    for gradients in (True, False):
        torch.library.opcheck(catalogue_softmax, (*inputs, gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_matrix_is_never_there(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "CHUNK_ELEMENTS", 64)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, tuple) else (out,)
            biggest = max([biggest, *(t.numel() for t in tensors if isinstance(t, Tensor))])
            return out

    vectors = torch.randn(500, 4, requires_grad=True, dtype=dtype)
    with Watch():
        wanted = torch.zeros(500, dtype=torch.int64)
        catalogue_cross_entropy(vectors, torch.randn(40, 4, dtype=dtype), wanted, 1.0).backward()
    assert biggest <= 500 * 4, "all that is kept is as large as the vectors"
