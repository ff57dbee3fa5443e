"""The command lines of the experiments where the user has to do something."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from model.experiments import bench_hstu, collisions, kuairand, ml1m, stochastic_length_bench

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()
COMMANDS = re.findall(r"^(bench-[a-z0-9-]+): .*\n\t@(.* -m model\.experiments\.(\w+).*)$", MAKEFILE, re.MULTILINE)
ON_DATA = [bench_hstu, collisions, kuairand, ml1m, stochastic_length_bench]


@pytest.mark.parametrize("module", ON_DATA, ids=lambda m: m.__name__)
def test_a_wrong_folder_of_data_is_told_in_one_line(
    module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(vars(module)["__file__"])
    monkeypatch.setattr(sys, "argv", [path, f"--data={tmp_path / 'absent'}"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name="__main__")
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert "give the" in told and str(tmp_path / "absent") in told


def test_every_benchmark_takes_options_and_those_on_data_a_folder() -> None:
    assert len(COMMANDS) >= 8
    on_data = {module.__name__.rpartition(".")[2] for module in ON_DATA}
    for target, recipe, module in COMMANDS:
        assert recipe.endswith("$(ARGS)"), target
        assert ("$(or $(DATA)," in recipe) == (module in on_data), target
