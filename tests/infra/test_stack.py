"""A local installation is where its settings say, from wherever it is started."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.errors import BadInput
from components.rollout.config import RolloutConfig
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


@pytest.mark.parametrize("home", ["", "data/freshet"])
def test_without_settings_a_step_run_by_hand_works_on_the_installation_of_make_up(
    monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    for name in ("FRESHET_ROOT", "MLFLOW_TRACKING_URI", "FRESHET_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FRESHET_HOME", home)
    monkeypatch.chdir(REPOSITORY)
    config, stack = RolloutConfig(), Stack.default()
    assert (config.root, config.tracking_uri, config.server()) == (stack.root, stack.url("mlflow"), stack.url("serve"))


@pytest.mark.parametrize("port", ["abc", "0", "70000"])
def test_a_port_that_is_none_is_named_with_its_setting(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("FRESHET_PORT_SERVE", port)
    with pytest.raises(BadInput, match=f"FRESHET_PORT_SERVE is '{port}'; set it to a port number"):
        Stack.default()


def test_a_first_start_that_was_interrupted_is_made_good_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow's database is there before its tables are, and those of an older Airflow are migrated once."""
    stack, migrations = Stack.isolated(tmp_path), []

    def migrate(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "airflow" / "airflow.db").touch()
        migrations.append(command[-2:])
        if len(migrations) == 1:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", migrate)
    with pytest.raises(KeyboardInterrupt):
        stack.prepare()
    for _ in range(2):
        stack.prepare()
    assert migrations == [["db", "migrate"]] * 2
    monkeypatch.setattr("infra.local.stack.version", lambda _: "of another lock file")
    stack.prepare()
    assert len(migrations) == 3


def test_a_secret_that_was_not_written_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "jwt").touch()
    stack = Stack.isolated(tmp_path)
    made = stack.environment["AIRFLOW__API_AUTH__JWT_SECRET"]
    assert made and stack.environment["AIRFLOW__API_AUTH__JWT_SECRET"] == made


def test_cleaning_removes_the_demo_and_leaves_the_events_and_models_of_make_up() -> None:
    shown = subprocess.run(["make", "-n", "clean"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    (removed,) = (line.split() for line in shown.splitlines() if line.startswith("rm -rf"))
    demo, local = (REPOSITORY / ".freshet" / name for name in ("demo", "local"))
    gone = [REPOSITORY / word for word in removed[2:]]
    assert demo in gone and not any(local.is_relative_to(path) for path in gone)


def test_the_lock_has_what_requirements_in_needs_whatever_else_the_environment_holds(tmp_path: Path) -> None:
    """`make browser` and `make triton` add packages to .venv; torch brings the libraries that fit its machine."""
    uv = tmp_path / ".venv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    for name in ("Makefile", "requirements.in"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "infra").mkdir()
    (tmp_path / "infra" / "bootstrap.sh").touch()
    resolved = "cuda-toolkit==13\nnumpy==2\nnvidia-cublas==13\nsetuptools==84\ntorch==2.13.0\ntriton==3.7.1\n"
    (tmp_path / "requirements.lock").write_text(resolved)
    (tmp_path / ".venv" / ".installed").touch()
    uv.write_text('#!/bin/sh\necho "$@" > asked\n')
    uv.chmod(0o755)
    subprocess.run(["make", "lock"], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "requirements.lock").read_text() == "numpy==2\ntorch==2.13.0\n"
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("pip compile ") and " requirements.in " in asked and "freeze" not in asked
