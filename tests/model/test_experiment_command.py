"""The command lines of the experiments where the user has to do something."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from model.experiments import collisions, kuairand, ml1m, stochastic_length_bench


@pytest.mark.parametrize("module", [collisions, kuairand, ml1m, stochastic_length_bench], ids=lambda m: m.__name__)
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
