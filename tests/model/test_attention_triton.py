"""The Triton kernels against the float64 reference: on a CUDA device, or else small in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.errors import BadInput, FreshetError
from model.attention import TIME_BUCKETS, Bias, Visibility, attention, causal, time_bucket
from model.attention_bias import TIME_BOUNDARIES
from model.experiments import bench_attention_cuda as bench
from tests.model import attention_cases
from tests.model.attention_cases import Case, assert_same_bits, cases, random_case
from tests.model.triton_kernel import (
    FEW,
    HAS_DEVICE,
    NEEDS_TRITON,
    TOLERANCE,
    assert_equals_reference,
    device,
    fits,
    kernel,
    on,
    run,
)

__all__ = ["device"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("widths", "options"),
    [
        ((25, 50), {}),
        ((8, 8), {"prefix": True, "positions": 1}),
        ((64, 128), {"prefix": True, "window": 20, "positions": 300}),
        ((16, 4), {"times": "huge", "positions": None}),
        ((1, 1), {"times": "any", "with_time": False}),
        ((128, 16), {"positions": None, "with_time": False}),
    ],
)
def test_result_and_gradients_equal_the_reference(
    widths: tuple[int, int], options: dict, dtype: torch.dtype, device: torch.device
) -> None:
    case = random_case([5, 0, 100, 66], [5, 0, 40, 66], 2, *widths, seed=1, dtype=dtype, **options)
    assert_equals_reference(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(256, 20), (130, 256)])
def test_the_widest_heads_equal_the_reference(
    widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    assert_equals_reference(random_case([40, 3], None, 1, *widths, seed=6, dtype=dtype, prefix=True), device)


def test_rows_that_are_scanned_in_parts_equal_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of keys looks for the rows that see its keys: those of a long sequence in several steps."""
    monkeypatch.setattr("model.triton.launch.SCAN", 16)
    for window in (0, 5):
        assert_equals_reference(random_case([100, 30], [70, 30], 1, 8, 8, seed=7, window=window), device)


def test_rows_that_see_a_prefix_alone_equal_the_reference(device: torch.device) -> None:
    case = random_case([70, 5], [40, 5], 1, 8, 8, seed=9, prefix=True)
    case.seen = replace(case.seen, begin=case.seen.end)
    assert_equals_reference(case, device)


def test_a_visibility_serves_both_types_whose_tiles_differ(device: torch.device) -> None:
    cases = [random_case([70, 33], None, 1, 8, 8, seed=8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seen = cases[0].seen.to(device)
    for case in cases:
        moved = on(case, device)
        moved.seen = seen
        attention_cases.assert_equals_reference(case, [x.cpu() for x in moved.run(kernel)], TOLERANCE)


@FEW
@given(case=cases().filter(fits))
def test_any_batch_equals_the_reference(case: Case, device: torch.device) -> None:
    assert_equals_reference(case, device)


@FEW
@given(case=cases(torch.bfloat16).filter(fits))
def test_any_bfloat16_batch_equals_the_reference(case: Case, device: torch.device) -> None:
    assert_equals_reference(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_equal_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    if not HAS_DEVICE:
        pytest.skip("too long for the interpreter")
    assert_equals_reference(random_case([3000, 40, 2049], None, 2, 64, 64, seed=3, positions=4000, dtype=dtype), device)
    assert_equals_reference(random_case([3000, 900], [500, 900], 1, 128, 50, seed=4, window=300, dtype=dtype), device)


def test_attention_takes_the_kernel_on_its_device_and_refuses_it_elsewhere(device: torch.device) -> None:
    case = on(random_case([5, 3], None, 1, 8, 8, seed=2), device)
    q, k, v = (x.float() for x in (case.q, case.k, case.v))
    if device.type == "cuda":
        for name in ("auto", "triton"):
            got = attention(q, k, v, case.seen, alpha=0.3, normaliser=50, kernel=name)
            assert torch.equal(got, kernel(q, k, v, case.seen))
    else:
        with pytest.raises(BadInput, match="kernel"):
            attention(q, k, v, case.seen, alpha=0.3, normaliser=50, kernel="triton")


def test_every_gap_is_in_the_bucket_of_time_bucket(device: torch.device) -> None:
    """Each row sees 128 keys whose values are the unit vectors: y is one number per gap."""
    edges = torch.cat([2**e + 2**e // 4 * torch.arange(4) for e in range(2, 63)])  # where a cell of the table starts
    around = torch.cat([TIME_BOUNDARIES, edges])[:, None] + torch.arange(-2, 3)
    rounding = edges[edges > 2**24, None] - edges[edges > 2**24, None] // 2**25 + torch.arange(-1, 2)
    ends = torch.tensor([2**63 - 1, -(2**63), -(2**63) + 1])
    gaps = torch.cat([torch.arange(3000), around.flatten(), -around.flatten(), rounding.flatten(), ends])
    gaps = torch.cat([gaps, gaps.new_zeros(-len(gaps) % 128)])
    count = len(gaps) // 128
    key_time = torch.cat([-gaps.view(count, 128), torch.zeros(count, 1).long()], 1).flatten()
    seen, _ = Visibility(
        torch.arange(count + 1) * 129, torch.zeros(count * 129).long(), torch.full((count * 129,), 128)
    ).last_rows(torch.ones(count).long())
    values = torch.cat([torch.eye(128), torch.zeros(1, 128)]).repeat(count, 1)[:, None]
    weights = torch.linspace(0.5, 6.0, TIME_BUCKETS)
    bias = Bias(None, weights.to(device), torch.zeros(count).long().to(device), key_time.to(device))
    q, k = torch.zeros(count, 1, 1).to(device), torch.zeros(count * 129, 1, 1).to(device)
    y = kernel(q, k, values.to(device), seen.to(device), bias, alpha=1, normaliser=1)
    want = torch.nn.functional.silu(weights[time_bucket(gaps)])  # neighbours differ by 0.04
    assert torch.allclose(y.cpu().flatten(), want, rtol=0, atol=1e-4)


def test_rows_of_a_slice_are_read_in_place_and_equal_their_copy(device: torch.device) -> None:
    mixed = torch.randn(70, 3 * 24).to(device).requires_grad_()
    q, k, v = (part.unflatten(1, (2, 12)) for part in mixed.split(24, dim=1))
    seen = causal(torch.tensor([40, 30])).to(device)
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y, want = kernel(q, k, v, seen), kernel(copies[0], copies[1], copies[2], seen)
    y.sum().backward()
    want.sum().backward()
    assert torch.equal(y, want)
    assert mixed.grad is not None
    assert torch.equal(mixed.grad, torch.cat([x.grad.flatten(1) for x in copies if x.grad is not None], 1))


def test_intervals_times_and_weights_may_be_columns_of_a_matrix(device: torch.device) -> None:
    case = random_case([40, 30], [20, 30], 2, 8, 8, seed=3, prefix=True)

    def column(x: Any) -> Any:
        return torch.stack([x, x + 1], 1)[:, 0] if isinstance(x, torch.Tensor) and x.dim() == 1 else x

    strided = copy(case)
    strided.seen = Visibility(**{f.name: column(getattr(case.seen, f.name)) for f in fields(Visibility) if f.init})
    for name in ("query_time", "key_time", "self_gap"):
        setattr(strided, name, column(getattr(case, name)))
    assert not (strided.seen.end.is_contiguous() or strided.key_time.is_contiguous())
    assert_same_bits(run(strided, device), run(case, device))


@pytest.mark.parametrize(("position", "time"), [(False, False), (True, True)])
def test_the_operator_is_registered_as_torch_expects(position: bool, time: bool, device: torch.device) -> None:
    from model.attention_triton import hstu_attention_triton
    from model.triton.launch import tiles

    case = on(random_case([4, 0, 7], [4, 0, 2], 2, 5, 3, seed=1, prefix=True), device)
    leaves = [x.float().requires_grad_() for x in (case.q, case.k, case.v)]
    weights = [
        torch.randn(count).to(device).requires_grad_() if there else None
        for count, there in ((9, position), (TIME_BUCKETS, time))
    ]
    clocks = (case.query_time, case.key_time, case.self_gap) if time else (None, None, None)
    seen = case.seen
    both = [
        tiles(offsets, count, 32, later_is_heavier=True) for offsets, count in ((seen.first_row, 6), (seen.offsets, 11))
    ]
    places = (seen.offsets, seen.first_row, seen.begin, seen.end, seen.prefix)
    torch.library.opcheck(hstu_attention_triton, (*leaves, *places, *both, 0.5, 3.0, *weights, *clocks))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=8), st.sampled_from([16, 64]), st.booleans())
@NEEDS_TRITON
def test_the_tiles_cover_each_row_once_the_heaviest_first(lengths: list[int], block: int, later: bool) -> None:
    from model.triton.launch import NO_TILE, tiles

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    found = [x for x in tiles(offsets, sum(lengths), block, later_is_heavier=later).tolist() if x[1] < NO_TILE]
    assert sorted(found) == [[i, at] for i, length in enumerate(lengths) for at in range(0, length, block)]
    work = [at if later else lengths[i] - at for i, at in found]
    assert work == sorted(work, reverse=True)


@NEEDS_TRITON
def test_heads_that_are_too_wide_are_refused() -> None:
    q = torch.ones(2, 1, 257)
    with pytest.raises(BadInput, match="256"):
        kernel(q, q, q, causal(torch.tensor([2])))


@NEEDS_TRITON
def test_the_kernels_compile_for_hopper_and_use_its_matrix_units(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.triton_compile"], cwd=ROOT, text=True, timeout=500, check=False,
        capture_output=True, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "bfloat16" in line]
    assert len(lines) == 6
    assert all("wgmma" in line for line in lines)


@pytest.mark.parametrize("biased", [True, False])
def test_the_dense_reference_of_the_benchmark_computes_what_attention_computes(biased: bool) -> None:
    p = bench.make_problem(70, 16, tokens=210, heads=2, biased=biased, device="cpu", dtype=torch.float32)
    assert bench.check_equal(p, lambda problem: bench.ours(problem, "reference")) < 1e-5
    with pytest.raises(FreshetError, match="disagree"):
        bench.check_equal(p, lambda problem: bench.ours(problem, "reference") * 1.05)


@pytest.mark.skipif(bench.missing() is None, reason="this machine can run the benchmark")
def test_the_benchmark_says_what_it_needs_where_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert "needs" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_benchmark_runs(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    if not HAS_DEVICE:
        pytest.skip("needs a CUDA device")
    assert bench.main(["--sizes", "128", "--widths", "64", "--tokens", "256", "--repetitions", "2"]) == 0
    assert "RESULT" in capsys.readouterr().out
