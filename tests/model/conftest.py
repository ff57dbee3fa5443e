"""Shared settings of the model tests."""

from collections.abc import Iterator

import pytest
import torch

from model._native import freshet_attention


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an instruction set; the kernels are those for it. Skips where this machine lacks it."""
    monkeypatch.setenv("FRESHET_ISA", request.param)
    try:
        return freshet_attention.instruction_set()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
