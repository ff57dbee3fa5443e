"""Who may know whom: checked over the source, so that a heavy import never sneaks into a DAG file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "model": {"pyspark", "airflow", "spark_jobs", "dags"},
    "spark_jobs": {"torch", "airflow", "model", "dags"},
    "dags": {"torch", "pyspark", "model", "spark_jobs"},
    "components": {"airflow", "dags"},
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module that the source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, str(node.module)


def violations(folder: str, source: str) -> list[str]:
    return [f"line {line}: {name}" for line, name in imported(source) if name.split(".")[0] in FORBIDDEN[folder]]


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_no_folder_imports_what_it_must_not_know(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} has no Python file; has it moved?"
    found = {str(path.relative_to(ROOT)): broken for path in files if (broken := violations(folder, path.read_text()))}
    assert found == {}


def test_dags_use_the_task_sdk_and_providers_only() -> None:
    for path in (ROOT / "dags").glob("*.py"):
        for line, name in imported(path.read_text()):
            if name.split(".")[0] == "airflow":
                assert name.startswith(("airflow.sdk", "airflow.providers.")), f"{path.name}:{line} imports {name}"


def test_a_step_starts_without_scipys_statistics() -> None:
    """They take a second to load, and each step is a process of its own."""
    steps = ", ".join(f"components.{name}.run" for name in ("ingest", "join", "sequences", "finetune"))
    told = subprocess.run(
        [sys.executable, "-c", f"import sys, {steps}; print('scipy.stats' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "False\n"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    import torch.nn as nn", ["line 2: torch.nn"]),
        ("from pyspark.sql import DataFrame", ["line 1: pyspark.sql"]),
        ("import torchlike, json\nfrom . import torch", []),
    ],
)
def test_the_check_sees_imports_inside_functions(source: str, found: list[str]) -> None:
    assert violations("dags", source) == found


def test_nothing_is_thrown_through_a_function_that_is_compiled_for_several_processors() -> None:
    """GCC 12 takes calls of such functions for calls that never throw: an exception could end the process."""
    heads = {
        (path.name, head)
        for path in (ROOT / "csrc").rglob("*.[ch]*")
        if "bench" not in path.parts and path.suffix in {".cc", ".h"}
        for head in re.findall(r"^FRESHET_CLONES [^{;]+", path.read_text(), flags=re.MULTILINE)
    }
    assert len(heads) > 5, "where have they gone?"
    assert {head for head in heads if "noexcept" not in head[1]} == set()
