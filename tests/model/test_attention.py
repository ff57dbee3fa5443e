"""Attention: the published vectors, and independence of batch and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput
from model.attention import Bias, Visibility, attention, causal, time_bucket
from tests.model.golden import assert_near, load

GOLDEN = ["attention_causal", "attention_candidates", "attention_candidates_window", "attention_context_prefix"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GOLDEN)
def test_output_and_gradients_equal_the_published_code(name: str, dtype: torch.dtype) -> None:
    data = load(name)
    q, k, v = (torch.from_numpy(data[key]).to(dtype).requires_grad_() for key in "qkv")
    targets = torch.from_numpy(data["num_targets"]).long() if data["num_targets"].size else None
    seen = causal(
        torch.from_numpy(data["lengths"]).long(),
        num_targets=targets,
        max_attn_len=int(data["max_attn_len"]),
        contextual_len=int(data["contextual_len"]),
    )
    y = attention(q, k, v, seen, alpha=float(data["alpha"]), normaliser=float(data["normaliser"]))
    y.backward(torch.from_numpy(data["grad_y"]).to(dtype))
    assert_near(y, data["y"], "y")
    for leaf, key in ((q, "grad_q"), (k, "grad_k"), (v, "grad_v")):
        assert leaf.grad is not None
        assert_near(leaf.grad, data[key], key)


def naive(q, k, v, seen, alpha, normaliser, bias):  # type: ignore[no-untyped-def]
    """The definition, one row at a time."""
    out = torch.zeros(v.shape, dtype=v.dtype)
    for s in range(len(seen.offsets) - 1):
        first, last = int(seen.offsets[s]), int(seen.offsets[s + 1])
        for i in range(first, last):
            begin, end = int(seen.begin[i]), int(seen.end[i])
            for j in sorted({*range(first + begin, first + end), i}):
                distance = 0 if i == j else end - (j - first)
                gap = torch.zeros((), dtype=torch.int64) if i == j else bias.query_time[i] - bias.key_time[j]
                place = min(max(distance, 0), len(bias.position_weights) - 1)
                add = bias.position_weights[place] + bias.time_weights[time_bucket(gap)]
                score = alpha * (q[i] * k[j]).sum(-1) + add
                out[i] += torch.nn.functional.silu(score)[:, None] * v[j] / normaliser
    return out


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 10_000))
def test_jagged_attention_equals_its_definition_for_any_intervals(lengths: list[int], window: int, seed: int) -> None:
    torch.manual_seed(seed)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    limit = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    end = (torch.rand(total) * (limit + 1)).long()
    seen = Visibility(offsets, (end - window).clamp(min=0), end)
    q, k, v = torch.randn(3, total, 2, 4, dtype=torch.float64)
    times = torch.randint(0, 10**6, (total,))
    bias = Bias(torch.randn(5, dtype=torch.float64), torch.randn(129, dtype=torch.float64), times, times.flip(0))
    got = attention(q, k, v, seen, alpha=0.5, normaliser=7, bias=bias)
    assert torch.allclose(got, naive(q, k, v, seen, 0.5, 7, bias), atol=1e-12)


def test_a_long_sequence_cut_into_row_blocks_equals_its_definition() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([600, 3])
    seen = causal(lengths, max_attn_len=40)
    q, k, v = torch.randn(3, 603, 1, 4, dtype=torch.float64)
    times = torch.arange(603) * 1000
    bias = Bias(torch.randn(9, dtype=torch.float64), torch.randn(129, dtype=torch.float64), times, times)
    got = attention(q, k, v, seen, alpha=0.5, normaliser=40, bias=bias)
    rows = naive(q[:600], k[:600], v[:600], causal(lengths[:1], max_attn_len=40), 0.5, 40, bias)
    assert torch.allclose(got[:600], rows, atol=1e-12)


def test_a_row_does_not_depend_on_who_else_is_in_the_batch() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 60, 2, 8)
    alone = attention(q[:7], k[:7], v[:7], causal(torch.tensor([7])), alpha=0.3, normaliser=50)
    together = attention(q, k, v, causal(torch.tensor([7, 50, 3])), alpha=0.3, normaliser=50)
    assert torch.allclose(alone, together[:7], atol=1e-6)


def test_what_a_row_cannot_see_changes_nothing_in_it() -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 20, 1, 4)
    seen = causal(torch.tensor([20]), num_targets=torch.tensor([5]))
    before = attention(q, k, v, seen, alpha=1.0, normaliser=20)
    k[17:], v[17:] = 100.0, -100.0
    after = attention(q, k, v, seen, alpha=1.0, normaliser=20)
    assert torch.equal(before[:17], after[:17])


def test_time_buckets_are_those_of_the_formula() -> None:
    seconds = torch.arange(0, 200_000)
    formula = (torch.log(seconds.clamp(min=1).double()) / 0.301).floor().long()
    assert torch.equal(time_bucket(seconds), formula)
    assert torch.equal(time_bucket(-seconds), formula)
    assert int(time_bucket(torch.tensor(2**62))) <= 128


@pytest.mark.parametrize("begin,end", [([0, 0], [0, 3]), ([-1, 0], [0, 1]), ([1, 0], [0, 1])])
def test_intervals_that_leave_the_sequence_are_refused(begin: list[int], end: list[int]) -> None:
    q = torch.ones(2, 1, 1)
    seen = Visibility(torch.tensor([0, 2]), torch.tensor(begin), torch.tensor(end))
    with pytest.raises(BadInput, match="interval"):
        attention(q, q, q, seen, alpha=1.0, normaliser=1.0)


def test_a_prefix_with_a_window_is_refused() -> None:
    with pytest.raises(BadInput, match="contextual"):
        causal(torch.tensor([5]), max_attn_len=2, contextual_len=1)


def test_an_empty_batch_gives_an_empty_result() -> None:
    q = torch.ones(0, 1, 4)
    assert attention(q, q, q, causal(torch.tensor([], dtype=torch.int64)), alpha=1.0, normaliser=1.0).shape == (0, 1, 4)
