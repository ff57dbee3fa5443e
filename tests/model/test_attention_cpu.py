"""The CPU kernel against the float64 reference, on every instruction set; and its promises about bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.errors import BadInput
from model.attention import TIME_BUCKETS, Bias, Visibility, attention, causal, time_bucket
from model.attention_bias import TIME_BOUNDARIES
from model.attention_cpu import hstu_attention
from tests.model.attention_cases import Case, assert_equals_reference, assert_same_bits, cases, random_case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""Of the largest value of the array. bfloat16 is the storage: half a unit in its last place is 2^-9."""


EACH_ISA = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EACH_ISA
@given(case=cases())
def test_result_and_gradients_equal_the_reference(case: Case, isa: str) -> None:
    assert_equals_reference(case, case.run("cpu"), TOLERANCE)


@EACH_ISA
@given(case=cases(torch.bfloat16))
def test_bfloat16_is_the_reference_rounded(case: Case, isa: str) -> None:
    assert_equals_reference(case, case.run("cpu"), TOLERANCE)


def test_a_sequence_of_several_tasks_equals_the_reference(isa: str) -> None:
    case = random_case([1500, 40], None, 1, 12, 20, seed=3, window=300, positions=2000)
    assert_equals_reference(case, case.run("cpu"), TOLERANCE)


def test_large_scores_equal_the_reference(isa: str) -> None:
    """SiLU of hundreds is the score itself, and of minus hundreds nothing."""
    case = random_case([70], None, 1, 8, 5, seed=6)
    case = replace(case, alpha=200.0)
    assert_equals_reference(case, case.run("cpu"), TOLERANCE)


@pytest.mark.parametrize("length", [1, 1100])
def test_bfloat16_rounds_ties_to_even(length: int) -> None:
    """Rows that see themselves alone: SiLU(33) = 33, and 33 * 9 = 297 lies between 296 and 298."""
    q, k, v = (torch.full((length, 1, 1), x, dtype=torch.bfloat16, requires_grad=True) for x in (33.0, 1.0, 9.0))
    nothing = torch.zeros(length, dtype=torch.int64)
    seen = Visibility(torch.tensor([0, length]), nothing, nothing)
    y = attention(q, k, v, seen, alpha=1, normaliser=1, kernel="cpu")
    y.backward(torch.full_like(y, 9))
    assert v.grad is not None
    assert y.unique().tolist() == v.grad.unique().tolist() == [296.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, threads: None) -> None:
    lengths = [2100, 0, 1, 300, 64, *range(20, 60)]
    case = random_case(lengths, None, 2, 25, 9, seed=4, prefix=True, dtype=dtype)
    torch.set_num_threads(1)
    one = case.run("cpu")
    for count in (2, 3, 16):
        torch.set_num_threads(count)
        assert_same_bits(case.run("cpu"), one)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 30, 64, 65, 300, 1030]), min_size=2, max_size=4), st.integers(0, 999))
def test_other_sequences_of_the_batch_change_no_bit(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    seen = causal(torch.tensor(lengths), max_attn_len=50)
    total, first = sum(lengths), lengths[0]
    q, k, v = (torch.randn(total, 1, width) for width in (10, 10, 6))
    times = torch.randint(0, 10**6, (total,))
    position, weight = torch.randn(40), torch.randn(TIME_BUCKETS)

    def run(stop: int, mask: Visibility) -> list[Tensor]:
        leaves = [x[:stop].clone().requires_grad_() for x in (q, k, v)]
        bias = Bias(position, weight, times[:stop], times[:stop])
        y = attention(leaves[0], leaves[1], leaves[2], mask, alpha=0.3, normaliser=50, bias=bias, kernel="cpu")
        y.backward(v[:stop])
        return [y.detach()[:first], *(leaf.grad[:first] for leaf in leaves if leaf.grad is not None)]

    assert_same_bits(run(total, seen), run(first, causal(torch.tensor([first]), max_attn_len=50)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 140), min_size=1, max_size=4), st.integers(0, 140), st.integers(0, 999))
def test_rows_over_cached_keys_have_the_bits_of_the_whole_sequence(lengths: list[int], last: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys = torch.tensor(lengths)
    seen = causal(keys)
    q, k, v = (torch.randn(sum(lengths), 2, width) for width in (25, 25, 7))
    times = torch.randint(0, 10**6, (sum(lengths),))
    position, weight = torch.randn(100), torch.randn(TIME_BUCKETS)
    part, rows = seen.last_rows(keys.clamp(max=last))

    def run(queries: Tensor, mask: Visibility, asked: Tensor) -> Tensor:
        return attention(
            queries, k, v, mask, alpha=0.2, normaliser=9, bias=Bias(position, weight, asked, times), kernel="cpu"
        )

    assert torch.equal(run(q[rows], part, times[rows]), run(q, seen, times)[rows])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 130), st.integers(1, 80), st.integers(0, 999))
def test_neither_order_nor_number_of_candidates_changes_a_bit(history: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    total = history + count
    q, k, v = (torch.randn(total, 1, width) for width in (16, 16, 16))
    times = torch.cat([torch.randint(0, 10**6, (history,)), torch.full((count,), 10**6)])
    position, weight = torch.randn(100), torch.randn(TIME_BUCKETS)

    def scores(order: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(history), history + order])
        seen = causal(torch.tensor([len(rows)]), num_targets=torch.tensor([len(order)]))
        bias = Bias(position, weight, times[rows], times[rows])
        out = attention(q[rows], k[rows], v[rows], seen, alpha=0.3, normaliser=64, bias=bias, kernel="cpu")
        return out[history:]

    every = scores(torch.arange(count))
    order = torch.randperm(count)
    assert torch.equal(scores(order), every[order])
    assert torch.equal(scores(order[:1]), every[order[:1]])


def test_every_gap_is_in_the_bucket_of_time_bucket(isa: str) -> None:
    """Each row sees 128 keys whose values are the unit vectors: y is one number per gap."""
    around = (TIME_BOUNDARIES[:, None] + torch.arange(-3, 4)).flatten()
    powers = (2 ** torch.arange(20, 31)[:, None] + torch.arange(-70, 70)).flatten()
    near = torch.cat([torch.arange(40_000), around, powers, torch.tensor([2**31 - 1])])
    near = near[near.abs() < 2**31]
    far = torch.cat([around, torch.tensor([0, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1]), -around])
    weights = torch.linspace(0.5, 6.0, TIME_BUCKETS)
    for gaps, base in ((near, 0), (near, 2**40), (far, 0)):
        gaps = torch.cat([gaps, gaps.new_zeros(-len(gaps) % 128)])
        count = len(gaps) // 128
        key_time = torch.cat([base - gaps.view(count, 128), torch.full((count, 1), base)], 1).flatten()
        seen, _ = Visibility(
            torch.arange(count + 1) * 129, torch.zeros(count * 129).long(), torch.full((count * 129,), 128)
        ).last_rows(torch.ones(count).long())
        values = torch.cat([torch.eye(128), torch.zeros(1, 128)]).repeat(count, 1)[:, None]
        y = attention(
            torch.zeros(count, 1, 1), torch.zeros(count * 129, 1, 1), values, seen, alpha=1, normaliser=1,
            bias=Bias(None, weights, torch.full((count,), base), key_time), kernel="cpu",
        )  # fmt: skip
        want = weights[time_bucket(torch.full_like(gaps, base) - (base - gaps))]
        assert torch.allclose(y.flatten(), torch.nn.functional.silu(want), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999))
def test_gradients_are_the_slope_of_the_function(seed: int) -> None:
    case = random_case([5, 0, 9], None, 2, 3, 4, seed=seed, positions=6)
    assert case.position is not None and case.time is not None
    inputs = [x.float() for x in (case.q, case.k, case.v, case.position, case.time)]
    torch.manual_seed(seed)
    direction = [torch.randn_like(x) for x in inputs]
    weight = torch.randn(len(case.q), 2, 4).double()

    def value(values: list[Tensor]) -> Tensor:
        bias = Bias(values[3], values[4], case.query_time, case.key_time, case.self_gap)
        return attention(
            values[0], values[1], values[2], case.seen, alpha=0.5, normaliser=2.0, bias=bias, kernel="cpu"
        ).double()

    leaves = [x.clone().requires_grad_() for x in inputs]
    (value(leaves) * weight).sum().backward()
    slope = sum(
        float((leaf.grad * d).sum()) for leaf, d in zip(leaves, direction, strict=True) if leaf.grad is not None
    )
    step = 2e-3
    ends = [value([x + sign * step * d for x, d in zip(inputs, direction, strict=True)]) for sign in (1, -1)]
    difference = float(((ends[0] - ends[1]) * weight).sum()) / (2 * step)
    assert difference == pytest.approx(slope, rel=2e-3, abs=2e-2)


def operator_arguments(dtype: torch.dtype, *, position: bool, time: bool) -> tuple:
    case = random_case([4, 0, 7], [4, 0, 2], 2, 5, 3, seed=1, prefix=True)
    leaves = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    weights = [
        torch.randn(9).requires_grad_() if position else None,
        torch.randn(129).requires_grad_() if time else None,
    ]
    clocks = (case.query_time, case.key_time, case.self_gap) if time else (None, None, None)
    seen = case.seen
    return (*leaves, seen.offsets, seen.first_row, seen.begin, seen.end, seen.prefix, 0.5, 3.0, *weights, *clocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("position", "time"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_operator_is_registered_as_torch_expects(dtype: torch.dtype, position: bool, time: bool) -> None:
    torch.library.opcheck(hstu_attention, operator_arguments(dtype, position=position, time=time))


def test_rows_of_a_slice_are_read_in_place_and_equal_their_copy() -> None:
    torch.manual_seed(0)
    mixed = torch.randn(70, 3 * 24, requires_grad=True)
    q, k, v = (part.unflatten(1, (2, 12)) for part in mixed.split(24, dim=1))
    seen = causal(torch.tensor([40, 30]))
    y = attention(q, k, v, seen, alpha=0.3, normaliser=10, kernel="cpu")
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    want = attention(copies[0], copies[1], copies[2], seen, alpha=0.3, normaliser=10, kernel="cpu")
    y.sum().backward()
    want.sum().backward()
    assert torch.equal(y, want)
    assert mixed.grad is not None
    assert torch.equal(mixed.grad, torch.cat([x.grad.flatten(1) for x in copies if x.grad is not None], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [20, 1100])
def test_a_nan_is_not_lost_in_the_gradients(length: int, dtype: torch.dtype) -> None:
    """More than 1,024 rows are two tasks, whose gradients of the keys are added up."""
    q, k, v = torch.randn(3, length, 1, 4).to(dtype)
    k[5] = float("nan")
    for leaf in (k, v):
        leaf.requires_grad_()
    attention(q, k, v, causal(torch.tensor([length])), alpha=0.3, normaliser=10, kernel="cpu").sum().backward()
    for leaf in (k, v):
        assert leaf.grad is not None
        assert bool(leaf.grad[5].isnan().all())


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHET_ISA", "abacus")
    q = torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match="abacus"):
        attention(q, q, q, causal(torch.tensor([2])), alpha=1.0, normaliser=1.0, kernel="cpu")


@pytest.mark.parametrize("kernel", ["cpu", "triton", "abacus"])
def test_a_kernel_that_cannot_take_the_input_is_refused(kernel: str) -> None:
    q = torch.ones(2, 1, 1, dtype=torch.float64)
    with pytest.raises(BadInput, match="kernel"):
        attention(q, q, q, causal(torch.tensor([2])), alpha=1.0, normaliser=1.0, kernel=kernel)


def test_the_operator_itself_never_reads_outside_its_arrays() -> None:
    arguments = list(operator_arguments(torch.float32, position=True, time=True))
    arguments[6] = arguments[6] + 100
    with pytest.raises(ValueError, match="interval"):
        hstu_attention(*arguments)


@pytest.mark.parametrize(("window", "prefix"), [(0, 0), (70, 0), (70, 130)], ids=["all", "window", "window and prefix"])
@pytest.mark.parametrize("length", [2300, 8600])
def test_a_sequence_that_tasks_share_equals_its_definition(length: int, window: int, prefix: int) -> None:
    """More than 1,024 rows are several tasks, more than 8 x 1,024 longer ones; a task keeps what it sees."""
    torch.manual_seed(1)
    lengths = torch.tensor([5, length, 3])
    seen, place = causal(lengths, max_attn_len=window), torch.arange(int(lengths.sum())) - 5
    if prefix:
        fixed = torch.where((place >= prefix) & (place < length), prefix, 0)
        seen = Visibility(seen.offsets, torch.maximum(seen.begin, fixed), torch.maximum(seen.end, fixed), prefix=fixed)
    data = torch.randn(3, int(lengths.sum()), 2, 4)
    results = []
    for kernel, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        q, k, v = (x.to(dtype).requires_grad_() for x in data.clone())
        y = attention(q, k, v, seen, alpha=0.3, normaliser=40, kernel=kernel)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y.detach(), q.grad, k.grad, v.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        assert float((ours.double() - theirs).abs().max()) <= 2e-5 * float(theirs.abs().max())
