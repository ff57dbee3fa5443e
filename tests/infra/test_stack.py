"""A local installation is where its settings say, from wherever it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.storage import LocalFiles, Storage
from infra.local.stack import REPOSITORY, Stack


def test_a_relative_home_is_one_under_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRESHET_HOME", "data/freshet")
    stack = Stack.default()
    backend = Storage(stack.root).backend
    assert isinstance(backend, LocalFiles) and backend.folder == tmp_path / "data/freshet/local/store"
    assert Stack.demo().home == tmp_path / "data/freshet/demo"


def test_without_a_setting_the_home_belongs_to_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FRESHET_HOME", raising=False)
    assert Stack.default().home == REPOSITORY / ".freshet" / "local"
