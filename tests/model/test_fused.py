"""The fused parts of a layer against their composition of torch operators, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from components.errors import BadInput
from model.fused import (
    GATES,
    dropout_factors,
    finish_reference,
    hstu_finish,
    hstu_project,
    norm_gate_project,
    norm_silu_project,
    project_reference,
)

ROWS = [0, 1, 3, 47, 48, 49, 100, 1100]
WIDTHS = [1, 5, 16, 25, 50, 64, 100]
EACH_ISA = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def norm_of(width: int, affine: bool) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def with_gradients(
    run: Callable[..., Tensor], leaves: Sequence[Tensor | None], modules: list[nn.Module]
) -> list[Tensor]:
    """The result and the gradients of the leaves and the modules' parameters."""
    copies = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    out = run(*copies)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(x.grad.clone() for x in (*copies, *parameters) if x is not None and x.grad is not None)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        if theirs.numel():
            error = float((ours.double() - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
            assert error < 2e-5, f"output {index} is off by {error:.2e}"


@EACH_ISA
@given(
    st.sampled_from(ROWS), st.sampled_from(WIDTHS[1:]), st.lists(st.sampled_from(WIDTHS), min_size=4, max_size=4),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_projection_equals_its_reference(
    isa: str, rows: int, dim: int, sizes: list[int], affine: bool, biased: bool, silu_all: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    norm = norm_of(dim, affine)
    leaves = [torch.randn(rows, dim), torch.randn(dim, sum(sizes)) * 0.2, torch.randn(sum(sizes)) if biased else None]
    columns = sum(sizes) if silu_all else sizes[0]

    def fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.cat(norm_silu_project(x, norm, weight, bias, sizes, columns), 1)

    def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.cat(project_reference(x, norm, weight, bias, sizes, columns), 1)

    got = with_gradients(fused, leaves, [norm])
    norm.double()
    assert_close(got, with_gradients(reference, [x if x is None else x.double() for x in leaves], [norm]))


@EACH_ISA
@given(
    st.sampled_from(ROWS), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS[1:]), st.sampled_from(GATES),
    st.sampled_from([0.0, 0.2, 0.7]), st.booleans(), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_the_end_of_a_layer_equals_its_reference(
    isa: str, rows: int, dim: int, width: int, gate: str, dropout: float, affine: bool, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    norm, out = norm_of(width, affine), nn.Linear(width * (1 if gate == "product" else 3), dim, bias=biased)
    leaves: list[Tensor | None] = [torch.randn(rows, dim), torch.randn(rows, width), torch.randn(rows, width)]

    def fused(x: Tensor, u: Tensor, a: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return norm_gate_project(x, u, a, norm, out, gate=gate, dropout=dropout, training=True)

    torch.manual_seed(seed)
    factors = dropout_factors(dropout, int(torch.randint(2**62, ())), rows, out.in_features).double()

    def reference(x: Tensor, u: Tensor, a: Tensor) -> Tensor:
        return finish_reference(x, u, a, norm, out, gate=gate, dropout=0.0, factors=factors)

    got = with_gradients(fused, leaves, [norm, out])
    norm.double(), out.double()
    assert_close(got, with_gradients(reference, [x if x is None else x.double() for x in leaves], [norm, out]))


def test_the_norms_epsilon_counts(isa: str) -> None:
    """Rows of a variance like epsilon, and one of equal numbers, which has none."""
    x, weight, norm = torch.randn(50, 8) * 1e-3, torch.randn(8, 12), norm_of(8, True)
    x[7] = 0.25

    def run(project: Callable[..., Sequence[Tensor]], x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(list(project(x, norm, weight, None, [3, 3, 3, 3], 6)), 1)

    got = with_gradients(partial(run, norm_silu_project), [x, weight], [norm])
    norm.double()
    assert_close(got, with_gradients(partial(run, project_reference), [x.double(), weight.double()], [norm]))


def test_dropout_keeps_its_share_evenly_and_differs_by_row_column_and_seed() -> None:
    factors = dropout_factors(0.3, 12345, 400, 500)
    assert factors.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    kept = (factors > 0).double()
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.005)
    assert float((kept.mean(0) - 0.7).abs().max()) < 0.1  # five standard errors of 400
    assert float((kept.mean(1) - 0.7).abs().max()) < 0.1
    centred = kept - 0.7
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), (dropout_factors(0.3, 12346, 400, 500) > 0).double() - 0.7):
        assert abs(float((centred * shifted).mean()) / 0.21) < 0.012


def test_dropout_repeats_with_the_generator_and_is_off_outside_training() -> None:
    norm, out, x = norm_of(8, False), nn.Linear(8, 8), torch.randn(20, 8)

    def run(seed: int, training: bool) -> Tensor:
        torch.manual_seed(seed)
        return norm_gate_project(x, x, x, norm, out, gate="product", dropout=0.5, training=training).detach()

    assert torch.equal(run(1, True), run(1, True))
    assert not torch.equal(run(1, True), run(2, True))
    assert torch.equal(run(1, False), run(2, False))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 999))
def test_a_row_has_the_same_bits_alone_and_among_others(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 25), torch.randn(25, 40)
    norm, out = norm_of(10, True), nn.Linear(10, 25)
    pick = torch.randint(rows, (5,))
    every = norm_silu_project(x, norm_of(25, False), weight, None, [10, 10, 10, 10], 40)
    alone = norm_silu_project(x[pick], norm_of(25, False), weight, None, [10, 10, 10, 10], 40)
    for part, whole in zip(alone, every, strict=True):
        assert torch.equal(part, whole[pick])
    u, v = every[:2]
    ends = norm_gate_project(x, u, v, norm, out, gate="product", dropout=0, training=False)
    some = norm_gate_project(x[pick], u[pick], v[pick], norm, out, gate="product", dropout=0, training=False)
    assert torch.equal(some, ends[pick])


def test_the_number_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    norm, end_norm, out = norm_of(20, True), norm_of(9, True), nn.Linear(27, 20)
    leaves = [torch.randn(5000, 20), torch.randn(20, 36), torch.randn(36)]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        u, v, q, k = norm_silu_project(x, norm, weight, bias, [9, 9, 9, 9], 36)
        return norm_gate_project(x, u, v + q * k, end_norm, out, gate="concat", dropout=0.2, training=True)

    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(run, leaves, [norm, end_norm, out]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("affine", [False, True])
def test_the_operators_are_registered_as_torch_expects(affine: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    norms = (leaf(4), leaf(4)) if affine else (None, None)
    torch.library.opcheck(hstu_project, (leaf(6, 4), leaf(4, 8), leaf(8), *norms, [2, 2, 3, 1], 2, 1e-6))
    finish = (leaf(6, 3), leaf(6, 4), leaf(6, 4), leaf(3, 12), None, *norms, 1, 1e-6, 0.5, 7)
    torch.library.opcheck(hstu_finish, finish)


def test_other_dtypes_and_autocast_take_the_reference() -> None:
    norm, out, x = norm_of(4, False), nn.Linear(4, 4), torch.randn(3, 4)
    plain = norm_gate_project(x, x, x, norm, out, gate="product", dropout=0, training=False)
    double = norm_gate_project(*(x.double(),) * 3, norm, out.double(), gate="product", dropout=0, training=False)
    assert double.dtype == torch.float64
    assert torch.allclose(plain.double(), double, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        u, _, _, _ = norm_silu_project(x, norm, torch.randn(4, 4), None, [1, 1, 1, 1], 4)
    assert u.dtype == torch.bfloat16


def test_the_type_that_torch_gives_new_tensors_plays_no_part() -> None:
    norm, out, x = norm_of(4, True), nn.Linear(4, 4), torch.randn(3, 4)
    want = norm_gate_project(x, x, x, norm, out, gate="product", dropout=0, training=False)
    torch.set_default_dtype(torch.float64)
    try:
        got = norm_gate_project(x, x, x, norm, out, gate="product", dropout=0, training=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_type_never_reach_the_kernels(dtype: torch.dtype) -> None:
    """The kernels would read them as float32, beyond their end."""
    norm, x, weight = norm_of(4, False), torch.randn(3, 4), torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="dtype"):
        norm_silu_project(x, norm, weight.to(dtype), None, [2, 2, 2, 2], 8)
    with pytest.raises(RuntimeError, match="dtype"):
        norm_gate_project(x, x, x, norm, nn.Linear(4, 4).to(dtype), gate="product", dropout=0, training=False)
    bias = torch.randn(8).to(dtype)
    got = torch.cat(norm_silu_project(x, norm, weight, bias, [2, 2, 2, 2], 8), 1)
    assert torch.allclose(got, torch.nn.functional.silu(norm(x) @ weight + bias.float()), atol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    norm, x = norm_of(4, False), torch.randn(3, 4)
    with pytest.raises(BadInput, match="weight"):
        norm_silu_project(x, norm, torch.randn(4, 9), None, [2, 2, 2, 2], 8)
    with pytest.raises(BadInput, match=r"norm over 4 numbers and bias \(8,\)"):
        norm_silu_project(x, norm, torch.randn(4, 8), torch.randn(1), [2, 2, 2, 2], 8)
    with pytest.raises(BadInput, match="norm over 4 numbers"):
        norm_silu_project(x, norm_of(3, True), torch.randn(4, 8), None, [2, 2, 2, 2], 8)
    with pytest.raises(BadInput, match="norm over 4 numbers"):
        norm_gate_project(x, x, x, norm_of(3, True), nn.Linear(4, 4), gate="product", dropout=0, training=False)
    with pytest.raises(BadInput, match="gate"):
        norm_gate_project(x, x, x, norm, nn.Linear(4, 4), gate="sum", dropout=0, training=False)
    for rows in (x[0], x[:, :, None]):
        with pytest.raises(BadInput, match=r"x \(R, D\)"):
            norm_gate_project(rows, x, x, norm, nn.Linear(4, 4), gate="product", dropout=0, training=False)
    cube = torch.randn(3, 4, 4)
    with pytest.raises(BadInput, match=r"u, a \(R, W\)"):
        norm_gate_project(x, cube, cube, norm, nn.Linear(4, 4), gate="product", dropout=0, training=False)
    with pytest.raises(BadInput, match="12 to D"):
        norm_gate_project(x, x, x, norm, nn.Linear(4, 4), gate="concat", dropout=0, training=False)


def test_a_norm_with_a_weight_alone_is_refused() -> None:
    norm, x = nn.LayerNorm(4, bias=False), torch.randn(3, 4)
    with pytest.raises(ValueError, match="bias=True or elementwise_affine=False"):
        norm_silu_project(x, norm, torch.randn(4, 8), None, [2, 2, 2, 2], 8)
    with pytest.raises(ValueError, match="bias=True or elementwise_affine=False"):
        norm_gate_project(x, x, x, norm, nn.Linear(4, 4), gate="product", dropout=0, training=False)
