"""What the Triton kernels promise beyond their values: which bits do not change, and which keys are not touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.attention import TIME_BUCKETS, Bias, Visibility, causal
from tests.model.attention_cases import assert_same_bits, random_case
from tests.model.triton_kernel import FEW, HAS_DEVICE, assert_same_rows, device, kernel, run

__all__ = ["device"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_has_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    case = random_case([70, 0, 33] * (20 if HAS_DEVICE else 1), None, 2, 25, 9, seed=4, prefix=True, dtype=dtype)
    assert_same_bits(run(case, device), run(case, device))


@FEW
@given(st.lists(st.sampled_from([1, 30, 64, 65, 100]), min_size=2, max_size=4), st.integers(0, 999))
def test_other_sequences_of_the_batch_change_no_bit(device: torch.device, lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    total, first = sum(lengths), lengths[0]
    q, k, v = (torch.randn(total, 1, width).to(device) for width in (10, 10, 6))
    times = torch.randint(0, 10**6, (total,)).to(device)
    position, weight = torch.randn(40).to(device), torch.randn(TIME_BUCKETS).to(device)

    def at(stop: int, counts: list[int]) -> list[Tensor]:
        leaves = [x[:stop].clone().requires_grad_() for x in (q, k, v)]
        mask = causal(torch.tensor(counts).to(device), max_attn_len=50)
        y = kernel(leaves[0], leaves[1], leaves[2], mask, Bias(position, weight, times[:stop], times[:stop]))
        y.backward(v[:stop])
        return [y.detach()[:first], *(leaf.grad[:first] for leaf in leaves if leaf.grad is not None)]

    assert_same_bits(at(total, lengths), at(first, lengths[:1]))


@FEW
@given(st.lists(st.integers(1, 100), min_size=1, max_size=3), st.integers(0, 100), st.integers(0, 999))
def test_rows_over_cached_keys_have_the_bits_of_the_whole_sequence(
    device: torch.device, lengths: list[int], last: int, seed: int
) -> None:
    torch.manual_seed(seed)
    keys = torch.tensor(lengths).to(device)
    seen = causal(keys)
    q, k, v = (torch.randn(sum(lengths), 2, width).to(device) for width in (25, 25, 7))
    times = torch.randint(0, 10**6, (sum(lengths),)).to(device)
    position, weight = torch.randn(100).to(device), torch.randn(TIME_BUCKETS).to(device)
    part, rows = seen.last_rows(keys.clamp(max=last))

    def values(queries: Tensor, mask: Visibility, asked: Tensor) -> Tensor:
        return kernel(queries, k, v, mask, Bias(position, weight, asked, times))

    assert_same_rows(values(q[rows], part, times[rows]), values(q, seen, times)[rows])


@FEW
@given(st.integers(0, 100), st.integers(1, 60), st.integers(0, 999))
def test_neither_order_nor_number_of_candidates_changes_a_bit(
    device: torch.device, history: int, count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(history + count, 1, 16).to(device) for _ in range(3))
    times = torch.cat([torch.randint(0, 10**6, (history,)), torch.full((count,), 10**6)]).to(device)
    position, weight = torch.randn(100).to(device), torch.randn(TIME_BUCKETS).to(device)

    def scores(order: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(history), history + order]).to(device)
        seen = causal(torch.tensor([len(rows)]), num_targets=torch.tensor([len(order)])).to(device)
        return kernel(q[rows], k[rows], v[rows], seen, Bias(position, weight, times[rows], times[rows]))[history:]

    every, order = scores(torch.arange(count)), torch.randperm(count)
    assert_same_rows(scores(order), every[order.to(device)])
    assert_same_rows(scores(order[:1]), every[order[:1].to(device)])


def test_tiles_of_keys_that_no_row_sees_are_not_read(device: torch.device) -> None:
    """What is multiplied by a weight of zero would still be NaN."""
    from model.triton.launch import tilings

    total = 300
    q, k, v = (torch.randn(total, 1, 8).to(device) for _ in range(3))
    seen = Visibility(
        torch.tensor([0, total]),
        torch.tensor([240] * 3),
        torch.tensor([290] * 3),
        torch.tensor([0, 3]),
        torch.tensor([9] * 3),
    ).to(device)
    want, tile = kernel(q[-3:], k, v, seen), tilings(q.dtype, 8, 8, biased=False)["forward"].other
    unseen = slice(tile, 240 // tile * tile)  # the prefix ends in the first tile
    k[unseen], v[unseen] = float("nan"), float("nan")
    assert torch.equal(kernel(q[-3:], k, v, seen), want)


def test_keys_that_no_row_sees_have_gradient_zero(device: torch.device) -> None:
    q, k, v = (torch.randn(count, 2, 8).to(device).requires_grad_() for count in (2, 100, 100))
    seen = Visibility(torch.tensor([0, 40, 100]), torch.tensor([1, 3]), torch.tensor([2, 9]), torch.tensor([0, 0, 2]))
    kernel(q, k, v, seen.to(device)).sum().backward()
    met = torch.zeros(100, dtype=torch.bool)
    met[[*range(41, 42), *range(43, 49), 98, 99]] = True
    for leaf in (k, v):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad.ne(0).any(2).any(1).cpu(), met)
