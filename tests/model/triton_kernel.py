"""How the tests run the Triton attention kernels: on a CUDA device, or else in Triton's interpreter.

Import this before anything imports triton.
"""

from __future__ import annotations

import importlib.util
import os
from copy import copy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from model.attention import Bias, Visibility
from tests.model.attention_cases import Case

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_DEVICE = torch.cuda.is_available()
if HAS_TRITON and not HAS_DEVICE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7 if HAS_DEVICE else 2.0**-6}
"""Of the largest value of the array. Weights and result are rounded to bfloat16; the interpreter cuts them off."""

NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs the package triton")
FEW = settings(
    max_examples=100 if HAS_DEVICE else 4,
    deadline=None,
    phases=list(Phase) if HAS_DEVICE else [Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if not HAS_TRITON:
        pytest.skip("needs the package triton")
    if request.param == "cuda" and not HAS_DEVICE:
        pytest.skip("needs a CUDA device")
    if request.param == "interpreter" and HAS_DEVICE:
        pytest.skip("the kernels run on the CUDA device")
    return torch.device("cuda" if HAS_DEVICE else "cpu")


def kernel(q: Tensor, k: Tensor, v: Tensor, seen: Visibility, bias: Bias | None = None, **numbers: float) -> Tensor:
    """The kernel itself: attention() takes it for CUDA tensors alone."""
    from model.attention_triton import attention_triton

    return attention_triton(q, k, v, seen, bias=bias, **({"alpha": 0.3, "normaliser": 50.0} | numbers))


def on(case: Case, device: torch.device) -> Case:
    moved = copy(case)
    moved.seen = case.seen.to(device)
    for name, value in vars(case).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.to(device))
    return moved


def run(case: Case, device: torch.device) -> list[Tensor]:
    """y and the gradients as Case.run gives them."""
    moved = on(case, device)
    leaves = [x.to(case.dtype, copy=True).requires_grad_() for x in (moved.q, moved.k, moved.v)]
    weights = [
        None if w is None else w.to(torch.float32, copy=True).requires_grad_() for w in (moved.position, moved.time)
    ]
    bias = None
    if case.position is not None or case.time is not None:
        bias = Bias(weights[0], weights[1], moved.query_time, moved.key_time, moved.self_gap)
    y = kernel(leaves[0], leaves[1], leaves[2], moved.seen, bias, alpha=case.alpha, normaliser=case.normaliser)
    generator = torch.Generator().manual_seed(5)
    y.backward(torch.randn(y.shape, generator=generator).to(case.dtype).to(device))
    asked = [x for x in (*leaves, *weights) if x is not None]
    return [x.cpu() for x in (y.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in asked))]


def assert_equals_reference(case: Case, device: torch.device) -> None:
    got, want = run(case, device), case.run("reference", torch.float64)
    assert len(got) == len(want)
    floors = [1e-3] * 4 + [case.bias_scale()] * (len(got) - 4)
    for index, (ours, theirs, floor) in enumerate(zip(got, want, floors, strict=True)):
        assert ours.shape == theirs.shape
        if theirs.numel():
            error = float((ours.double() - theirs).abs().max()) / max(1e-3, floor, float(theirs.abs().max()))
            assert error <= TOLERANCE[ours.dtype], f"output {index} is off by {error:.2e}"


def fits(case: Case) -> bool:
    """Whether the case is small enough for where it runs: the interpreter takes milliseconds per tile."""
    return HAS_DEVICE or case.k.shape[0] * case.k.shape[1] <= 200


def assert_same_rows(got: Tensor, want: Tensor) -> None:
    """The same bits on the device. NumPy's matrix product, in the interpreter, depends on the place in the tile."""
    assert torch.equal(got, want) if HAS_DEVICE else torch.allclose(got, want, rtol=0, atol=1e-6)


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(ours, theirs), f"output {index} differs"
