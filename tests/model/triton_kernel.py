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
from tests.model import attention_cases
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
    return [x.cpu() for x in on(case, device).run(kernel)]


def assert_equals_reference(case: Case, device: torch.device) -> None:
    attention_cases.assert_equals_reference(case, run(case, device), TOLERANCE)


def fits(case: Case) -> bool:
    """Whether the case is small enough for where it runs: the interpreter takes milliseconds per tile."""
    return HAS_DEVICE or case.k.shape[0] * case.k.shape[1] <= 200


def assert_same_rows(got: Tensor, want: Tensor) -> None:
    """The same bits on the device. NumPy's matrix product, in the interpreter, depends on the place in the tile."""
    assert torch.equal(got, want) if HAS_DEVICE else torch.allclose(got, want, rtol=0, atol=1e-6)
