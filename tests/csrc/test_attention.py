"""The C++ tests of the attention kernels, built and run as they are meant to be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("make or the C++ compiler is not installed")
    command = ["make", "-C", str(CSRC), f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize("target", ["attention_test", "attention_asan", "attention_tsan"])
def test_the_attention_kernels_equal_their_definition(target: str) -> None:
    result = _make(target)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "attention_test: all passed" in result.stdout


def test_unchanged_kernels_are_not_rebuilt() -> None:
    assert _make("attention").returncode == 0
    again = _make("attention")
    assert again.returncode == 0
    assert "kernel_" not in again.stdout
