"""Random jagged batches for the attention tests, and how to run one through a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from model.attention import TIME_BUCKETS, Bias, Visibility, attention

LENGTHS = [0, 1, 2, 3, 15, 16, 17, 23, 24, 25, 47, 48, 49, 63, 64, 65, 100, 127, 128, 129, 257]
WIDTHS = [1, 4, 7, 8, 16, 25, 50, 64, 128]
HUGE = 2**63 - 1


@dataclass
class Case:
    """One call. q, k, v and the weights are float64 and exactly representable in `dtype`."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Visibility
    position: Tensor | None
    time: Tensor | None
    query_time: Tensor
    key_time: Tensor
    self_gap: Tensor | None
    dtype: torch.dtype
    alpha: float = 0.25
    normaliser: float = 24.0

    def run(self, kernel: str | Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        """y and the gradients of q, k, v, position and time weights (those there are), for a fixed gradient of y.

        kernel: as attention() names it, or a function in its place.
        """
        attend = partial(attention, kernel=kernel) if isinstance(kernel, str) else kernel
        working = dtype or self.dtype
        leaves = [x.to(working, copy=True).requires_grad_() for x in (self.q, self.k, self.v)]
        precision = torch.float64 if working == torch.float64 else torch.float32
        weights = [
            None if w is None else w.to(precision, copy=True).requires_grad_() for w in (self.position, self.time)
        ]
        bias = None
        if self.position is not None or self.time is not None:
            bias = Bias(weights[0], weights[1], self.query_time, self.key_time, self.self_gap)
        q, k, v = leaves
        y = attend(q, k, v, self.seen, alpha=self.alpha, normaliser=self.normaliser, bias=bias)
        generator = torch.Generator().manual_seed(5)
        y.backward(torch.randn(y.shape, generator=generator).to(self.dtype).to(y))
        asked = [x for x in (*leaves, *weights) if x is not None]
        return [y.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in asked)]

    def bias_scale(self) -> float:
        """Size of what the gradient of a bias weight adds up: the norm of the sums per distance, in float64.

        Many pairs of either sign meet in one weight, so its own value says little about the rounding of its sum.
        """
        places = torch.arange(max(LENGTHS) + 1)
        known = torch.zeros(1, dtype=torch.float64) if self.position is None else self.position
        spread = replace(self, position=known[places.clamp(max=len(known) - 1)])
        return float(spread.run("reference", torch.float64)[4].norm())


def assert_equals_reference(case: Case, got: list[Tensor], tolerance: dict[torch.dtype, float]) -> None:
    """Whether what a kernel gave is the float64 reference's; tolerance: of the largest value of an array, by dtype."""
    want = case.run("reference", torch.float64)
    assert len(got) == len(want)
    floors = [1e-3] * 4 + [case.bias_scale()] * (len(got) - 4)
    for index, (ours, theirs, floor) in enumerate(zip(got, want, floors, strict=True)):
        assert ours.shape == theirs.shape
        if theirs.numel():
            error = float((ours.double() - theirs).abs().max()) / max(1e-3, floor, float(theirs.abs().max()))
            assert error <= tolerance[ours.dtype], f"output {index} is off by {error:.2e}"


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(ours, theirs), f"output {index} differs"


def times_of(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Seconds: sorted, all equal, in any order, or as far apart as int64 allows."""
    if kind == "equal":
        return torch.full((count,), 1_700_000_000)
    top = HUGE if kind == "huge" else 10**7
    times = torch.randint(-top if kind == "huge" else 0, top, (count,), generator=generator)
    return times.sort().values if kind == "sorted" else times


def random_case(
    lengths: list[int], rows: list[int] | None, heads: int, dqk: int, dv: int, *, seed: int, times: str = "sorted",
    positions: int | None = 30, with_time: bool = True, prefix: bool = False, window: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Any intervals (or windows of one length) and any prefixes over `lengths` keys; the last `rows` of them ask."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.tensor(lengths, dtype=torch.int64)
    counts = keys if rows is None else torch.minimum(torch.tensor(rows, dtype=torch.int64), keys)
    offsets, row_offsets = (torch.cat([torch.zeros(1, dtype=torch.int64), c.cumsum(0)]) for c in (keys, counts))
    limit, total = keys.repeat_interleave(counts), int(counts.sum())
    end = (torch.rand(total, generator=g) * (limit + 1)).long()
    begin = (end - window).clamp(min=0) if window else (torch.rand(total, generator=g) * (end + 1)).long()
    front = (torch.rand(total, generator=g) * (limit + 1)).long() if prefix else None
    seen = Visibility(offsets, begin, end, None if rows is None else row_offsets, front)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype).double()

    query_time, key_time = times_of(times, total, g), times_of(times, int(keys.sum()), g)
    return Case(
        numbers(total, heads, dqk), numbers(len(key_time), heads, dqk), numbers(len(key_time), heads, dv), seen,
        numbers(positions) if positions else None, numbers(TIME_BUCKETS) if with_time else None,
        query_time, key_time, torch.randint(0, 5000, (total,), generator=g), dtype,
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Case:
    """Batches of up to five sequences around the sizes of the kernels' tiles."""
    lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=0, max_size=5))
    rows = draw(st.one_of(st.none(), st.lists(st.sampled_from(LENGTHS), min_size=len(lengths), max_size=len(lengths))))
    return random_case(
        lengths, rows, draw(st.integers(1, 3)), draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS)),
        seed=draw(st.integers(0, 2**31)), times=draw(st.sampled_from(["sorted", "equal", "any", "huge"])),
        positions=draw(st.sampled_from([None, 1, 7, 300])), with_time=draw(st.booleans()),
        prefix=draw(st.booleans()), window=draw(st.sampled_from([0, 1, 20])), dtype=dtype,
    )  # fmt: skip
