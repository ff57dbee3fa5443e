"""Attention: the published vectors, and independence of batch and padding."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model.attention as attention_module
from components.errors import BadInput
from model.attention import Bias, Visibility, attention, causal, time_bucket
from tests.model.attention_cases import random_case
from tests.model.golden import assert_near, load

GOLDEN = ["attention_causal", "attention_candidates", "attention_candidates_window", "attention_context_prefix"]


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)]
)
@pytest.mark.parametrize("name", GOLDEN)
def test_output_and_gradients_equal_the_published_code(name: str, kernel: str, dtype: torch.dtype) -> None:
    data = load(name)
    q, k, v = (torch.from_numpy(data[key]).to(dtype).requires_grad_() for key in "qkv")
    targets = torch.from_numpy(data["num_targets"]).long() if data["num_targets"].size else None
    seen = causal(
        torch.from_numpy(data["lengths"]).long(),
        num_targets=targets,
        max_attn_len=int(data["max_attn_len"]),
        contextual_len=int(data["contextual_len"]),
    )
    alpha, normaliser = float(data["alpha"]), float(data["normaliser"])
    y = attention(q, k, v, seen, alpha=alpha, normaliser=normaliser, kernel=kernel)
    y.backward(torch.from_numpy(data["grad_y"]).to(dtype))
    assert_near(y, data["y"], "y")
    for leaf, key in ((q, "grad_q"), (k, "grad_k"), (v, "grad_v")):
        assert leaf.grad is not None
        assert_near(leaf.grad, data[key], key)


def naive(q, k, v, seen, alpha, normaliser, bias, softmax=False):  # type: ignore[no-untyped-def]
    """The definition, one row at a time."""
    out = torch.zeros(len(q), *v.shape[1:], dtype=v.dtype)
    for s in range(len(seen.offsets) - 1):
        first, keys = int(seen.offsets[s]), int(seen.offsets[s + 1] - seen.offsets[s])
        rows = range(int(seen.first_row[s]), int(seen.first_row[s + 1]))
        for i in rows:
            begin, end, own = int(seen.begin[i]), int(seen.end[i]), keys - len(rows) + i - rows[0]
            front = 0 if seen.prefix is None else int(seen.prefix[i])
            scores, values = [], []
            for j in sorted({*range(front), *range(begin, end), own}):
                distance = 0 if own == j else max(end - j, 0)
                self_gap = torch.tensor(0) if bias.self_gap is None else bias.self_gap[i]
                gap = self_gap if own == j else bias.query_time[i] - bias.key_time[first + j]
                add = bias.position_weights[min(distance, len(bias.position_weights) - 1)]
                scores.append(alpha * (q[i] * k[first + j]).sum(-1) + add + bias.time_weights[time_bucket(gap)])
                values.append(v[first + j])
            score = torch.stack(scores)
            weight = score.softmax(0) if softmax else torch.nn.functional.silu(score) / normaliser
            out[i] = (weight[..., None] * torch.stack(values)).sum(0)
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 9), st.booleans(), st.booleans(),
    st.integers(0, 10_000),
)  # fmt: skip
def test_jagged_attention_equals_its_definition_for_any_intervals(
    lengths: list[int], rows: int, prefix: bool, softmax: bool, seed: int
) -> None:
    case = random_case(lengths, [rows] * len(lengths), 2, 4, 3, seed=seed, prefix=prefix, positions=5)
    bias = Bias(case.position, case.time, case.query_time, case.key_time, case.self_gap)
    got = attention(case.q, case.k, case.v, case.seen, alpha=0.5, normaliser=7, bias=bias, softmax=softmax)
    assert torch.allclose(got, naive(case.q, case.k, case.v, case.seen, 0.5, 7, bias, softmax), atol=1e-12)


@pytest.mark.parametrize("softmax", [False, True])
def test_the_gradient_of_the_reference_is_its_slope(softmax: bool) -> None:
    case = random_case([3, 0, 4], [2, 0, 4], 1, 2, 2, seed=7, prefix=True, positions=4)

    def run(*values: torch.Tensor) -> torch.Tensor:
        bias = Bias(values[3], values[4], case.query_time, case.key_time)
        return attention(
            values[0], values[1], values[2], case.seen, alpha=0.5, normaliser=2, bias=bias, softmax=softmax
        )

    assert case.position is not None and case.time is not None
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.position, case.time)]
    assert torch.autograd.gradcheck(run, leaves)


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


def published_mask(length: int, targets: int, window: int, context: int) -> torch.Tensor:
    """(n, n) bool, as the published code builds it: positions of the prefix count as one, those of targets too."""
    ids = (torch.arange(length) - max(context - 1, 0)).clamp(min=0)
    top = length - targets - max(context - 1, 0)
    if targets:
        ids = ids.clamp(max=top)
    gap = ids[:, None] - ids[None]
    mask = (gap > 0) & (gap <= window) if window else gap > 0
    if context:
        mask |= (ids[:, None] == 0) & (ids[None] < top)
    return mask | torch.eye(length, dtype=torch.bool)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.integers(0, 4), st.integers(0, 6), st.integers(0, 4))
def test_causal_is_the_published_mask(history: int, targets: int, window: int, context: int) -> None:
    context = min(context, history)
    length = history + targets
    seen = causal(
        torch.tensor([length]), num_targets=torch.tensor([targets]), max_attn_len=window, contextual_len=context
    )
    position = torch.arange(length)
    got = (position >= seen.begin[:, None]) & (position < seen.end[:, None]) | torch.eye(length, dtype=torch.bool)
    assert torch.equal(got, published_mask(length, targets, window, context))


@pytest.mark.parametrize(
    ("rows", "prefix", "message"),
    [([0, 3], None, "as many keys"), ([0, 1], [3], "prefix"), ([0, 2], None, "cover"), ([0, 1], [0, 0], "one value")],
)
def test_rows_and_prefixes_that_do_not_fit_are_refused(rows: list[int], prefix: list[int] | None, message: str) -> None:
    q, k = torch.ones(1, 1, 1), torch.ones(2, 1, 1)
    front = None if prefix is None else torch.tensor(prefix)
    seen = Visibility(torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([1]), torch.tensor(rows), front)
    with pytest.raises(BadInput, match=message):
        attention(q, k, k, seen, alpha=1.0, normaliser=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_weights": None, "time_weights": None}, "without weights"),
        ({"time_weights": torch.ones(128)}, "129"),
        ({"position_weights": torch.ones(0)}, "P > 0"),
        ({"key_time": torch.zeros(3).long()}, "bias times"),
        ({"query_time": torch.zeros(2)}, "int64 seconds"),
        ({"key_time": torch.zeros(2).int()}, "int64 seconds"),
        ({"self_gap": torch.zeros(2).int()}, "int64 seconds"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    q = torch.ones(2, 1, 1)
    times = torch.zeros(2).long()
    fields = {"position_weights": torch.ones(2), "time_weights": torch.ones(129), "query_time": times} | change
    with pytest.raises(BadInput, match=message):
        attention(
            q, q, q, causal(torch.tensor([2])), alpha=1.0, normaliser=1.0, bias=Bias(**({"key_time": times} | fields))
        )


@pytest.mark.parametrize("change", [{"offsets": torch.tensor([0, 2]).int()}, {"end": torch.tensor([0.0, 1.0])}, {
    "begin": torch.zeros(2, 1).long(), "end": torch.zeros(2, 1).long(),
}])  # fmt: skip
def test_a_visibility_of_another_type_is_refused(change: dict) -> None:
    q, seen = torch.ones(2, 1, 1), dataclasses.replace(causal(torch.tensor([2])), **change)
    with pytest.raises(BadInput, match="one dimension and int64"):
        attention(q, q, q, seen, alpha=1.0, normaliser=1.0)


def test_a_changed_copy_of_a_visibility_is_seen_as_it_is() -> None:
    """Not as the one that it was made from, of which a kernel has kept something."""
    q, seen = torch.ones(3, 1, 1, dtype=torch.float64), causal(torch.tensor([3]))
    attention(q, q, q, seen, alpha=1.0, normaliser=1.0)
    nobody = dataclasses.replace(seen, begin=seen.end)
    got = attention(q, q, q, nobody, alpha=1.0, normaliser=1.0)
    torch.testing.assert_close(got, torch.full_like(got, float(F.silu(torch.ones(())))), atol=1e-7, rtol=0)
    with pytest.raises(BadInput, match="leaves its sequence"):
        attention(q, q, q, dataclasses.replace(seen, end=seen.end + 9), alpha=1.0, normaliser=1.0)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("normaliser", [0.0, -1.0, float("nan")])
def test_a_normaliser_that_is_not_positive_is_refused(kernel: str, normaliser: float) -> None:
    q = torch.ones(2, 1, 1)
    with pytest.raises(BadInput, match="must be positive"):
        attention(q, q, q, causal(torch.tensor([2])), alpha=1.0, normaliser=normaliser, kernel=kernel)


def test_last_rows_asks_for_counts_that_exist() -> None:
    with pytest.raises(BadInput, match="count"):
        causal(torch.tensor([2])).last_rows(torch.tensor([3]))


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_an_empty_batch_gives_an_empty_result_and_trains(kernel: str) -> None:
    q = torch.ones(0, 1, 4, requires_grad=True)
    seen = causal(torch.tensor([], dtype=torch.int64))
    y = attention(q, q, q, seen, alpha=1.0, normaliser=1.0, kernel=kernel)
    y.sum().backward()
    assert y.shape == (0, 1, 4)
    assert q.grad is not None


@pytest.mark.parametrize("width", [256, 257])
def test_heads_too_wide_for_the_triton_kernels_go_to_the_reference(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_has_triton", lambda: True)
    on_device = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float32)
    chosen = attention_module._kernel(on_device, width, False, "auto")  # type: ignore[arg-type]
    assert chosen == ("triton" if width == 256 else "reference")
