"""The demo's command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from infra.local import demo


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "does not exist"), (".", "has no log_standard_*.csv (the interaction log)")]
)
def test_a_folder_that_is_not_kuairand_is_refused_before_anything_is_emptied_or_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, message: str
) -> None:
    begun: list[object] = []
    monkeypatch.setattr(demo, "run", lambda *given: begun.append(given))
    monkeypatch.setattr(sys, "argv", ["demo", "--data", str(tmp_path / folder)])
    assert demo.main() == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "is not KuaiRand-Pure; give its folder" in told and message in told and not begun
