"""Each file under configs/ can be run, and says in its comment what was measured with it and how."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from model.experiments import ml1m, stochastic_length_bench, streaming
from model.experiments.last_run import DOCS
from model.experiments.run_configs import ALL_CONFIGS, read_config

KINDS: dict[str, type[BaseModel]] = {
    "ml1m": ml1m.Entry,
    "streaming": streaming.Entry,
    "stochastic-length": stochastic_length_bench.Entry,
}
PATHS = sorted(ALL_CONFIGS.glob("*/*.toml"))


def comment(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def test_each_benchmark_has_its_configs() -> None:
    found = {folder: {path.stem for path in PATHS if path.parent.name == folder} for folder in KINDS}
    assert found["ml1m"] >= set(ml1m.ORDER) and found["streaming"] >= set(streaming.ORDER)
    assert found["stochastic-length"] == {"hstu"} and sum(map(len, found.values())) == len(PATHS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_is_of_its_benchmark_and_names_command_data_candidates_and_result(path: Path) -> None:
    read_config(path, KINDS[path.parent.name])
    words = comment(path)
    for needed in ("python -m model.experiments.", "candidates: ", "# Measured, ", "HR@10 "):
        assert needed in words
    assert "2,999 users, leave-one-out" in words or "Synthetic stream" in words


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_figures_in_a_config_are_those_of_the_documentation(path: Path) -> None:
    figures = set(re.findall(r"(?<!\d)\.\d{4}\b", comment(path)))
    documented = set(re.findall(r"(?<!\d)\.\d{4}\b", DOCS.read_text()))
    assert len(figures) >= 4 and figures <= documented
