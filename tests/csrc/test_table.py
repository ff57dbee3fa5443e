"""The C++ tests of the embedding table, built and run as they are meant to be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAMS = sorted(path.stem for pattern in ("*_test.cc", "*_stress.cc") for path in (CSRC / "table").glob(pattern))
CONCURRENT = ["embedding_table_insert_test", "embedding_table_stress", "index_test", "serving_table_stress"]
"""Programs that ThreadSanitizer must have seen, whatever else it has."""


def _make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("make or the C++ compiler is not installed")
    command = ["make", "-C", str(CSRC), f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.parametrize("target", ["table_test", "table_asan", "table_tsan"])
def test_the_cpp_tests_pass(target: str) -> None:
    result = _make(target)
    assert result.returncode == 0, result.stderr[-2000:]
    for program in CONCURRENT if target == "table_tsan" else PROGRAMS:
        assert f"/{program}\n" in result.stdout


def test_an_unchanged_tree_is_not_rebuilt() -> None:
    assert _make().returncode == 0
    again = _make()
    assert again.returncode == 0
    assert "bindings.cc" not in again.stdout
